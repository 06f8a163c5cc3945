"""Chains of commands: order, failures, interruption, and what a second start does; the digests of measurements."""

import dataclasses
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from mosaic.pipeline.pipeline import MosaicFluxPipeline
from scripts.ablation import running as ablation
from scripts.ablation.command import main
from scripts.ablation.loop import Step, child_environment, last_line, run_chains
from scripts.ablation.plan import SIZES, Cell, Run, make_plan
from scripts.ablation.steps import train_step, training_state
from scripts.ablation.tasks import Task, features_file, read_tasks, run_tasks, write_tasks
from scripts.pocket.provenance import commit, hardware

ENVIRONMENT = child_environment(sys.executable)


def step(folder: Path, name: str, code: int = 0, body: str = "") -> Step:
    """Appends its name to `order`, and makes a file of its name if all goes well."""
    script = f"{body}\nopen('order', 'a').write({name + ' '!r})\n" + (
        "open(" + repr(name) + ", 'w')" if not code else f"raise SystemExit({code})"
    )
    return Step(
        name,
        [sys.executable, "-c", f"import os, time; os.chdir({str(folder)!r})\n{script}"],
        folder / f"logs/{name}.log",
        (folder / name).is_file,
    )


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split() if (folder / "order").is_file() else []


def test_chains_keep_their_order_and_a_failure_ends_its_own(tmp_path: Path) -> None:
    chains = [[step(tmp_path, "a1", code=3, body="print('it broke')"), step(tmp_path, "a2")], [step(tmp_path, "b1"), step(tmp_path, "b2")]]
    with open(tmp_path / "bar", "w") as sink, tqdm(total=4, file=sink) as bar:
        failures = run_chains(chains, 1, ENVIRONMENT, bar)
    assert order(tmp_path) == ["a1", "b1", "b2"]
    assert failures == [f"a1: exit code 3, see {tmp_path}/logs/a1.log: it broke"]
    assert bar.n == 2


def test_two_chains_at_a_time(tmp_path: Path) -> None:
    wait = "deadline = time.monotonic() + 60\nwhile not os.path.exists('{}') and time.monotonic() < deadline: time.sleep(0.02)"
    # each starts only when the other is there: one after the other they would not meet
    chains = [
        [step(tmp_path, name, body=f"open('{name}_here', 'w')\n" + wait.format(f"{other}_here"))]
        for name, other in (("a", "b"), ("b", "a"))
    ]
    with tqdm(disable=True) as bar:
        assert run_chains(chains, 2, ENVIRONMENT, bar) == []
    assert sorted(order(tmp_path)) == ["a", "b"]


def test_what_is_done_is_not_done_again_after_an_interruption(tmp_path: Path) -> None:
    chains = [
        [step(tmp_path, "one")],
        [step(tmp_path, "two", body="open('two_here', 'w')\ntime.sleep(60 if not os.path.exists('again') else 0)")],
        [step(tmp_path, "three")],
    ]

    class Interrupting(tqdm):
        def refresh(self, *args: object, **kwargs: object) -> None:
            if (tmp_path / "two_here").is_file() and not (tmp_path / "again").is_file():
                raise KeyboardInterrupt

    ended = []
    chains = [[dataclasses.replace(only, ended=ended.append)] for (only,) in chains]
    with open(tmp_path / "bar", "w") as sink, pytest.raises(KeyboardInterrupt):
        run_chains(chains, 1, ENVIRONMENT, Interrupting(file=sink), 0.05)
    assert len(ended) == 2  # the third was not begun
    assert 0 < ended[1] < 30
    assert not (tmp_path / "logs/three.log").exists()
    (tmp_path / "again").touch()
    with tqdm(disable=True) as bar:
        assert run_chains(chains, 1, ENVIRONMENT, bar) == []
    assert order(tmp_path) == ["one", "two", "three"]


def test_a_job_that_ends_without_its_result_has_failed(tmp_path: Path) -> None:
    without = dataclasses.replace(step(tmp_path, "a"), is_done=lambda: False)
    with tqdm(disable=True) as bar:
        (failure,) = run_chains([[without]], 1, ENVIRONMENT, bar)
    assert failure.startswith("a: exit code 0")


