"""Two processes: what one does alone or fails in, the other hears of at once; what all must have alike is compared."""

import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from mosaic.training import trainer as training
from mosaic.training.distributed import comparison, sharding, waiting
from mosaic.training.distributed.comparison import check_adapter, fingerprint
from mosaic.training.distributed.waiting import FAILED, failing_together, gather_words, in_step, main_alone, read_together
from mosaic.training.updates import Updates
from scripts.train import main as train_main
from tests import forks
from tests.training.test_processes import write_config

LONG, SHORT = 30.0, 0.5  # seconds: what nobody may wait for, and what somebody has to


def both(folder: Path, limit: float, *scenes: Callable[[int], Any]) -> list[list[dict[str, Any]]]:
    """What each of two processes gets of each scene, [scene][process]: its result or its error, and the seconds it took."""
    log = folder / "log"
    codes = forks.wait(forks.start_ranks(play, folder, limit, *scenes, output=log, processes=2), 100)
    assert codes == [0, 0], log.read_text()[-3000:]
    return [list(pair) for pair in zip(*(json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)), strict=True)]


def play(folder: Path, limit: float, *scenes: Callable[[int], Any]) -> None:
    """One process."""
    seconds = timedelta(seconds=limit)
    waiting.STEP_LIMIT = waiting.LOADING_LIMIT = waiting.WORK_LIMIT = comparison.LOADING_LIMIT = seconds
    waiting.AGREE_LIMIT, waiting.LINGER_SECONDS = seconds / 2, 0.0
    state = PartialState(cpu=True, timeout=timedelta(seconds=LONG))  # a busy machine may start one process seconds after the other
    state.wait_for_everyone()
    dist.distributed_c10d._set_pg_timeout(seconds, dist.group.WORLD)
    records = []
    for scene in scenes:
        begin, found = time.monotonic(), dict[str, Any]()
        try:
            with failing_together():
                found["result"] = scene(state.process_index)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
        records.append({**found, "seconds": time.monotonic() - begin})
        if scene is not scenes[-1]:  # it has left the processes in step; the next one begins without its failure
            state.wait_for_everyone()
            waiting._store().delete_key(waiting.FAILED)
            state.wait_for_everyone()
    (folder / f"{state.process_index}.json").write_text(json.dumps(records))
    os._exit(0)  # without waiting for the other one


def works(rank: int) -> list[Any]:
    def work() -> str:
        assert rank == 0
        time.sleep(0.1)
        return "done"

    return [main_alone(work), gather_words(f"I am {rank}", timedelta(seconds=LONG))]


def breaks(_: int) -> None:
    def work() -> None:
        time.sleep(0.1)
        raise OSError("the disk\nis full")

    main_alone(work)


def passes(rank: int, failing: int | None = None, within: bool = False) -> str:
    """Places to agree at, each with an operation; process `failing` fails before such a place, or where the others begin an operation."""
    with in_step() as agree:
        for turn in range(3):
            if turn == 1 and rank == failing and not within:
                raise ValueError("a picture cannot be read")
            agree(False)
            if turn == 1 and rank == failing:
                raise ValueError("no memory is left")
            dist.all_reduce(torch.ones(1))
        found = "yes" if agree(rank == 1) else "no"
    return found


def reads(rank: int) -> None:
    def steps() -> Iterator[int]:
        yield from (1, 2)
        if rank == 1:
            raise ValueError("manifest row 7 is damaged")
        yield 3

    seen = []
    try:
        for step in read_together(steps()):
            seen.append(step)
    finally:
        assert seen == [1, 2]


def compares(rank: int) -> None:
    weights = [torch.ones(3), torch.ones(2, 2)]
    check_adapter(weights, 7)
    weights[1][1, 1] += 1e-6 * rank
    check_adapter(weights, 8)


def averages(rank: int) -> list[int]:
    """Bit for bit what one operation per tensor gives, in fewer operations."""
    generator = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(shape, generator=generator) for shape in [(3, 5), (2,), (), (7, 2, 2), (40,), (1,)]]
    expected = [tensor.clone() for tensor in tensors]
    for tensor in expected:
        dist.all_reduce(tensor)
        tensor /= 2
    calls, reduce = [], dist.all_reduce

    def spy(tensor: Tensor) -> None:
        calls.append(tensor.numel())
        reduce(tensor)

    sharding.BUCKET_BYTES, dist.all_reduce = 100, spy
    try:
        sharding.average(tensors)
    finally:
        dist.all_reduce = reduce
    assert all(torch.equal(tensor, own) for tensor, own in zip(tensors, expected, strict=True))
    return calls


