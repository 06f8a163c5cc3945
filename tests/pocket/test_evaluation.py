"""The measures of the pocket world, with judges that know the truth or swap it."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from mosaic.config.loading import from_dict, load_config
from mosaic.data import open_dataset
from mosaic.method.grids import Grid
from mosaic.pipeline.latents import images_to_tensor
from mosaic.weights.digests import file_digest, model_digest
from scripts.evaluate import main
from scripts.pocket import evaluate, world
from scripts.pocket.dataset import write_dataset
from scripts.pocket.evaluation import Proportion, generate, held_out_scenes, judge_pictures, judge_scenes, proportion, scene_batch
from scripts.pocket.judge import NUM_CANDIDATES
from tests import tiny


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),  # Wilson 1927, without continuity correction
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (1, 1, 0.2065, 1.0)],
)
def test_wilson_interval(hits: int, count: int, low: float, high: float) -> None:
    found = proportion([True] * hits + [False] * (count - hits))
    assert (found.share, found.count) == (hits / count, count)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_a_share_of_nothing_is_not_a_number() -> None:
    found = proportion([])
    assert found.count == 0
    assert all(math.isnan(value) for value in (found.share, found.low, found.high))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_scenes_are_held_out_with_distinct_classes(k: int) -> None:
    scenes = held_out_scenes(k, 30)
    assert len({scene.seed for scene in scenes}) == 30
    for scene in scenes:
        identities = [placement.identity for placement in scene.placements]
        assert len(identities) == len({identity.class_name for identity in identities}) == k
        assert all(world.is_held_out(identity) for identity in identities)
    assert held_out_scenes(k, 30) == scenes


class FakeJudge:
    """Takes the subject of a class for the identity that `seen` names; it reads no picture."""

    def __init__(self, seen: dict[str, world.Identity], present: float = 1.0) -> None:
        self.seen, self.present = seen, present
        self.asked: list[tuple[str, int]] = []

    def score(self, pictures: Tensor, class_name: str, identities: Sequence[world.Identity]) -> Tensor:
        """0 for the right looks, less with every attribute that differs; classes are not compared."""
        assert pictures.shape == (1, 3, 64, 64)
        self.asked.append((class_name, len(identities)))
        own = self.seen[class_name]
        names = ("palette", "pattern", "marking")
        return torch.tensor([[-sum(getattr(own, name) != getattr(other, name) for name in names) for other in identities]]).float()

    def identify(self, pictures: Tensor, class_name: str, candidates: Sequence[world.Identity]) -> Tensor:
        return self.score(pictures, class_name, candidates).argmax(dim=1)

    def presence_probability(self, pictures: Tensor) -> Tensor:
        return torch.full((len(pictures), len(world.CLASSES)), self.present)

    def counts(self, pictures: Tensor) -> Tensor:
        """Two of the first class of the scene, one of every other."""
        return torch.ones(len(pictures), len(world.CLASSES)).index_fill(1, torch.tensor([world.CLASSES.index(next(iter(self.seen)))]), 2)

    def backgrounds(self, pictures: Tensor) -> Tensor:
        return torch.full((len(pictures),), 3)


def scene_of_different_looks(k: int, min_visible: float = 0.0) -> world.Scene:
    """A held-out scene whose subjects differ in palette."""
    for scene in held_out_scenes(k, 200):
        palettes = {placement.identity.palette for placement in scene.placements}
        if len(palettes) == k and min(world.visible_fractions(scene, 64)) >= min_visible:
            return scene
    raise AssertionError("no such scene")


def identities_of(scene: world.Scene) -> list[world.Identity]:
    return [placement.identity for placement in scene.placements]


def test_a_judge_that_knows_the_truth() -> None:
    scene = scene_of_different_looks(3)
    judge = FakeJudge({identity.class_name: identity for identity in identities_of(scene)})
    found = judge_pictures(judge, [Image.new("RGB", (96, 96))], [scene])
    assert found.identification == found.presence == proportion([True] * 3)
    assert found.leakage == proportion([False] * 3)
    classes = [identity.class_name for identity in identities_of(scene)]
    assert judge.asked == [call for name in classes for call in ((name, NUM_CANDIDATES), (name, 3))]


def test_counts_and_backgrounds_are_those_of_the_caption() -> None:
    scene = scene_of_different_looks(3)
    judge = FakeJudge({identity.class_name: identity for identity in identities_of(scene)})
    for background, right in ((world.BACKGROUNDS[3], True), (world.BACKGROUNDS[2], False)):
        (outcome,) = judge_scenes(judge, [Image.new("RGB", (96, 96))], [replace(scene, background=background)])
        assert outcome.count == (False, True, True)
        assert outcome.background == (right,)


def test_a_picture_whose_subjects_swapped_looks_leaks() -> None:
    scene = scene_of_different_looks(2)
    first, second = identities_of(scene)
    swapped = {
        first.class_name: replace(second, class_name=first.class_name),
        second.class_name: replace(first, class_name=second.class_name),
    }
    found = judge_pictures(FakeJudge(swapped, present=0.4), [Image.new("RGB", (64, 64))], [scene])
    assert found.leakage == proportion([True] * 2)
    assert found.identification.share == 0
    assert found.presence == proportion([False] * 2)


def test_one_subject_cannot_leak() -> None:
    scene = held_out_scenes(1, 1)[0]
    judge = FakeJudge({identity.class_name: identity for identity in identities_of(scene)})
    found = judge_pictures(judge, [Image.new("RGB", (64, 64))], [scene])
    assert found.leakage.count == 0
    assert found.to_dict()["leakage"] == {"share": None, "low": None, "high": None, "count": 0}  # JSON knows no NaN
    assert found.identification == proportion([True])


def test_hidden_subjects_are_left_out_on_request() -> None:
    limit = 0.9
    scene = next(scene for scene in held_out_scenes(4, 200) if min(world.visible_fractions(scene, 64)) < limit)
    visible = sum(share >= limit for share in world.visible_fractions(scene, 64))
    judge = FakeJudge({identity.class_name: identity for identity in identities_of(scene)})
    assert judge_pictures(judge, [Image.new("RGB", (64, 64))], [scene], limit).identification.count == visible < 4
    assert judge_pictures(judge, [Image.new("RGB", (64, 64))], [scene]).identification.count == 4


def test_references_from_left_to_right_are_those_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins as a data set has them, as they are measured and as they are drawn: the first reference is the left one's."""
    write_dataset(tmp_path / "data", 8, 0, 2, 0, shares=world.RegimeShares(twins=1.0))
    data = {"root": str(tmp_path / "data"), "image_size": [64, 64], "reference_size": 32, "reference_order": "left_to_right"}
    config = from_dict({"data": data})
    dataset = open_dataset(config.data, "train", Grid(16, 16), Grid(8, 8))
    scenes = [world.sample_scene(seed, "train", 2, "twins") for seed in (1, 3, 5, 7)]
    assert {tuple(world.reference_order(scene)) for scene in scenes} == {(0, 1), (1, 0)}
    batch = scene_batch(scenes, tiny.build_pipeline(), config)
    asked = []

    def draw(prompts: list[str], references: list[list[Image.Image]], **_: object) -> SimpleNamespace:
        asked.extend(references)
        return SimpleNamespace(images=[Image.new("RGB", (64, 64))] * len(prompts))

    generate(draw, scenes, config, True, 2, 0)
    for number, scene in enumerate(scenes):
        stored = next(sample for sample in dataset if sample.id == f"train-{scene.seed:08d}")
        left, right = sorted(scene.placements, key=lambda placement: placement.x)
        for found in (stored.references, batch.references[number], images_to_tensor(asked[number])):
            drawn = images_to_tensor([world.render_reference(placement.identity, found.shape[-1]) for placement in (left, right)])
            assert torch.cdist(found.flatten(1), drawn.flatten(1)).argmin(dim=1).tolist() == [0, 1]  # stored ones have been resized
        for points in (stored.points, batch.points[number]):
            assert points[0][:, 1].remainder(16).double().mean() < points[1][:, 1].remainder(16).double().mean()


