"""Checkpoints on disk: what they hold, damage, leftovers, rotation, a full disk, a read-only folder, the lock, other configs."""

import json
import logging
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from mosaic.locks import FolderLock
from mosaic.method.metrics import AttentionAccuracy
from mosaic.training import Trainer, starting, train
from mosaic.training import trainer as training
from mosaic.training.checkpoints import checkpoint
from mosaic.training.checkpoints.checkpoint import checkpoint_folders, clean_up, find_checkpoint, find_damage, rotate
from mosaic.training.checkpoints.optimizer_state import optimizer_tensors, restore_optimizer
from mosaic.training.signals import TrainingStopped
from mosaic.weights.digests import file_digest
from tests import forks, runs

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a checkpoint of each; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(runs.make_config(world, folder, **OPTIONS))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


OPTIONS: dict[str, Any] = {"training__checkpoint_every": 1, "optimizer__ema_decay": 0.9, "optimizer__warmup_steps": 4}


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- contents


def test_what_a_checkpoint_holds(finished: Path, world: Path) -> None:
    folder = finished / "checkpoints/step_00000002"
    assert names(folder) == ["checksums.json", "ema.safetensors", "lora.safetensors", "optimizer.safetensors", "state.json"]
    assert find_damage(folder) is None
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["samples_seen"], state["ema_step"], state["global_batch"], state["processes"]) == (2, 4, 2, 2, 1)
    assert state["schedule"] == {"learning_rate": 0.0075, "disentanglement_weight": 0.6}
    assert state["versions"]["torch"] == version("torch")
    assert state["optimizer"]["param_groups/0/lr"] == 0.005
    assert len(state["digest"]) == 64
    adapter = load_file(folder / "lora.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    assert adapter.keys() == load_file(folder / "ema.safetensors").keys()  # the frozen base is not there
    optimizer = load_file(folder / "optimizer.safetensors")
    assert optimizer.keys() == {f"{key}/{name}" for key in adapter for name in ("step", "exp_avg", "exp_avg_sq")}


def test_any_optimizer_goes_through(tmp_path: Path) -> None:
    """Momentum that may be None, numbers in the groups, and no state yet."""
    for kind, options in (
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adamax, {"lr": 0.1}),
        (torch.optim.Rprop, {"lr": 0.1}),
    ):
        parameters = {name: torch.nn.Parameter(torch.arange(3.0) + i) for i, name in enumerate("ab")}
        optimizer = kind(parameters.values(), **options)
        other = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
        again = kind(other.values(), **options)
        restore_optimizer(again, other, *optimizer_tensors(optimizer, parameters))
        for step in range(4):
            if step == 2:
                with torch.no_grad():
                    [other[name].copy_(p) for name, p in parameters.items()]
                optimizer.param_groups[0]["lr"] = 0.05
                again = kind(other.values(), **options)
                tensors, values = optimizer_tensors(optimizer, parameters)
                restore_optimizer(again, other, tensors, json.loads(json.dumps(values)))
            for group, own in ((parameters, optimizer), (other, again)):
                for p in group.values():
                    p.grad = torch.sin(p.detach() + step)
                own.step()
        assert all(torch.equal(other[name], p) for name, p in parameters.items())
    with pytest.raises(ValueError, match="the optimizer's state is of 1 tensors, the adapter has 2"):
        restore_optimizer(again, other, {"a/prev": torch.zeros(3)}, {})


