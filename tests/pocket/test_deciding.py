"""When the target's tokens settle on a reference: by hand, and read from a run of the pocket weights."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mosaic.config.loading import load_config
from mosaic.method.grids import Grid
from mosaic.model.attention_rows import CaptureRequest
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from scripts.pocket import deciding
from scripts.pocket.deciding import SampledLooks, Settling, contrast, measure_settling, place_shares, sample_looks, settled_step
from scripts.pocket.evaluate_regimes import settling_tables
from scripts.pocket.evaluation import generate, held_out_scenes
from scripts.pocket.judge import load_judge
from scripts.pocket.places import Place
from scripts.pocket.world import reference_order
from tests import tiny


@pytest.mark.parametrize(("choices", "step"), [("aaa", 0), ("baa", 1), ("aba", 2), ("aab", 2), ("a", 0)])
def test_a_picture_has_settled_when_it_changes_no_more(choices: str, step: int) -> None:
    assert settled_step(choices) == step


def test_contrast_by_hand() -> None:
    log_shares = np.array([[-1.0, -2.0], [-1.5, -0.5]])  # a liking of both places for the first reference changes nothing
    assert contrast(log_shares, {0: 0, 1: 1}) == pytest.approx((0.5 + 1.5) / 2)
    assert contrast(log_shares + [3.0, 0.0], {0: 0, 1: 1}) == pytest.approx((0.5 + 1.5) / 2)
    three = np.array([[0.0, -4.0, -4.0], [-1.0, 0.0, -4.0], [-2.0, -4.0, 0.0]])
    assert contrast(three, {0: 0, 1: 1, 2: 2}) == pytest.approx((1.5 + 4 + 4) / 3)


def test_shares_of_a_place_are_of_its_tokens() -> None:
    shares = torch.rand(3, 64, 2, generator=torch.Generator().manual_seed(0))
    grid, place = Grid(8, 8), Place("cat", 0.75, 0.25, {})  # the corner of rows 1, 2 and columns 5, 6
    near = [row * 8 + column for row in (1, 2) for column in (5, 6)]
    torch.testing.assert_close(place_shares(shares, place, grid), shares[:, near].mean(dim=1))
    one = place_shares(shares[:, :1], Place("cat", 0.9, 0.9, {}), Grid(1, 1))  # no token within the radius: the nearest
    torch.testing.assert_close(one, shares[:, 0])


def test_settling_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four pictures one lacks a subject, and one bears one look twice; two start with the references exchanged, one of them for good."""
    scenes = held_out_scenes(2, 4, "twins")
    name = scenes[0].placements[0].identity.class_name
    first, second = torch.zeros(64, 2), torch.zeros(64, 2)
    left = torch.arange(64) % 8 < 4
    first[left], first[~left] = torch.tensor([0.6, 0.4]), torch.tensor([0.5, 0.5])  # both look more at reference 0, the left one most
    second[left], second[~left] = torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2])
    shares = iter([[first, second], [second, second], [second, first], [first, first]])
    monkeypatch.setattr(
        deciding, "sample_looks", lambda *_: SampledLooks(Image.new("RGB", (64, 64)), [1.0, 0.5], torch.stack(next(shares)))
    )
    twins = [Place(name, 0.25, 0.5, {}), Place(name, 0.75, 0.5, {})]
    places = iter([twins, twins, twins, twins[:1]])
    monkeypatch.setattr(deciding, "find_places", lambda *_: [next(places)])
    scenes = [
        replace(scene, placements=tuple(replace(p, identity=replace(p.identity, class_name=name)) for p in scene.placements))
        for scene in scenes
    ]
    # The first two pictures show reference 1 at the left, the third shows reference 0 twice.
    drawn = iter([1, 0, 1, 0, 0, 0])
    monkeypatch.setattr(deciding, "nearest_reference", lambda *_: next(drawn))
    pipeline = SimpleNamespace(encoders=SimpleNamespace(vae_scale_factor=4))
    found = measure_settling(pipeline, load_judge(), scenes, load_config("configs/pocket.json"), seed=0)
    small, large = (math.log(0.6 / 0.5) + math.log(0.5 / 0.4)) / 2, (math.log(0.8 / 0.5) + math.log(0.5 / 0.2)) / 2
    assert found[0] == pytest.approx((1.0, 1 / 3, 0.5, (small + large) / 2, large))
    assert found[1] == pytest.approx((0.5, 1.0, 1.0, large, small))
    entry = {"settling": [Settling(1.0, 50.0, 25.0, 0.125, math.nan)._asdict() | {"contrast_same_look": None}]}
    (table,) = settling_tables({"twins": {"2": entry, "3": {}}})
    assert table.splitlines()[2:] == ["| 1.00 | 50.0 | 25.0 | 0.12 | - |"]


def test_rows_of_all_target_tokens_are_read_until_the_end(batch: tiny.Batch) -> None:
    transformer = tiny.build_transformer()
    with torch.no_grad(), deciding.reading_target_rows(transformer) as rows:
        transformer(**batch.inputs)
    backwards = torch.arange(tiny.TARGET_GRID.num_tokens).flip(0).expand(len(batch.latents), -1)
    with torch.no_grad():
        output = transformer(**batch.inputs, capture=CaptureRequest(target_index=backwards, target_keys="all"))
    torch.testing.assert_close(rows, [output.target_rows.flip(1)])  # once: the hooks are gone


def test_looks_are_read_while_the_usual_picture_is_sampled() -> None:
    """With image guidance, whose second pass sees no references, the first pass is read, once a step."""
    settings = ["inference.num_inference_steps=2", "inference.image_guidance_scale=2.0", 'data.reference_order="left_to_right"']
    config = load_config("configs/pocket.json", settings)
    pipeline = MosaicFluxPipeline.from_pretrained(config.model.pretrained, dtype=torch.float32)
    pipeline.load_reference_lora(config.inference.lora)
    pipeline.set_progress_bar_config(disable=True)
    scene = next(scene for scene in held_out_scenes(2, 9, "twins") if reference_order(scene) == [1, 0])
    found = sample_looks(pipeline, scene, config, seed=3)
    assert found.shares.shape == (2, 64, 2)
    torch.testing.assert_close(found.shares.sum(dim=-1), torch.ones(2, 64))
    assert found.timesteps[0] == 1 > found.timesteps[1] > 0
    assert not torch.allclose(found.shares[0], found.shares[1])
    (expected,) = generate(pipeline, [scene], config, True, 1, 3)
    assert found.picture.tobytes() == expected.tobytes()
    plain = sample_looks(pipeline, scene, config.replace(inference=config.inference.replace(image_guidance_scale=1.0)), seed=3)
    torch.testing.assert_close(plain.shares[0], found.shares[0])  # the first step starts from the same noise
