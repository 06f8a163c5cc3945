"""The spine: rounds, chunks, decisions. Stages are stand-ins whose rows are functions of the candidate's number."""

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from mosaic.config.schema import Section
from preprocess.construct.candidates import Candidate, picture_name
from preprocess.construct.chunks import Chunks
from preprocess.construct.config import ConstructConfig
from preprocess.construct.rounds import Rounds, provenance
from preprocess.construct.rows import PromptRow, Row, SegmentationRow, Subject, SynthesisRow
from preprocess.construct.stage import Stage

SUBJECTS = (Subject(phrase="a cat", name="cat", kind="animal"),)


class Limits(Section):
    path: ClassVar[str] = "synthesis.limits"
    most: int = 100


class Settings(Section):
    path: ClassVar[str] = "synthesis"
    factor: float = 1.0
    limits: Limits = Limits()


class Stop(Exception):
    """Stands for a kill."""


@dataclass
class Calls:
    """What the workers did, and when one shall be killed."""

    numbers: dict[str, list[int]] = field(default_factory=lambda: {"prompts": [], "synthesis": [], "segmentation": []})
    stop_after: int | None = None

    def note(self, stage: str, number: int) -> None:
        if self.stop_after is not None and sum(map(len, self.numbers.values())) >= self.stop_after:
            raise Stop
        self.numbers[stage].append(number)


class StandIn:
    """A worker that writes a file and a row per candidate."""

    def __init__(self, name: str, calls: Calls, settings: Settings, duplicates: bool) -> None:
        self.name, self.calls, self.settings, self.duplicates = name, calls, settings, duplicates
        self.provenance = {"model": name}

    def __call__(self, candidates: Sequence[Candidate], folder: Path) -> Iterator[Row]:
        for candidate in candidates:
            number = candidate.number
            (folder / picture_name(number)).write_text(f"{self.name} {number}")
            self.calls.note(self.name, number)
            if self.name == "prompts":
                words = number % 10 if self.duplicates else number
                yield PromptRow(number=number, prompt=f"A cat, {words}.", caption="a cat", subjects=SUBJECTS, seed=number)
            elif self.name == "synthesis":
                scores = {"value": self.settings.factor * (number * 7 % 10)}
                yield SynthesisRow(number=number, seed=0, height=1, width=1, scores=scores)
            else:
                assert candidate.synthesis is not None
                assert (candidate.folders["synthesis"] / picture_name(number)).read_text() == f"synthesis {number}"
                yield SegmentationRow(number=number, subjects=(None,))


def stages_of(calls: Calls, most: int = 4, factor: float = 1.0, inputs: Any = None, duplicates: bool = False) -> list[Stage]:
    settings = Settings(factor=factor, limits={"most": most})

    def stage(name: str, row: type[Row], reasons: Any) -> Stage:
        return Stage(name, row, settings, lambda device: StandIn(name, calls, settings, duplicates), reasons, lambda candidate: inputs)

    def too_much(candidate: Candidate) -> list[str]:
        assert candidate.synthesis is not None
        return ["most"] if candidate.synthesis.scores["value"] > most else []

    rows = {"prompts": PromptRow, "synthesis": SynthesisRow, "segmentation": SegmentationRow}
    return [stage(name, row, too_much if name == "synthesis" else lambda candidate: []) for name, row in rows.items()]


class Alone(SimpleNamespace):
    """One process of several, that waits for nobody."""

    def wait_for_everyone(self) -> None:
        pass


def rounds_of(work: Path, stages: list[Stage], num_samples: int = 20, process: int = 0, processes: int = 1, **settings: Any) -> Rounds:
    state = Alone(process_index=process, num_processes=processes, is_main_process=process == 0)
    config = ConstructConfig(num_samples=num_samples, chunk_size=4, **settings)
    return Rounds(config, stages, work, torch.device("cpu"), state)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def passing(rounds: Rounds) -> list[int]:
    return [candidate.number for candidate in rounds.decisions.passing(rounds.chunks, rounds.count)]


def test_candidates_that_pass_go_through_all_stages_and_no_others(tmp_path: Path) -> None:
    calls = Calls()
    rounds = rounds_of(tmp_path, stages_of(calls))
    assert rounds.run(rounds.stages) >= 20
    wanted = [number for number in range(rounds.count * 4) if number * 7 % 10 <= 4]
    assert passing(rounds) == wanted == calls.numbers["segmentation"]
    assert calls.numbers["prompts"] == calls.numbers["synthesis"] == list(range(rounds.count * 4))
    assert rounds.count * 4 < 2.5 * 20, "rounds follow the yield"


def test_kills_do_not_show(tmp_path: Path) -> None:
    whole = rounds_of(tmp_path / "whole", stages_of(Calls()))
    whole.run(whole.stages)
    for start in range(0, 200, 3):
        calls = Calls(stop_after=11 + start)
        rounds = rounds_of(tmp_path / "killed", stages_of(calls))
        try:
            rounds.run(rounds.stages)
            break
        except Stop:
            for name in ("prompts", "synthesis", "segmentation"):
                rounds.chunks.recover(name)
    assert start > 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert passing(rounds) == passing(whole)


