"""What `bench.py pocket` does: a benchmark of the pocket world from data to page, by the commands that other benchmarks use.

Four arms, of which each should be better than the next: the scenes as they should be, the adapter, the adapter given the references of
others, and the base without any.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mosaic.files import write_text
from mosaic.locks import FolderLock
from scripts.bench import pocket_data as data
from scripts.bench.pocket_numbers import ARMS, GENERATED
from scripts.bench.pocket_page import PAGE, TABLE, write_page
from scripts.launching.launch import make_plan, process_environments
from scripts.launching.processes import run_processes
from scripts.pocket.runs import check_begun

ROOT = Path(__file__).resolve().parents[2]
CLIP, DINO = ROOT / "assets" / "pocket" / "clip", ROOT / "assets" / "pocket" / "dino"
SEED = 3407


Give = Callable[[list[str]], int]  # gives a command of bench.py in this process; returns its exit code


class Chain:
    """The commands in their order; what is done already takes no time when they are given again."""

    def __init__(self, folder: data.Folder, lora: str | None, processes: int, give: Give) -> None:
        self.folder, self.lora, self.processes, self.give = folder, lora, processes, give

    def prepare(self) -> None:
        """Draw subjects and the scenes as they should be, write the lists, and prepare them for rendering."""
        named = {name for wanted in self.folder.lists.values() for item in wanted for name in item.subjects}
        data.write_subjects(self.folder.subjects, named | {data.other_of_class(name) for name in named})
        for name, wanted in self.folder.lists.items():
            data.write_real(self.folder.rendered("real", name), wanted)
            for of_others in (False, True):
                path = self.folder.prepared(name, of_others=of_others)
                data.write_list(path.with_suffix(".json"), wanted, of_others=of_others)
                given = ["--data", self.folder.subjects, "--list", path.with_suffix(".json"), "--output", path]
                self._call("prepare", name, *given, "--runs", 1, "--size", data.SIDE, "--seed", SEED)

    def render(self, arm: str, name: str) -> None:
        """Render an arm's pictures of a list."""
        settings: list[object] = ["--steps", self.folder.size.steps]
        if arm == "base":
            settings += ["--set", "inference.lora=null"]
        elif self.lora:
            settings += ["--lora", self.lora]
        prepared = self.folder.prepared(name, of_others=arm == "other")
        self._start("render", prepared, "--output", self.folder.rendered(arm, name), *settings)

    def score(self, arm: str, name: str) -> None:
        """Score an arm's pictures of a list: as a run where its cases are the list's, else as anyone's pictures."""
        if arm in ("adapter", "base"):
            source = ["--run", self.folder.rendered(arm, name), "--prepared", self.folder.prepared(name, of_others=False)]
        else:
            source = ["--pictures", self._write_pictures(arm, name)]
        given = ["--clip", CLIP, "--dino", DINO, "--device", "cpu", "--output", self.folder.scores(arm, name)]
        self._start("score", name, *source, *given)

    def table(self) -> None:
        """Put the arms side by side, with the worst and the best pictures of each; published rows are of other pictures and models."""
        scored = [f"{title}={self.folder.scores(arm, name)}" for name in self.folder.lists for arm, title in ARMS.items()]
        self._call("table", *scored, "--ours-alone", "--output", self.folder.output / TABLE)

    def _write_pictures(self, arm: str, name: str) -> Path:
        """Say what the pictures should show."""
        path = self.folder.output / f"{arm}_{name}.jsonl"
        lines = [
            {
                "picture": picture.relative_to(self.folder.output).as_posix(),
                "prompt": item.prompt,
                "run": 0,
                "subjects": [f"data/{subject}" for subject in item.subjects],
            }
            for picture, item in zip(self.folder.pictures(arm, name), self.folder.lists[name], strict=True)
        ]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        return path

    def _call(self, *words: object) -> None:
        """Give a command of bench.py in this process."""
        self._check(self.give([str(word) for word in words]), words)

    def _start(self, *words: object) -> None:
        """Give a command of bench.py to all processes; one process is this one."""
        if self.processes == 1:
            self._call(*words)
            return
        environments = process_environments(make_plan({"NUM_PROCESSES": str(self.processes)}, 0), os.environ)
        command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *(str(word) for word in words)]
        self._check(run_processes(command, environments), words)

    @staticmethod
    def _check(code: int, words: tuple[object, ...]) -> None:
        if code:
            raise ValueError(f"bench.py {words[0]} {words[1]} ended with exit code {code}, for the reason above. The same command goes on.")


def run(arguments: argparse.Namespace, give: Give) -> None:
    """Render and score all arms by commands of bench.py, which `give` gives in this process, and write the page.

    Raises:
        OSError, ValueError: A flag will not do, the folder is in use or was begun with other flags, or a command failed.
    """
    if not 1 <= arguments.processes <= 64:
        raise ValueError(f"--processes must be of 1..64, got {arguments.processes}.")
    for encoder in (CLIP, DINO):
        if not encoder.is_dir():
            raise FileNotFoundError(f"{encoder} is missing; it comes with the repository, and scripts/make_pocket_encoders.py makes it.")
    if arguments.processes == 1:
        import torch

        torch.set_num_threads(1)  # as several processes have it: numbers then agree to the last bit
    start = time.monotonic()
    with FolderLock(arguments.output, "--output") as lock:
        lock.acquire()
        check_begun(arguments.output / "settings.json", {"size": arguments.size, "lora": arguments.lora}, str(arguments.output))
        folder = data.Folder(arguments.output, data.SIZES[arguments.size])
        chain = Chain(folder, arguments.lora, arguments.processes, give)
        chain.prepare()
        parts = [(arm, name) for arm in ARMS for name in folder.lists]
        for number, (arm, name) in enumerate(parts, start=1):
            print(f"part {number} of {len(parts)}: {ARMS[arm]}, {name}, {len(folder.lists[name])} cases", flush=True)
            if arm in GENERATED:
                chain.render(arm, name)
            chain.score(arm, name)
        chain.table()
        write_page(folder)
    print(f"{arguments.output / PAGE} after {time.monotonic() - start:.0f} s")
