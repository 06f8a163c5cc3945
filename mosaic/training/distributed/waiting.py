"""Waiting for other processes: minutes for what all do in step, hours for what one does alone, and not at all for one that has failed.

Operations on tensors (gradients, losses, flags) are in step, and have `STEP_LIMIT`. Where one process looks over data, validates or writes,
the others wait here, for words in the store by which the processes have met, so that they hear of a failure at once, and by its reason.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from mosaic.files import in_one_line

STEP_LIMIT = timedelta(minutes=10)  # for processes to meet, and for an operation that all take part in
LOADING_LIMIT = timedelta(hours=1)  # for the models and checkpoints of all to be read
WORK_LIMIT = timedelta(hours=6)  # for what the main process does alone
AGREE_LIMIT = timedelta(minutes=2)  # for a process that has failed to hear that it is not out of step
LINGER_SECONDS = 1.0  # that the process with the store stays after a failure, so that the others can read why
POLL_SECONDS = (0.002, 0.5)  # between two looks: first, and at most
FAILED = "mosaic/failed"

Result = TypeVar("Result")
Step = TypeVar("Step")
_gloo: Any = None
_turns = itertools.count()  # all processes wait for the same things in the same order


class ProcessFailed(OSError):
    """Another process of the run has failed, or does not answer."""


def main_alone(work: Callable[[], Result]) -> Result:
    """Do something on the main process, for which the others wait up to `WORK_LIMIT`; to be called on all.

    Args:
        work: Gives something that JSON can hold.

    Returns:
        What it has given, on all processes.

    Raises:
        ProcessFailed: On the others, where it has failed, by its reason.
    """
    state = PartialState()
    if state.num_processes == 1:
        return work()
    key = f"mosaic/{next(_turns)}/main"
    if state.is_main_process:
        with failing_together():
            result = work()
            _store().set(key, json.dumps(result))
    else:
        result = json.loads(_read({0: key}, WORK_LIMIT)[0])
    state.wait_for_everyone()  # the main process may end now, and the store with it
    return result


def gather_words(word: str, limit: timedelta) -> list[str]:
    """What each process says, by its number; each waits for all others, or for one that has failed.

    Raises:
        ProcessFailed: One has failed, or is silent for longer than `limit`.
    """
    state = PartialState()
    if state.num_processes == 1:
        return [word]
    turn = next(_turns)
    keys = {rank: f"mosaic/{turn}/{rank}" for rank in range(state.num_processes)}
    with _translated():
        _store().set(keys[state.process_index], word)
    return _read(keys, limit)


def on_any_process(*values: bool) -> list[bool]:
    """Whether each is true on any process; all get the same answers. To be called on all, at every step: no device takes part in it."""
    if PartialState().num_processes == 1:
        return list(values)
    counts = torch.tensor([float(value) for value in values])
    dist.all_reduce(counts, group=_host_group())
    return (counts > 0).tolist()


def _host_group() -> Any:
    """A group whose messages are in host memory: the default one where its backend takes that, else one of gloo, made once."""
    global _gloo
    if "cpu:" in dist.get_backend_config():
        return None
    _gloo = _gloo or dist.new_group(backend="gloo", timeout=STEP_LIMIT)
    return _gloo


def read_together(steps: Iterator[Step]) -> Iterator[Step]:
    """Hand on what a loader gives; where one process cannot read its data, none begins the step that needs them.

    Args:
        steps: As many on all processes.

    Raises:
        ProcessFailed: Another process cannot read its data, by its reason; on that one its own error.
    """
    while True:
        step, error = None, None
        try:
            step = next(steps)
        except StopIteration:
            return
        except Exception as failure:
            error = failure
        if on_any_process(error is not None)[0]:
            said = gather_words(in_one_line(error) if error else "", AGREE_LIMIT)
            raise error or ProcessFailed(next(f"process {rank} has failed: {word}" for rank, word in enumerate(said) if word))
        assert step is not None  # there was no error
        yield step


class FailedElsewhere(Exception):
    """Another process has left what all do in step; so do all, at the same place."""


@contextlib.contextmanager
def in_step() -> Iterator[Callable[[bool], bool]]:
    """Context of work in which processes need one another all the time, and that all leave together, also by an error of one.

    Yields:
        A function, to be called on all at the same places: whether the answer is yes on any process.

    Raises:
        FailedElsewhere: Another process has failed between two such places; it raises its own error.
        ProcessFailed: An error of this process, which has left the others within an operation; or it no longer answers.
    """
    agreed = False

    def agree(answer: bool) -> bool:
        nonlocal agreed
        said = gather_words("yes" if answer else "no", STEP_LIMIT)
        failures = [word for word in said if word not in ("yes", "no")]
        if failures:
            agreed = True
            raise FailedElsewhere(failures[0])
        return "yes" in said

    try:
        with _translated():
            yield agree
            agree(False)
    except ProcessFailed:
        raise
    except Exception as error:
        if not agreed:
            reason = f"process {PartialState().process_index}: {in_one_line(error)}"
            try:
                gather_words(reason, AGREE_LIMIT)
            except ProcessFailed as silence:
                raise ProcessFailed(f"{reason}, where others need it to go on ({silence})") from error
        raise


def _read(keys: dict[int, str], limit: timedelta) -> list[str]:
    """The words of some processes, by process and key, once all are there."""
    store, pause, end = _store(), POLL_SECONDS[0], time.monotonic() + limit.total_seconds()
    with _translated():
        while True:
            failed = store.check([FAILED])  # before the words: who says its word and then fails is heard
            if store.check(list(keys.values())):
                break
            if failed:
                raise ProcessFailed(store.get(FAILED).decode())
            if time.monotonic() > end:
                silent = ", ".join(str(rank) for rank, key in keys.items() if not store.check([key]))
                raise ProcessFailed(f"process {silent} of {dist.get_world_size()} has not answered for {limit}.")
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS[1])
        return [word.decode() for word in store.multi_get(list(keys.values()))]


@contextlib.contextmanager
def failing_together(*but: type[Exception]) -> Iterator[None]:
    """Context in which an error of this process is told to those that wait for it, and the reason of another one to the user.

    Args:
        but: Errors that all processes get at the same place.

    Raises:
        ProcessFailed: In the place of an error that comes of another process's end.
    """
    try:
        with _translated():
            yield
    except but:
        raise
    except Exception as error:
        _tell(error)
        raise


def _tell(error: Exception) -> None:
    """Say for all to read why this process ends; the first one counts."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    rank, known = dist.get_rank(), isinstance(error, ProcessFailed)
    reason = str(error) if known else f"process {rank} of {dist.get_world_size()} has failed: {in_one_line(error)}"
    with contextlib.suppress(dist.DistError):
        _store().compare_set(FAILED, "", reason)
    if rank == 0:
        time.sleep(LINGER_SECONDS)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Context in which errors of torch.distributed, which name sockets, become one that says what has happened."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = f"another process has ended, or has not answered within {STEP_LIMIT}; its own message says why"
        with contextlib.suppress(dist.DistError, ValueError):  # the store, or the group, may be gone as well
            if _store().check([FAILED]):
                reason = _store().get(FAILED).decode()
        raise ProcessFailed(f"{reason} ({in_one_line(error)[:200]})") from error


def _store() -> Any:
    """The store by which the processes have met."""
    return dist.distributed_c10d._get_default_store()