def test_what_leaves_all_in_step(tmp_path: Path) -> None:
    scenes = [works, breaks, partial(passes, failing=0), partial(passes, failing=1), passes, reads, compares, averages]
    worked, broken, *failed, passed, read, compared, averaged = both(tmp_path, LONG, *scenes)
    assert [found["result"] for found in worked] == [["done", ["I am 0", "I am 1"]]] * 2
    errors = ["OSError: the disk\nis full", "ProcessFailed: process 0 of 2 has failed: the disk is full"]
    assert [found["error"] for found in broken] == errors
    for rank, found in enumerate(failed):
        assert found[rank]["error"] == "ValueError: a picture cannot be read"
        assert found[1 - rank]["error"] == f"FailedElsewhere: process {rank}: a picture cannot be read"
    assert [found["result"] for found in passed] == ["yes", "yes"]
    errors = ["ProcessFailed: process 1 has failed: manifest row 7 is damaged", "ValueError: manifest row 7 is damaged"]
    assert [found["error"] for found in read] == errors
    for found in compared:
        assert found["error"].startswith(
            "ProcessesDiffer: the adapter's weights at step 8 must be the same in all processes, but their finger"
        )
        assert "process 1: " in found["error"]
    assert [found["result"] for found in averaged] == [[18, 28, 40, 1]] * 2
    for found in [*broken, *failed[0], *failed[1], *read, *compared]:
        assert found["seconds"] < LONG / 3  # nobody has waited for a limit


def test_a_process_that_says_its_word_and_then_fails_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it does both between two looks of this one."""

    class Store:
        said = False

        def check(self, keys: list[str]) -> bool:
            self.said, said = self.said or keys != [FAILED], self.said
            return said

        def multi_get(self, keys: list[str]) -> list[bytes]:
            return [key.encode() for key in keys]

    store = Store()
    monkeypatch.setattr(waiting, "_store", lambda: store)
    assert waiting._read({0: "a", 1: "b"}, timedelta(seconds=LONG)) == ["a", "b"]


def is_silent(rank: int) -> None:
    if rank == 0:
        gather_words("", timedelta(seconds=SHORT))
    time.sleep(2.5 * SHORT)


def hangs(rank: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    time.sleep(2.5 * SHORT)


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (is_silent, "ProcessFailed: process 1 of 2 has not answered for 0:00:00.5"),
        (hangs, "ProcessFailed: another process has ended, or has not answered within 0:00:00.500000; its own message says why"),
    ],
)
def test_who_does_not_answer_is_not_waited_for_longer_than_the_limit(tmp_path: Path, scene: Callable[[int], Any], message: str) -> None:
    ((first, _),) = both(tmp_path, SHORT, scene)
    assert first["error"].startswith(message)
    assert SHORT <= first["seconds"] < LONG / 3


def test_a_failure_within_an_operation_ends_all_with_its_reason(tmp_path: Path) -> None:
    ((first, second),) = both(tmp_path, 4 * SHORT, partial(passes, failing=1, within=True))
    reason = "ProcessFailed: process 1: no memory is left, where others need it to go on"
    assert second["error"].startswith(reason)
    assert first["error"].startswith(reason)
    assert max(first["seconds"], second["seconds"]) < LONG / 2


def test_a_fingerprint_sees_values_places_order_and_sizes() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)
    whole = fingerprint([a, b])
    assert whole == fingerprint([a.clone(), b.clone()])
    changed = a.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = [[changed, b], [b, a], [a.flip(0), b], [a], [a, b[:3]], [a, -b]]
    assert len({whole, *map(fingerprint, others)}) == 1 + len(others)
    long = torch.zeros(5000)
    empty = fingerprint([long], most=100)
    long[51] = 1
    assert fingerprint([long], most=100) == empty
    long[50] = 1  # one of those that are looked at
    assert fingerprint([long], most=100) != empty


def lead_astray(config: str, what: str) -> int:
    """A run of two processes in which the second one is not as the first."""
    if os.environ["RANK"] == "1":
        load_base, load, apply = training.load_base, training.batches_from, Updates.apply

        def other_base(*arguments: Any) -> Any:
            pipeline = load_base(*arguments)
            pipeline.transformer.norm_out.linear.bias.data.add_(1)
            return pipeline

        def damaged_data(*arguments: Any) -> Any:
            yield next(load(*arguments))
            raise OSError("sample 3 is damaged")

        def drifting(self: Updates, finite: Tensor) -> None:
            apply(self, finite)
            with torch.no_grad():
                next(iter(self.parameters.values())).add_(1e-6)

        if what == "base":
            training.load_base = other_base
        elif what == "adapter":
            Updates.apply = drifting
        else:
            training.batches_from = damaged_data
    return train_main([config])


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("base", "the base model's weights must be the same in all processes", "the base model's weights must be the same"),
        (
            "adapter",
            "the adapter's weights at step 2 must be the same in all processes",
            "the adapter's weights at step 2 must be the same",
        ),
        ("data", "process 1 has failed: sample 3 is damaged", "error: process 1: sample 3 is damaged"),
    ],
)
def test_a_run_ends_on_all_processes_with_the_reason(world: Path, tmp_path: Path, what: str, first: str, second: str) -> None:
    config, printed = write_config(world, tmp_path / "config.json", "run", checkpoint_every=2), tmp_path / "printed"
    codes = forks.wait(forks.start_ranks(lead_astray, config, what, output=printed, processes=2), 60)
    assert codes == [2, 2], printed.read_text()[-3000:]
    errors = [line for line in printed.read_text().splitlines() if "error: " in line]
    assert len(errors) == 2
    assert any(first in line for line in errors)
    assert any(second in line for line in errors)
    kept = [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")]
    assert kept == (["step_00000001"] if what == "data" else [])  # the steps before; none of processes that differ