def test_scene_batch_is_what_training_sees() -> None:
    config = from_dict({"data": {"image_size": [64, 64], "reference_size": 32}})
    scenes = held_out_scenes(2, 8)
    pipeline = tiny.build_pipeline()  # tokens of 4 px
    batch = scene_batch(scenes, pipeline, config)
    assert batch.targets.shape == (8, 3, 64, 64)
    assert batch.references.shape == (8, 2, 3, 32, 32)
    assert batch.prompts == [world.caption(scene) for scene in scenes]
    orders = [world.reference_order(scene) for scene in scenes]
    assert [0, 1] in orders
    assert [1, 0] in orders
    for scene, order, found in zip(scenes, orders, batch.references, strict=True):  # picture and points are of one subject
        for subject, reference in zip(order, found, strict=True):
            picture = world.render_reference(scene.placements[subject].identity, 32)
            assert torch.equal(reference, images_to_tensor([picture])[0])
    for scene, order, sample in zip(scenes, orders, batch.points, strict=True):
        masks = world.render_scene(scene, 64).masks.reshape(2, 16, 4, 16, 4).any(axis=(2, 4)).reshape(2, -1)  # tokens of 4 px
        for subject, pairs in zip(order, sample, strict=True):
            assert masks[subject][pairs[:, 1]].all()
            assert not masks[1 - subject][pairs[:, 1]].all()
    for sample in batch.points:
        owners = [set(pairs[:, 1].tolist()) for pairs in sample]
        assert all(owners)
        assert not owners[0] & owners[1]
        assert all(int(pairs[:, 0].max()) < 64 for pairs in sample)
        assert all(int(pairs[:, 1].max()) < 256 for pairs in sample)