def test_processes_do_not_show(tmp_path: Path) -> None:
    whole = rounds_of(tmp_path / "whole", stages_of(Calls()), num_samples=12)
    whole.run(whole.stages)
    barrier = threading.Barrier(2)

    def one(process: int) -> int:
        rounds = rounds_of(tmp_path / "shared", stages_of(Calls()), num_samples=12, process=process, processes=2)
        rounds.state.wait_for_everyone = barrier.wait  # type: ignore[method-assign]
        return rounds.run(rounds.stages)

    with ThreadPoolExecutor(2) as pool:
        counted = [future.result(timeout=30) for future in [pool.submit(one, 0), pool.submit(one, 1)]]
    assert counted[0] == counted[1] >= 12
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")


def test_other_limits_compute_only_what_is_missing(tmp_path: Path) -> None:
    first = rounds_of(tmp_path, stages_of(Calls(), most=4), num_samples=8)
    first.run(first.stages)
    before = contents(tmp_path)
    calls = Calls()
    laxer = rounds_of(tmp_path, stages_of(calls, most=6), num_samples=8)
    laxer.run(laxer.stages)
    missing = [number for number in range(first.count * 4) if 4 < number * 7 % 10 <= 6][: len(calls.numbers["segmentation"])]
    assert calls.numbers == {"prompts": [], "synthesis": [], "segmentation": missing}
    assert missing
    after = contents(tmp_path)
    assert all(after[path] == text for path, text in before.items() if not path.endswith("rows.jsonl"))
    stricter = rounds_of(tmp_path, stages_of(calls := Calls(), most=2), num_samples=3)
    stricter.run(stricter.stages)
    assert passing(stricter)[:3] == [n for n in range(40) if n * 7 % 10 <= 2][:3]
    assert not any(calls.numbers.values())


def test_rows_of_other_inputs_are_computed_again(tmp_path: Path) -> None:
    first = rounds_of(tmp_path, stages_of(Calls(), inputs=[1]), num_samples=4)
    first.run(first.stages)
    again = rounds_of(tmp_path, stages_of(calls := Calls(), inputs=(2,)), num_samples=4)
    again.run(again.stages)
    assert calls.numbers["segmentation"] == passing(first)
    same = rounds_of(tmp_path, stages_of(calls := Calls(), inputs=(2,)), num_samples=4)
    same.run(same.stages)
    assert not any(calls.numbers.values())


@pytest.mark.parametrize("change", [{"seed": 1}, {"dtype": "float32"}])
def test_other_settings_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    first = rounds_of(tmp_path, stages_of(Calls()), num_samples=4)
    first.run(first.stages)
    other = rounds_of(tmp_path, stages_of(Calls()), num_samples=40, **change)
    with pytest.raises(ValueError, match=f"other settings: {next(iter(change))} was"):
        other.run(other.stages)
    factor = rounds_of(tmp_path, stages_of(Calls(), factor=2.0), num_samples=40)
    with pytest.raises(ValueError, match=r"settings\.factor was 1\.0 and is now 2\.0"):
        factor.run(factor.stages)
    assert "limits" not in json.dumps(provenance(tmp_path, first.stages))


def test_prompts_that_were_there_before_are_dropped_whatever_their_case(tmp_path: Path) -> None:
    rounds = rounds_of(tmp_path, stages_of(Calls(), most=100, duplicates=True), num_samples=8)
    rounds.run(rounds.stages)
    assert passing(rounds) == list(range(8))
    more = rounds_of(tmp_path, stages_of(Calls(), most=100, duplicates=True), num_samples=11, max_candidates=4)
    assert more.run(more.stages) == 10
    assert more.count * 4 == 44, "it ends where max_candidates says"
    dropped = more.decisions.dropped(next(c for c in more.chunks.candidates(more.stages, 2) if c.number == 10))
    assert dropped == ("prompts", ["duplicate"])
    twice = rounds_of(
        tmp_path, stages_of(Calls(), most=100, duplicates=True), num_samples=21, max_candidates=2, prompts={"limits": {"max_uses": 2}}
    )
    twice.run(twice.stages)
    assert passing(twice) == list(range(20))


def test_stages_can_be_run_one_by_one(tmp_path: Path) -> None:
    stages = stages_of(calls := Calls())
    with pytest.raises(FileNotFoundError, match="Run the stage prompts first"):
        rounds_of(tmp_path, stages, num_samples=8).run(stages[1:])
    for last in (1, 2, 3):
        rounds = rounds_of(tmp_path, stages[:last], num_samples=8)
        rounds.run(stages[last - 1 : last])
    assert calls.numbers["prompts"] == calls.numbers["synthesis"] == list(range(8)), "later stages take what is there"
    assert passing(rounds) == calls.numbers["segmentation"] == [n for n in range(8) if n * 7 % 10 <= 4]


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    rounds = rounds_of(tmp_path, stages_of(Calls()), num_samples=4)
    rounds.run(rounds.stages)
    path = Chunks(tmp_path, 4).folder("synthesis", 0) / "rows.jsonl"
    path.write_text(path.read_text().replace('"height": 1', '"height": "tall"', 1))
    again = rounds_of(tmp_path, stages_of(Calls()), num_samples=4)
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 1 is no row"):
        again.run(again.stages)