# ---- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "flipped adapter": (flip, "lora.safetensors", r"lora\.safetensors is not what was written \(its SHA-256 differs\)"),
    "flipped moments": (flip, "optimizer.safetensors", r"optimizer\.safetensors is not what was written"),
    "flipped average": (flip, "ema.safetensors", r"ema\.safetensors is not what was written"),
    "flipped state": (flip, "state.json", r"state\.json is not what was written"),
    "cut adapter": (truncate, "lora.safetensors", r"lora\.safetensors is not what was written"),
    "cut state": (truncate, "state.json", r"state\.json is not what was written"),
    "cut checksums": (truncate, "checksums.json", r"checksums\.json: not valid JSON"),
    "no checksums": (Path.unlink, "checksums.json", r"checksums\.json is missing"),
    "no moments": (Path.unlink, "optimizer.safetensors", r"optimizer\.safetensors cannot be read \(No such file or directory\)"),
    "other checksums": (lambda path: path.write_text('{"../x": "0"}'), "checksums.json", r"checksums\.json must name lora\.safetensors"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage(run: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """A path is refused; "auto" goes back to the checkpoint before, and says so. No file is touched."""
    action, name, message = DAMAGE[kind]
    newest = run / "checkpoints/step_00000003"
    action(newest / name)
    before = runs.files_below(run)
    with pytest.raises(
        ValueError, match=rf"--resume .*step_00000003: the checkpoint is damaged: .*{message}.*\. Give another one, or auto"
    ):
        find_checkpoint(str(newest), run / "checkpoints")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint("auto", run / "checkpoints") == run / "checkpoints/step_00000002"
    assert len(caplog.messages) == 1
    assert "step_00000003 is damaged: " in caplog.messages[0]
    assert "Falling back to an earlier checkpoint" in caplog.messages[0]
    assert runs.files_below(run) == before


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run: Path, finished: Path, world: Path) -> None:
    flip(run / "checkpoints/step_00000003/optimizer.safetensors")
    train(runs.make_config(world, run, **OPTIONS), resume="auto")
    assert find_damage(run / "checkpoints/step_00000003") is None
    for name in ("lora", "optimizer", "ema"):
        file = f"checkpoints/step_00000003/{name}.safetensors"
        runs.assert_same_tensors(load_file(run / file), load_file(finished / file))
    assert (run / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()


def test_a_damaged_path_stops_the_start(run: Path, world: Path) -> None:
    flip(run / "checkpoints/step_00000003/lora.safetensors")
    before = runs.files_below(run)
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        train(runs.make_config(world, run, **OPTIONS), resume=str(run / "checkpoints/step_00000003"))
    assert runs.files_below(run) == before


def test_nothing_sound_is_no_new_start(run: Path) -> None:
    for folder in checkpoint_folders(run / "checkpoints"):
        flip(folder / "lora.safetensors")
    with pytest.raises(ValueError, match=r"checkpoints: all 3 checkpoints are damaged; nothing to resume from"):
        find_checkpoint("auto", run / "checkpoints")


def test_no_checkpoint_at_the_path(run: Path) -> None:
    (run / "checkpoints/step_00000003/state.json").unlink()
    for path in ("nowhere", str(run / "checkpoints/step_00000003")):
        with pytest.raises(FileNotFoundError, match=r"--resume .*: no complete checkpoint there \(state\.json is missing\)"):
            find_checkpoint(path, run / "checkpoints")


def change_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the state of a checkpoint, and the checksum of its file with it."""
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    sums = json.loads((folder / "checksums.json").read_text())
    (folder / "checksums.json").write_text(json.dumps({**sums, "state.json": file_digest(folder / "state.json")}))


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no step": (lambda state: state.pop("step"), "step is missing"),
    "no optimizer": (lambda state: state.pop("optimizer"), "optimizer is missing"),
    "no average": (lambda state: state.pop("ema_step"), "ema_step is missing"),
    "a text": (lambda state: state.update(step="3"), 'step must be an integer of at least 0, got "3"'),
    "a truth value": (lambda state: state.update(samples_seen=True), "samples_seen must be an integer of at least 0, got true"),
    "a list": (lambda state: state.update(versions=[]), r"versions must be an object, got \[\]"),
    "a negative number": (lambda state: state.update(processes=-1), "processes must be an integer of at least 0, got -1"),
    "a section": (lambda state: state["config"].update(lora=3), "config.lora must be an object, got 3"),
    "another step": (lambda state: state.update(step=2, samples_seen=4), "contradicts the name of its folder: step is 2"),
    "other samples": (lambda state: state.update(samples_seen=7), "contradicts itself: samples_seen is 7 after 3 steps of 2 samples"),
    "a later average": (lambda state: state.update(ema_step=4), "contradicts itself: ema_step is 4 after 3 steps"),
    "an unknown average": (
        lambda state: state.update(ema_step=None),
        "contradicts the folder: ema_step is None, and ema.safetensors is there",
    ),
    "another config": (lambda state: state["config"]["lora"].update(rank=8), "contradicts lora.safetensors: lora.rank was 3 and is now 8"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_state_that_is_not_whole_or_contradicts_the_rest_is_refused(run: Path, kind: str) -> None:
    """Its checksum is right. A path is refused by name, "auto" goes back to the checkpoint before."""
    change, message = CHANGES[kind]
    newest = run / "checkpoints/step_00000003"
    change_state(newest, change)
    with pytest.raises(ValueError, match=rf"--resume .*step_00000003: the checkpoint is damaged: .*state\.json: {message}"):
        find_checkpoint(str(newest), run / "checkpoints")
    assert find_checkpoint("auto", run / "checkpoints") == run / "checkpoints/step_00000002"


LATE_CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "step": (
        lambda state: state.update(step=2, samples_seen=4, ema_step=2),
        r"contradicts optimizer\.safetensors: step is 2, and the .* took 3",
    ),
    "data": (
        lambda state: state["data"].update(samples=5),
        "contradicts itself: its digest is that of this run, but .* had 5 samples, has 9",
    ),
    "rate": (
        lambda state: state["optimizer"].update({"param_groups/0/lr": "fast"}),
        "the optimizer's lr must be of the kind of .*, got 'fast'",
    ),
}


@pytest.mark.parametrize("kind", LATE_CHANGES)
def test_a_state_that_contradicts_the_run_or_the_optimizer_is_refused(run: Path, world: Path, tmp_path: Path, kind: str) -> None:
    """Under a name that says no step."""
    change, message = LATE_CHANGES[kind]
    copy = Path(shutil.copytree(run / "checkpoints/step_00000003", tmp_path / "copy"))
    change_state(copy, change)
    with pytest.raises(ValueError, match=message):
        train(runs.make_config(world, tmp_path / "new", **OPTIONS), resume=str(copy))


# ---- leftovers and rotation


def test_leftovers_of_kills_are_removed_and_a_replaced_checkpoint_comes_back(run: Path) -> None:
    folder = run / "checkpoints"
    for name in (".step_00000004.partial", ".step_00000001.removed", ".step_00000002.replaced"):
        (folder / name).mkdir()
        (folder / name / "lora.safetensors").write_bytes(b"half")
    os.replace(folder / "step_00000003", folder / ".step_00000003.replaced")  # killed before the new one took its place
    clean_up(folder)
    assert names(folder) == ["step_00000001", "step_00000002", "step_00000003"]
    assert all(find_damage(path) is None for path in checkpoint_folders(folder))


@pytest.mark.parametrize(
    ("keep", "milestone", "best", "left"),
    [
        (2, None, None, [5, 6, 9]),
        (2, 3, None, [3, 5, 6, 9]),
        (1, None, 2, [2, 6, 9]),
        (1, 3, 1, [1, 3, 6, 9]),
        (None, 3, 1, [*range(1, 7), 9]),
    ],
)
def test_rotation(tmp_path: Path, keep: int | None, milestone: int | None, best: int | None, left: list[int]) -> None:
    """At step 6; what a run has left beyond it stays."""
    for step in (1, 2, 3, 4, 5, 6, 9):
        (tmp_path / f"step_{step:08d}").mkdir()
    asked = []
    rotate(tmp_path, 6, keep, milestone, lambda steps: asked.append(steps) or best)
    assert asked == ([] if keep is None else [[1, 2, 3, 4, 5, 6]])
    found = [int(path.name.removeprefix("step_")) for path in checkpoint_folders(tmp_path)]
    assert found == left
    assert len(names(tmp_path)) == len(found)


def test_the_best_checkpoint_stays(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.1, 0.2, 0.7, 0.3, 0.4, 0.6, 0.1])
    monkeypatch.setattr(training, "validate", lambda *_: AttentionAccuracy(next(accuracies), 0.9, 0.1, 0.1, 3))
    options = {"training__checkpoint_every": 1, "training__keep_checkpoints": 1, "validation__every": 1, "training__max_steps": 6}
    train(runs.make_config(world, tmp_path / "run", **options))
    assert names(tmp_path / "run/checkpoints") == ["step_00000002", "step_00000006"]


# ---- disk, folder, lock


@pytest.fixture
def file_size_limit(run: Path) -> Iterator[None]:
    """Files larger than 40 kB fail half way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("file_size_limit")
def test_a_disk_that_fills_up_half_way(run: Path, world: Path) -> None:
    before = runs.files_below(run / "checkpoints")
    with pytest.raises(
        OSError, match=r"step_00000004: the checkpoint cannot be written \(.*File too large.*Earlier checkpoints are as they were"
    ):
        train(runs.make_config(world, run, **OPTIONS, training__max_steps=9), resume="auto")
    assert runs.files_below(run / "checkpoints") == before


def test_no_space_left(run: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = runs.files_below(run / "checkpoints")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"step_00000004: .*no space left: \d+ MiB are needed, 0 MiB are free.*continue with --resume auto"):
        train(runs.make_config(world, run, **OPTIONS, training__max_steps=9), resume="auto")
    assert runs.files_below(run / "checkpoints") == before
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    train(runs.make_config(world, run, **OPTIONS, training__max_steps=4), resume="auto")
    assert find_damage(run / "checkpoints/step_00000004") is None


def test_a_read_only_folder(run: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access, before = os.access, runs.files_below(run)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != run and access(path, mode))  # root may write anywhere
    with pytest.raises(ValueError, match=r"training\.output_dir: must be a folder that can be written to, but .*run cannot"):
        train(runs.make_config(world, run, **OPTIONS, training__max_steps=4), resume="auto")
    assert runs.files_below(run) == before


def test_a_checkpoint_folder_that_cannot_be_written(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is a file is found at once; one that turns into it, where the first checkpoint is written."""
    (tmp_path / "run").mkdir()
    place = tmp_path / "run/checkpoints"
    place.write_text("a file")
    config = runs.make_config(world, tmp_path / "run", training__max_steps=1)
    with pytest.raises(ValueError, match="training.output_dir: must be a folder, but .*checkpoints is a file"):
        train(config)
    place.unlink()
    start = Trainer._start_log
    monkeypatch.setattr(Trainer, "_start_log", lambda self: (start(self), place.write_text("a file")))
    with pytest.raises(OSError, match="step_00000001: the checkpoint cannot be written"):
        train(config)


def hold(folder: Path) -> None:
    lock = FolderLock(folder, "training.output_dir")
    lock.acquire()
    print("held", flush=True)
    time.sleep(600)


def test_two_runs_in_one_folder(run: Path, world: Path, tmp_path: Path) -> None:
    (other,) = forks.start_ranks(hold, run, output=tmp_path / "log", processes=1)
    while not (tmp_path / "log").exists() or (tmp_path / "log").read_text() != "held\n":
        assert other.exitcode is None
        time.sleep(0.01)
    before = runs.files_below(run)
    with pytest.raises(ValueError, match=rf"training\.output_dir: .*run is in use by another run \(host .*, process {other.pid}\)"):
        train(runs.make_config(world, run, **OPTIONS, training__max_steps=4), resume="auto")
    assert runs.files_below(run) == before
    other.kill()
    other.join()
    with FolderLock(run, "training.output_dir") as lock:  # a kill gives it back
        lock.acquire()
        assert f"process {os.getpid()}" in (run / ".lock").read_text()


# ---- another config


def test_a_changed_config_is_refused_with_all_differences(run: Path, world: Path) -> None:
    before = runs.files_below(run / "checkpoints")
    changes = {"optimizer__learning_rate": 0.5, "loss__disentanglement_weight": 0.1, "training__batch_size": 3, "lora__rank": 2}
    config = runs.make_config(world, run, **OPTIONS | changes, lora__pretrained=None)
    with pytest.raises(ValueError, match="is a checkpoint of another config") as caught:
        train(config, resume="auto")
    for part in (
        "lora.rank was 3, is 2;",
        "loss.disentanglement_weight was 0.6, is 0.1;",
        "optimizer.learning_rate was 0.01, is 0.5;",
        "processes was 2, is 3.",
        "lora.pretrained=",
    ):
        assert part in str(caught.value)
    assert str(caught.value).count(" was ") == 4
    assert runs.files_below(run / "checkpoints") == before


def test_length_logging_and_paths_may_change(run: Path, world: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 4, "log_every": 2, "checkpoint_every": 3, "keep_checkpoints": 9, "milestone_every": 2, "non_finite": "skip"}
    config = runs.make_config(
        world,
        tmp_path / "other",
        **OPTIONS | {f"training__{name}": value for name, value in changes.items()},
        lora__pretrained=None,
        validation__num_cases=1,
        model__gradient_checkpointing="block",
    )
    train(config, resume=str(run / "checkpoints/step_00000003"))
    assert names(tmp_path / "other/checkpoints") == ["step_00000003", "step_00000004"]  # also the one that it started from


def test_other_data_are_refused(run: Path, world: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.split was \"train\", is \"heldout\"; the data set had 9 samples, has 4"):
        train(runs.make_config(world, run, **OPTIONS, data__split="heldout"), resume="auto")


@pytest.mark.parametrize("column", ["id", "prompt"])
def test_other_data_of_equal_shape_are_refused(run: Path, world: Path, tmp_path: Path, column: str) -> None:
    """Same sizes, same numbers of references, one text of another sample; moved data are the same data."""
    data = Path(shutil.copytree(world / "data", tmp_path / "data"))
    config = runs.make_config(world, run, **OPTIONS, data__root=str(data))
    train(config, resume="auto")
    AcceleratorState._reset_state(reset_partial_state=True)
    table = pq.read_table(data / "manifest.parquet")
    texts = table[column].to_pylist()
    number = table["split"].to_pylist().index("train") + 3
    changed = [*texts[:number], "other", *texts[number + 1 :]]
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(changed)), data / "manifest.parquet")
    with pytest.raises(ValueError, match="the data set has other ids, prompts, sizes or another order of its 9 samples"):
        train(config, resume="auto")


def test_the_adapter_of_the_start_need_not_be_there_any_more(run: Path, finished: Path, world: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints/step_00000003")
    train(runs.make_config(world, run, **OPTIONS, lora__pretrained=str(tmp_path / "gone.safetensors")), resume="auto")
    runs.assert_same_tensors(load_file(run / "lora.safetensors"), load_file(finished / "lora.safetensors"))


# ---- an earlier checkpoint, by its path


def test_checkpoints_of_the_branch_that_is_left_are_set_aside(
    run: Path, finished: Path, world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run / "checkpoints"
    before = (run / "metrics.jsonl").read_text()
    config = runs.make_config(world, run, **OPTIONS, training__max_steps=2)
    train(config, resume=str(folder / "step_00000001"))
    assert names(folder) == ["set_aside_1", "step_00000001", "step_00000002"]
    assert names(folder / "set_aside_1") == ["metrics.jsonl", "step_00000002", "step_00000003", "throughput.jsonl"]
    assert (folder / "set_aside_1/metrics.jsonl").read_text() == before
    assert "2 checkpoints are of a branch that is left for" in caplog.text
    assert find_checkpoint("auto", folder) == folder / "step_00000002"
    assert find_damage(folder / "set_aside_1/step_00000003") is None
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config, resume=str(folder / "step_00000002"))  # nothing is later
    assert names(folder) == ["set_aside_1", "step_00000001", "step_00000002"]
    AcceleratorState._reset_state(reset_partial_state=True)
    train(runs.make_config(world, run, **OPTIONS), resume=str(folder / "step_00000001"))
    assert names(folder / "set_aside_2") == ["metrics.jsonl", "step_00000002", "throughput.jsonl"]
    runs.assert_same_tensors(load_file(run / "lora.safetensors"), load_file(finished / "lora.safetensors"))


def test_a_checkpoint_from_elsewhere_becomes_the_runs_own(run: Path, finished: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else, so that a stop at once, or a kill, is continued from it and not from what was there."""
    folder = run / "checkpoints"
    os.replace(folder / "step_00000002", run / "step_00000002")
    config = runs.make_config(world, run, **OPTIONS)
    start = Trainer._start_log
    monkeypatch.setattr(Trainer, "_start_log", lambda self: (start(self), os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(TrainingStopped, match="step_00000002"):
        train(config, resume=str(run / "step_00000002"))
    assert names(folder) == ["set_aside_1", "step_00000002"]
    assert names(folder / "set_aside_1") == ["metrics.jsonl", "step_00000001", "step_00000003", "throughput.jsonl"]
    for name in ("lora", "ema", "optimizer"):
        found = load_file(folder / f"step_00000002/{name}.safetensors")
        runs.assert_same_tensors(found, load_file(finished / f"checkpoints/step_00000002/{name}.safetensors"))
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config, resume="auto")
    runs.assert_same_tensors(load_file(run / "lora.safetensors"), load_file(finished / "lora.safetensors"))


def test_a_checkpoint_that_knows_no_texts_is_compared_by_the_rest(run: Path, world: Path) -> None:
    """As they were written before texts were compared."""
    folder = run / "checkpoints/step_00000003"
    change_state(folder, lambda state: (state["data"].pop("texts"), state.update(digest="other")))
    train(runs.make_config(world, run, **OPTIONS), resume="auto")


def test_a_refused_path_moves_nothing(run: Path, world: Path) -> None:
    before = runs.files_below(run / "checkpoints")
    with pytest.raises(ValueError, match="is a checkpoint of another config"):
        train(runs.make_config(world, run, **OPTIONS, training__seed=7), resume=str(run / "checkpoints/step_00000001"))
    assert runs.files_below(run / "checkpoints") == before


def test_the_best_is_looked_for_where_both_meet(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"training__checkpoint_every": 4, "validation__every": 6}
    starting.warn_of_best(runs.make_config(world, tmp_path, **options))
    assert "the best checkpoint is looked for every 12 steps only" in caplog.text
    caplog.clear()
    for changes in ({"validation__every": 8}, {"validation__every": 2}, {"training__best_metric": None}, {"validation__every": None}):
        starting.warn_of_best(runs.make_config(world, tmp_path, **options | changes))
    assert caplog.text == ""


def test_other_versions_are_told(run: Path, world: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(runs.make_config(world, run, **OPTIONS))
    trainer.run = {**trainer.run, "versions": trainer.run["versions"] | {"torch": "9.9"}}
    trainer.resume(run / "checkpoints/step_00000003")
    assert "was written with other versions of torch" in caplog.text