MEASURED = ("identification", "leakage", "presence", "count", "background")


def fake_arm(first: float, k: int) -> dict:
    """Shares that tell measures apart: first, first + 0.01, ..."""
    shares = {name: asdict(Proportion(first + 0.01 * number, 0.0, 1.0, 200)) for number, name in enumerate(MEASURED)}
    return shares if k > 1 else {**shares, "leakage": asdict(Proportion(math.nan, math.nan, math.nan, 0))}


def fake_entry(k: int) -> dict:
    arms = {name: fake_arm(first, k) for name, first in (("adapter", 0.5), ("without_references", 0.2), ("judge_on_real", 0.9))}
    attention = {"exact": 0.25, "near": 0.5, "exact_chance": 1 / 64, "near_chance": 0.12, "num_points": 9}
    return {"num_references": k, "num_cases": 100, **arms, "attention": attention}


def test_the_table_has_a_cell_for_every_column() -> None:
    lines = evaluate.table([fake_entry(1), fake_entry(2)]).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    first, second = ([cell.strip().removesuffix(" [0.0, 100.0]") for cell in line.split("|")[1:-1]] for line in lines[2:])
    assert first == ["1", "100", "50.0", "20.0", "-", "-", "52.0", "22.0", "25.0 (1.6)", "50.0 (12.0)", "90.0"]
    assert second[4:6] == ["51.0", "21.0"]


def test_what_the_base_draws_has_a_table_of_its_own() -> None:
    header, _, row = evaluate.caption_table([fake_entry(2)]).splitlines()
    assert header.count("|") == row.count("|") == 8
    assert row.replace(" [0.0, 100.0]", "") == "| 2 | 22.0 | 92.0 | 23.0 | 93.0 | 24.0 | 94.0 |"