def test_last_line_of_a_log_with_progress_bars(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("first\nbar 1\rbar 2\r\n\n")
    assert last_line(tmp_path / "log") == "bar 2"


# ---- an ablation whose commands are stand-ins


def stand_in_steps(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def training(output: Path, run: Run) -> Step:
        return step(folder, f"train_{run.part}_{run.arm.name}", body="raise SystemExit(75)" if (folder / "signal").is_file() else "")

    monkeypatch.setattr(ablation, "data_step", lambda plan, workers: step(folder, "data"))
    monkeypatch.setattr(ablation, "cache_step", lambda output, data, config: step(folder, "cache"))
    monkeypatch.setattr(ablation, "train_step", training)
    monkeypatch.setattr(ablation, "measure_step", lambda output, name, tasks: step(folder, f"measure_{name.split('_seed')[0]}"))


def test_a_stopped_trial_goes_on_and_then_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in_steps(monkeypatch, tmp_path)
    arguments = ["--short", "--parallel", "1", "--parts", "late", "--arms", "light", "--output", str(tmp_path / "out")]
    (tmp_path / "signal").touch()  # trainings end as after SIGTERM, with a checkpoint
    assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    before = order(tmp_path)
    assert before == ["data", "cache", "measure_real"]
    (tmp_path / "signal").unlink()
    assert main(arguments) == 0
    first = order(tmp_path)
    source = ["train_scratch_flow_matching", "measure_scratch_flow_matching"]
    assert first == [*before, *source, "train_late_light", "measure_late_light"]
    assert main(arguments) == 0
    assert order(tmp_path) == first
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert not results["complete"]  # stand-ins measure nothing
    others = [*results["runs"], {**results["runs"][0], "name": "scratch_x", "status": "finished"}]
    (tmp_path / "out/results.json").write_text(json.dumps({**results, "runs": others}))
    assert main(arguments) == 2
    assert "1 runs that are not of this command, such as scratch_x" in capsys.readouterr().err
    (tmp_path / "out/results.json").write_text(json.dumps(results))
    assert "Not finished" in (tmp_path / "out/report/report.md").read_text()


def test_a_late_start_waits_for_what_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in_steps(monkeypatch, tmp_path)
    monkeypatch.setattr(
        ablation, "train_step", lambda output, run: step(tmp_path, f"train_{run.part}", code=3 if run.part == "scratch" else 0)
    )
    assert main(["--parallel", "2", "--parts", "late", "--arms", "light", "--output", str(tmp_path / "out")]) == 1
    assert order(tmp_path)[-1] == "train_scratch"


def test_all_run_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert child_environment("python")["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert child_environment("python")["OMP_NUM_THREADS"] == "3"


def test_exported_arms_load_and_carry_their_config(tmp_path: Path) -> None:
    plan = make_plan(SIZES["short"], tmp_path / "out", ("scratch",), ("base", "scal", "paper"))
    scal = next(run for run in plan.runs if run.arm.name == "scal")
    scal.folder.mkdir(parents=True)
    shutil.copyfile("assets/pocket/lora.safetensors", scal.lora)
    ablation.export_arms(plan, tmp_path / "arms")
    assert not (tmp_path / "arms").exists()  # not known to be finished
    train_step(plan.output, scal).ended(3.0)
    assert (training_state(scal)["status"], training_state(scal)["seconds"]) == ("finished", 3.0)
    train_step(plan.output, scal).ended(4.0)
    assert training_state(scal)["seconds"] == 7.0
    assert training_state(scal)["versions"]["torch"] == version("torch")
    ablation.export_arms(plan, tmp_path / "arms")
    assert [path.name for path in (tmp_path / "arms").iterdir()] == ["scratch_scal.safetensors"]
    assert (tmp_path / "arms/scratch_scal.safetensors").stat().st_size < 0.6 * scal.lora.stat().st_size
    pipeline = MosaicFluxPipeline.from_pretrained("assets/pocket/flux", dtype=torch.float32)
    assert pipeline.load_reference_lora(tmp_path / "arms/scratch_scal.safetensors") == 32
    assert pipeline.reference_config["loss"]["disentanglement_weight"] == 0


# ---- the measurements and their digests


def test_a_measurement_is_done_for_its_adapter_and_size_only(tmp_path: Path) -> None:
    plan = make_plan(SIZES["short"], tmp_path, ("scratch",), ("scal",))
    task = run_tasks(plan, plan.runs[0])[80, "pictures", Cell("distinct", 2)]
    assert (task.kind, task.num_references, task.first_scene, task.cases) == ("pictures", 2, 300_000, 8)
    assert task.result() is None
    Path(task.lora).parent.mkdir(parents=True)
    Path(task.lora).write_bytes(b"weights")
    task.write({"found": 1})
    assert task.result() is None  # the pictures' features come first
    features_file(task).write_bytes(b"features")
    assert task.result() == {"found": 1, "commit": commit(), "processor": hardware()["processor"]}
    for change in ({"cases": task.cases + 1}, {"num_references": 3}, {"regime": "twins"}, {"first_scene": 0}):
        assert dataclasses.replace(task, **change).result() is None
    Path(task.lora).write_bytes(b"others")
    assert task.result() is None


def test_checkpoints_are_measured_on_fewer_scenes(tmp_path: Path) -> None:
    size = dataclasses.replace(SIZES["short"], cells=(*SIZES["short"].cells, Cell("twins", 3)))
    plan = make_plan(size, tmp_path, only=("base", "scal", "light"))
    found = {(run.part, run.arm.name): run_tasks(plan, run) for run in plan.runs}
    scal = found["scratch", "scal"]
    end = [(80, kind, cell) for kind in ("pictures", "interventions") for cell in size.cells]
    before = [(40, kind, cell) for kind in ("pictures", "interventions") for cell in size.cells[:2]]
    assert list(scal) == [*before, *end, (80, "target_rows", size.cells[0]), (80, "gradients", size.cells[0])]
    assert {key: task.cases for key, task in scal.items() if key[1] == "pictures"} == {
        **{(40, "pictures", cell): 4 for cell in size.cells[:2]},
        **{(80, "pictures", cell): 8 for cell in size.cells},
    }
    assert scal[40, "pictures", size.cells[0]].lora.endswith("checkpoints/step_00000040/ema.safetensors")
    assert list(found["scratch", "base"]) == [(80, "pictures", cell) for cell in size.cells]
    assert list(found["late", "light"]) == [(20, kind, cell) for kind in ("pictures", "interventions") for cell in size.cells]
    assert len({task.output for tasks in found.values() for task in tasks.values()}) == sum(map(len, found.values()))


def test_tasks_survive_their_file(tmp_path: Path) -> None:
    tasks = [
        Task("pictures", "out.json", "config.json", None, "twins", 2, 7, 3),
        Task("real", "t.json", "c.json", None, "distinct", 1, 0, 2, real_scenes=5),
    ]
    assert read_tasks(write_tasks(tmp_path / "tasks.json", tasks)) == tasks
    (tmp_path / "tasks.json").write_text('[{"kind": "x"}]')
    with pytest.raises(ValueError, match="must be a list of tasks"):
        read_tasks(tmp_path / "tasks.json")
