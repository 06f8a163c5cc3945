"""What the ablation measures, on the shipped pocket weights at the smallest sizes."""

import dataclasses
import math
from pathlib import Path

import pytest

from scripts import ablation_measure
from scripts.ablation import measures as ablation_measures
from scripts.ablation.measures import measuring_config
from scripts.ablation.plan import SIZES, Cell, make_plan
from scripts.ablation.results import pooled_frechet
from scripts.ablation.tasks import Task, features_file, read_tasks, run_tasks, write_tasks
from scripts.pocket.gradients import Pulls
from scripts.pocket.provenance import commit

LORA = "assets/pocket/lora.safetensors"


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Task]:
    """A task of each kind, of the shipped adapter."""
    size = dataclasses.replace(
        SIZES["short"], cases=2, checkpoint_cases=2, cells=(Cell("distinct", 2), Cell("twins", 2)), inference_steps=1
    )
    plan = make_plan(size, tmp_path, ("scratch",), ("release",))
    (run,) = plan.runs
    found = {
        f"{kind}_{cell}": dataclasses.replace(task, lora=LORA) for (step, kind, cell), task in run_tasks(plan, run).items() if step == 80
    }
    wanted = {"pictures": {"distinct", "twins"}, "interventions": {"twins"}}
    found = {name: task for name, task in found.items() if task.regime in wanted.get(name.split("_")[0], {"distinct"})}
    config = str(run.config)
    return found | {f"real_{cell}": Task("real", str(tmp_path / f"real/{cell}.json"), config, None, *cell, 0, 2, 4) for cell in size.cells}


def test_everything_is_measured_once(tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_tasks(tmp_path / "tasks.json", list(tasks.values()))
    assert ablation_measure.main([str(file)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(ablation_measures, "measure", lambda task: pytest.fail("is measured already"))
        assert ablation_measure.main([str(file)]) == 0
    assert read_tasks(file) == list(tasks.values())
    found = {name: task.result() for name, task in tasks.items()}
    pictures, real = found["pictures_distinct_k2"], features_file(tasks["real_distinct_k2"])
    assert min(pooled_frechet([(file, real)] * 2) for file in (features_file(tasks["pictures_distinct_k2"]), real)) > 0
    assert pooled_frechet([]) is None
    scenes = {name: [float(value) for value in text.split()] for name, text in pictures["scenes"].items()}
    assert {len(values) for values in scenes.values()} == {2}
    for name in ("identification", "leakage", "presence", "near", "exact", "entropy", "overlap", "apart"):
        assert sum(scenes[name]) / 2 == pytest.approx(pictures[name]["share"])
    assert pictures["near"]["share"] > 0.14  # chance
    assert 0 < pictures["entropy"]["share"] < math.log(64)
    assert 0 < pictures["overlap"]["share"] < 1
    looks = found["target_rows_distinct_k2"]
    assert 0 < looks["on_references"] < 0.5 < looks["own_reference"] < 1
    assert 1 / 32 < looks["peak_exact"] < looks["peak_near"] < 1
    assert {len(text.split()) for text in looks["scenes"].values()} == {2}
    replaced = found["interventions_twins_k2"]
    assert 0.05 < replaced["flow_matching"] < 0.5
    assert replaced["hide_references"] > 0.002
    assert replaced["own_reference"] == pytest.approx(sum(replaced[f"own_reference_{level}"] for level in ("low", "middle", "high")) / 3)
    pulls = found["gradients_distinct_k2"]
    assert 0 < pulls["flow_matching"] < 1
    assert min(pulls["correspondence_pull"], pulls["disentanglement_pull"]) > 0
    monkeypatch.setattr(ablation_measures, "GRADIENT_BATCH_SIZE", 1)
    of_single = ablation_measures.measure(tasks["gradients_distinct_k2"])
    assert {name: of_single[name] for name in Pulls._fields} == pytest.approx({name: pulls[name] for name in Pulls._fields}, rel=1e-3)
    assert pictures["commit"] == pulls["commit"] == commit()
    twins = found["pictures_twins_k2"]
    assert {"apart", "same_look", "identification", "blending", "missing", "near"} <= twins["scenes"].keys() & twins.keys()
    assert "presence" not in twins  # which is asked by class
    assert found["real_twins_k2"]["apart"]["share"] == found["real_distinct_k2"]["identification"]["share"] == 1


def test_rows_are_read_from_the_same_blocks_in_every_arm(tasks: dict[str, Task]) -> None:
    assert (
        measuring_config(tasks["pictures_distinct_k2"]).loss.capture_blocks == "all"
    )  # the release's arm is trained on double-stream ones