def test_both_arms_and_the_judge_are_measured() -> None:
    config = load_config("configs/pocket.json", ["inference.num_inference_steps=2", "inference.image_guidance_scale=1.0"])
    (entry,) = evaluate.evaluate(config, [2], num_cases=8, batch_size=5, seed=1, attention_cases=3)
    assert (entry["num_references"], entry["num_cases"]) == (2, 8)
    for name in ("adapter", "without_references"):
        assert entry[name]["identification"]["count"] == 16
    assert entry["adapter"] != entry["without_references"]
    assert entry["judge_on_real"]["identification"]["share"] > 0.9
    assert entry["attention"]["near"] > 2 * entry["attention"]["near_chance"]


def test_settings_of_the_config_can_be_overridden(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    monkeypatch.setattr(evaluate, "evaluate", lambda config, *_: seen.append(config.inference) or [fake_entry(1), fake_entry(2)])
    assert main(["--set", "inference.image_guidance_scale=1.0", "--lora", "other.safetensors"]) == 0
    assert (seen[0].image_guidance_scale, seen[0].lora) == (1.0, "other.safetensors")
    assert main([]) == 0
    assert seen[1].image_guidance_scale == 2.0
    assert "| K |" in capsys.readouterr().out


def test_the_file_of_the_numbers_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: [fake_entry(2)])
    assert main(["--output", str(tmp_path / "numbers.json"), "--set", "inference.guidance_scale=3.0", "--seed", "7"]) == 0
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert found["entries"] == [fake_entry(2)]
    assert found["sampling"] == {"num_inference_steps": 20, "guidance_scale": 3.0, "image_guidance_scale": 2.0, "seed": 7}
    assert found["lora"] == {"name": "assets/pocket/lora.safetensors", "digest": file_digest(Path("assets/pocket/lora.safetensors"))}
    assert len({found["model"]["digest"], found["judge_digest"], found["world_digest"]}) == 3
    assert found["versions"]["torch"] == version("torch")
    none = ["--lora", str(tmp_path / "none.safetensors"), "--output", str(tmp_path / "other.json")]
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("nothing may be computed"))
    assert main(none) == 2
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize("name", ["evaluation", "evaluation_image_guidance_1"])
def test_the_guide_and_the_readme_show_the_shipped_weights(name: str) -> None:
    """Their tables are those of the file; the file is of the weights in this repository."""
    found = json.loads(Path(f"assets/pocket/{name}.json").read_text())
    guide = Path("docs/pocket_world.md").read_text()
    assert found["lora"]["digest"] == file_digest(Path("assets/pocket/lora.safetensors"))
    assert found["model"]["digest"] == model_digest("assets/pocket/flux")
    assert found["date"][:10] in guide
    if name == "evaluation":
        assert f"\n{evaluate.table(found['entries'])}\n" in guide
        assert f"\n{evaluate.caption_table(found['entries'])}\n" in guide
        cells = [line.strip("|").split("|") for line in evaluate.table(found["entries"]).splitlines()[2:]]
        rows = ["|" + "|".join(row[column] for column in (0, 2, 3, 4, 9)) + "|" for row in cells]
        assert "\n" + "\n".join(rows) + "\n" in Path("README.md").read_text()
    else:
        assert found["sampling"]["image_guidance_scale"] == 1.0
        for measure, first in (("identification", 0), ("leakage", 1)):
            shares = [evaluate.share_cell(entry["adapter"][measure]) for entry in found["entries"][first:]]
            assert f"| {' | '.join(shares)} |" in guide


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("nothing may be computed"))
    (tmp_path / "config.json").write_text("{}")
    config = ["--config", str(tmp_path / "config.json")]
    for arguments, message in (
        ([*config, "--num-cases", "0"], "--num-cases and --batch-size must be at least 1"),
        ([*config, "--k", "2", "7"], "--k must be of 1..6, got [2, 7]."),
        (config, "inference.lora is null in"),
        (["--config", str(tmp_path / "none.json")], "none.json: file not found."),
    ):
        assert main([*arguments, "--output", str(tmp_path / "numbers.json")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "numbers.json").exists()
    assert main(["--output", str(tmp_path)]) == 2
    assert f"--output: must be a file, but {tmp_path} is a folder" in capsys.readouterr().err
