"""What the ablation measures, on the shipped pocket weights at the smallest sizes."""

import dataclasses
from pathlib import Path

import pytest

from scripts import ablation_measure
from scripts.ablation import measures as ablation_measures
from scripts.ablation.measures import measuring_config, real_scenes
from scripts.ablation.plan import SIZES, make_plan
from scripts.ablation.results import pooled_frechet
from scripts.ablation.tasks import Task, features_file, read_tasks, run_tasks, write_tasks
from scripts.pocket.evaluation import held_out_scenes
from scripts.pocket.gradients import Pulls
from scripts.pocket.provenance import commit

SIZE = dataclasses.replace(SIZES["short"], cases=2, ks=(2,), real_scenes=4, inference_steps=1)
LORA = "assets/pocket/lora.safetensors"


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Task]:
    """A task of each kind, of the shipped adapter."""
    plan = make_plan(SIZE, tmp_path, ("main",), ("release",))
    pictures, _, target_rows, gradients, lines = run_tasks(plan, plan.runs[0])
    real = Task("real", str(tmp_path / "real/k2.json"), pictures.config, None, 2, 2, 4)
    pictures, target_rows, gradients, lines = (dataclasses.replace(task, lora=LORA) for task in (pictures, target_rows, gradients, lines))
    return {
        "real": real,
        "pictures": pictures,
        "lines": lines,
        "target_rows": target_rows,
        "gradients": gradients,
        "timing": dataclasses.replace(lines, kind="timing", output=str(tmp_path / "t.json")),
    }


def test_everything_is_measured_once(tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_tasks(tmp_path / "tasks.json", list(tasks.values()))
    assert ablation_measure.main([str(file)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(ablation_measures, "measure", lambda task: pytest.fail("is measured already"))
        assert ablation_measure.main([str(file)]) == 0
    found = {task.kind: task.result() for task in read_tasks(file)}
    pictures, lines = found["pictures"], found["lines"]
    assert pictures["identification"]["count"] == 4
    real = features_file(tasks["real"])
    assert min(pooled_frechet([(file, real)] * 2) for file in (features_file(tasks["pictures"]), real)) > 0
    assert pooled_frechet([]) is None
    scenes = {name: [float(value) for value in text.split()] for name, text in pictures["scenes"].items()}
    assert {len(values) for values in scenes.values()} == {2}
    for name in ("identification", "leakage", "presence"):
        assert sum(scenes[name]) / 2 == pytest.approx(pictures[name]["share"])
    for name, pooled in (("near", "attention"), ("exact", "attention"), ("entropy", "shape"), ("overlap", "shape")):
        assert min(scenes[name]) <= pictures[pooled][name] <= max(scenes[name])
    assert pictures["attention"]["near"] > pictures["attention"]["near_chance"]
    assert 0 < pictures["shape"]["entropy"] < pictures["shape"]["entropy_chance"]
    assert 0 < pictures["shape"]["overlap"] < 1
    assert len({len(lines[name]) for name in ("k", "u", "v", "peak")}) == 1
    assert set(lines["k"]) == {0, 1, 2}
    assert max(lines["u"]) < lines["reference_tokens"] == 16
    assert sum(v == peak for v, peak in zip(lines["v"], lines["peak"], strict=True)) > len(lines["v"]) / 10
    looks = found["target_rows"]
    assert 0 < looks["on_references"] < 0.5 < looks["own_reference"] < 1
    assert 1 / 32 < looks["peak_exact"] < looks["peak_near"] < 1
    assert {len(text.split()) for text in looks["scenes"].values()} == {2}
    pulls = found["gradients"]
    assert 0 < pulls["flow_matching"] < 1
    assert min(pulls["correspondence_pull"], pulls["disentanglement_pull"]) > 0
    monkeypatch.setattr(ablation_measures, "GRADIENT_BATCH_SIZE", 1)
    of_single = ablation_measures.measure(tasks["gradients"])
    assert {name: of_single[name] for name in Pulls._fields} == pytest.approx({name: pulls[name] for name in Pulls._fields}, rel=1e-3)
    assert pictures["commit"] == pulls["commit"] == commit()
    assert found["timing"]["seconds_per_image"] > 0


def test_rows_are_read_from_the_same_blocks_in_every_arm(tasks: dict[str, Task]) -> None:
    assert measuring_config(tasks["pictures"]).loss.capture_blocks == "all"  # the release's arm is trained on double-stream ones


def test_image_guidance_of_a_task(tasks: dict[str, Task]) -> None:
    assert measuring_config(tasks["pictures"]).inference.image_guidance_scale == 2.0
    assert measuring_config(dataclasses.replace(tasks["pictures"], image_guidance=1.0)).inference.image_guidance_scale == 1.0


def test_pictures_are_compared_with_renderings_of_other_scenes() -> None:
    seeds = {scene.seed for scene in real_scenes(2, 5)}
    assert len(seeds) == 5
    assert not seeds & {scene.seed for scene in held_out_scenes(2, 1000)}
