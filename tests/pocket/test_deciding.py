"""When the target's tokens settle on a reference: by hand, and read from a run of the pocket weights."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mosaic.config.loading import load_config
from mosaic.method.grids import Grid
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from scripts.pocket import deciding, world
from scripts.pocket.deciding import SampledLooks, Settling, measure_settling, place_shares, sample_looks, settled_step
from scripts.pocket.evaluate_regimes import settling_tables
from scripts.pocket.evaluation import generate, held_out_scenes
from scripts.pocket.judge import load_judge
from scripts.pocket.places import Place


@pytest.mark.parametrize(
    ("first", "step"),
    [([0.9, 0.8, 0.7], 0), ([0.4, 0.8, 0.7], 1), ([0.9, 0.4, 0.7], 2), ([0.9, 0.9, 0.1], 2), ([0.6], 0)],
)
def test_a_place_has_settled_when_it_changes_no_more(first: list[float], step: int) -> None:
    assert settled_step(torch.tensor([[share, 1 - share] for share in first])) == step


def test_shares_of_a_place_are_of_its_tokens() -> None:
    shares = torch.rand(3, 64, 2, generator=torch.Generator().manual_seed(0))
    grid, place = Grid(8, 8), Place("cat", 0.75, 0.25, {})  # the corner of rows 1, 2 and columns 5, 6
    near = [row * 8 + column for row in (1, 2) for column in (5, 6)]
    torch.testing.assert_close(place_shares(shares, place, grid), shares[:, near].mean(dim=1))
    one = place_shares(shares[:, :1], Place("cat", 0.9, 0.9, {}), Grid(1, 1))  # no token within the radius: the nearest
    torch.testing.assert_close(one, shares[:, 0])


def test_settling_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two pictures one lacks a subject; in the other the left place starts on the wrong reference, and the right one is right."""
    scenes = held_out_scenes(2, 2, "twins")
    order = world.reference_order(scenes[0])
    left, right = (order.index(subject) for subject in (0, 1))  # the references that they should bear
    name = scenes[0].placements[0].identity.class_name
    shares = torch.zeros(2, 64, 2)
    columns = torch.arange(64) % 8
    shares[0, :, right] = 1.0  # all look at the reference of the right one at first
    shares[1, columns < 4, left] = shares[1, columns >= 4, right] = 1.0
    monkeypatch.setattr(deciding, "sample_looks", lambda *_: SampledLooks(Image.new("RGB", (64, 64)), [1.0, 0.5], shares))
    places = [[Place(name, 0.25, 0.5, {}), Place(name, 0.75, 0.5, {})], [Place(name, 0.25, 0.5, {})]]
    monkeypatch.setattr(deciding, "find_places", lambda *_: [places.pop(0)])
    monkeypatch.setattr(deciding, "nearest_reference", lambda place, _: left if place.x < 0.5 else right)
    config = load_config("configs/pocket.json")
    pipeline = SimpleNamespace(encoders=SimpleNamespace(vae_scale_factor=4))
    found = measure_settling(pipeline, load_judge(), scenes, config, seed=0)
    assert found == [Settling(1.0, 0.5, 0.5, 1.0), Settling(0.5, 1.0, 1.0, 0.0)]
    (table,) = settling_tables({"twins": {"2": {"settling": [step._asdict() for step in [Settling(1.0, 50.0, 50.0, 100.0)]]}, "3": {}}})
    assert table.splitlines()[2:] == ["| 1.00 | 50.0 | 50.0 | 100.0 |"]


def test_looks_are_read_while_the_usual_picture_is_sampled() -> None:
    """With image guidance, whose second pass sees no references, the first pass is read, once a step."""
    settings = ["inference.num_inference_steps=2", "inference.image_guidance_scale=2.0"]
    config = load_config("configs/pocket.json", settings)
    pipeline = MosaicFluxPipeline.from_pretrained(config.model.pretrained, dtype=torch.float32)
    pipeline.load_reference_lora(config.inference.lora)
    pipeline.set_progress_bar_config(disable=True)
    (scene,) = held_out_scenes(2, 1, "twins")
    found = sample_looks(pipeline, scene, config, seed=3)
    assert found.shares.shape == (2, 64, 2)
    torch.testing.assert_close(found.shares.sum(dim=-1), torch.ones(2, 64))
    assert found.timesteps[0] == 1 > found.timesteps[1] > 0
    assert not torch.allclose(found.shares[0], found.shares[1])
    (expected,) = generate(pipeline, [scene], config, True, 1, 3)
    assert found.picture.tobytes() == expected.tobytes()
    plain = sample_looks(pipeline, scene, config.replace(inference=config.inference.replace(image_guidance_scale=1.0)), seed=3)
    torch.testing.assert_close(plain.shares[0], found.shares[0])  # the first step starts from the same noise
