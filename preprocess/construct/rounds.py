"""The way from numbers to candidates that pass: round after round, each stage over all chunks of the round, each process its own chunks.

What a candidate becomes depends on its number and the config alone, and the data set takes the first that pass. So neither interruptions
nor the number of processes nor the size of the rounds change it.
"""

import gc
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from mosaic.files import first_difference, read_json, write_text
from preprocess.construct.candidates import Candidate
from preprocess.construct.chunks import Chunks, Stored, as_json
from preprocess.construct.config import ConstructConfig
from preprocess.construct.decisions import Decisions
from preprocess.construct.rows import PromptRow
from preprocess.construct.stage import Stage, Worker

FIRST_ROUND = 256  # candidates at most, from which the yield is known
GROWTH = 4  # of all candidates from one round to the next, at most: yields are estimates
SPARE = 1.1  # candidates more than the yield says


class Rounds:
    """Runs stages until enough candidates pass them.

    Attributes:
        chunks: The work folder.
        decisions: Of the stages.
        count: Chunks that all stages have been through.
    """

    def __init__(self, config: ConstructConfig, stages: Sequence[Stage], work: Path, device: torch.device, state: PartialState) -> None:
        """Name what is to be done.

        Args:
            config: The settings.
            stages: From the first one on, as far as the run shall go.
            work: The work folder.
            device: Of the models.
            state: Of the processes.
        """
        self.config, self.stages, self.device, self.state = config, stages, device, state
        self.chunks, self.decisions, self.count = Chunks(work, config.chunk_size), Decisions(stages, config.prompts.limits.max_uses), 0

    def run(self, own: Sequence[Stage]) -> int:
        """Compute until enough candidates pass, or all that may be tried are; without stage 1 only what is there of it.

        Args:
            own: The stages that are computed here; what the others have is there already.

        Returns:
            How many candidates pass.

        Raises:
            FileNotFoundError: Stage 1 is not `own` and has not been there.
            ValueError: The folder holds the results of other settings.
        """
        most = math.ceil(self.config.num_samples * self.config.max_candidates / self.chunks.size)
        passing = 0
        if self.stages[0] not in own:
            self.count = most = self.chunks.count(self.stages[0].name)
            self._compute_all(own, range(most))
            return sum(1 for _ in self.decisions.passing(self.chunks, most))
        while passing < self.config.num_samples and self.count < most:
            until = min(most, self.count + self._next_round(passing))
            self._compute_all(own, range(self.count, until))
            self.count = until
            passing = sum(1 for _ in self.decisions.passing(self.chunks, self.count))
        return passing

    def _compute_all(self, own: Sequence[Stage], chunks: range) -> None:
        """Take chunks through the stages that are computed here."""
        for stage in self.stages:
            if stage in own:
                self._compute(stage, chunks)
            if stage is self.stages[0]:
                self.state.wait_for_everyone()  # duplicates are looked for among the prompts of all processes
                self.decisions.find_duplicates(self._prompts(chunks.stop))
        self.state.wait_for_everyone()

    def _next_round(self, passing: int) -> int:
        """Chunks of the next round."""
        done = self.count * self.chunks.size
        if not done:
            return math.ceil(min(self.config.num_samples, FIRST_ROUND) / self.chunks.size)
        missing = (self.config.num_samples - passing) * SPARE * done / max(passing, 1)
        return math.ceil(min(missing, GROWTH * done) / self.chunks.size)

    def _prompts(self, count: int) -> Iterator[tuple[int, str]]:
        """Numbers and prompts of the first chunks."""
        for chunk in range(count):
            for candidate in self.chunks.candidates(self.stages[:1], chunk):
                yield candidate.number, candidate.prompt.prompt

    def _compute(self, stage: Stage, chunks: range) -> None:
        """Compute what a stage lacks of this process's share of the chunks."""
        share = chunks[self.state.process_index :: self.state.num_processes]
        todo = {chunk: wanted for chunk in share if (wanted := self._wanted(stage, chunk))}
        if not todo:
            return
        worker = stage.load(self.device)
        self._claim(stage, worker)
        name = f"{self._place(stage)}/{len(self.stages)} {stage.name}"
        total = sum(len(wanted) for wanted in todo.values())
        kept = 0
        with tqdm(desc=name, unit="candidate", total=total, disable=not self.state.is_main_process) as progress:
            for chunk, wanted in todo.items():
                again = {candidate.number for candidate in wanted}
                before = {number: stored for number, stored in self.chunks.read(stage, chunk).items() if number not in again}
                with self.chunks.adding(stage, chunk, before) as (folder, added):
                    for candidate, row in zip(wanted, worker(wanted, folder), strict=True):
                        assert row.number == candidate.number, "a worker yields the rows of its candidates in order"
                        added.append(Stored(row, as_json(stage.inputs(candidate))))
                        progress.update()
                known = {candidate.number: candidate for candidate in self.chunks.candidates(self._until(stage), chunk)}
                kept += sum(not self.decisions.reasons(stage, known[number]) for number in again)
                progress.set_postfix(passed=f"{100 * kept / max(progress.n, 1):.0f}%")
        del worker
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _wanted(self, stage: Stage, chunk: int) -> list[Candidate]:
        """The candidates of a chunk that came as far as a stage and have no row there, or one that was computed from other inputs."""
        if stage is self.stages[0]:
            found = self.chunks.read(stage, chunk)
            return [nobody(number) for number in self.chunks.numbers(chunk) if number not in found]
        earlier = self._until(stage)[:-1]
        stored = self.chunks.read(stage, chunk)
        return [
            candidate
            for candidate in self.chunks.candidates(earlier, chunk)
            if self.decisions.dropped(candidate, earlier) is None
            and (candidate.number not in stored or stored[candidate.number].inputs != as_json(stage.inputs(candidate)))
        ]

    def _until(self, stage: Stage) -> list[Stage]:
        return list(self.stages[: self._place(stage)])

    def _place(self, stage: Stage) -> int:
        return self.stages.index(stage) + 1

    def _claim(self, stage: Stage, worker: Worker) -> None:
        """Write down what computes a stage, or see that it is what computed what is there.

        Raises:
            ValueError: It is not.
        """
        path = self.chunks.work / stage.name / "settings.json"
        wanted = as_json(
            {
                "settings": stage.settings.model_dump(mode="json", exclude={"limits"}),
                "models": worker.provenance,
                "seed": self.config.seed,
                "dtype": self.config.dtype,
                "chunk_size": self.config.chunk_size,
                "device": self.device.type,
            }
        )
        difference = first_difference(read_json(path), wanted) if path.exists() else ""
        if difference:
            raise ValueError(
                f"{path.parent}: was computed with other settings: {difference}. Start with the same ones (limits may change), name "
                "another --output, or remove this folder and those of the later stages."
            )
        if not path.exists() and self.state.is_main_process:
            write_text(path, json.dumps(wanted, indent=2) + "\n")


def nobody(number: int) -> Candidate:
    """A candidate before the first stage, of which only the number is known."""
    return Candidate(number, {}, PromptRow(number=number, prompt="", caption="", subjects=(), seed=0))


def provenance(work: Path, stages: Sequence[Stage]) -> dict[str, Any]:
    """What computed each stage, from the work folder."""
    paths = {stage.name: work / stage.name / "settings.json" for stage in stages}
    return {name: read_json(path) for name, path in paths.items() if path.exists()}
