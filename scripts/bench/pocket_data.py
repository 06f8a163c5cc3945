"""The pocket bench's data, in the form in which benchmarks come: folders of subjects, and lists of prompts with references.

Subjects are held-out individuals. As DreamBench has a cat and a cat2, each class has three that look alike in part: "cat2" differs from
"cat" by its marking, "cat3" by its palette, both share its pattern.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mosaic.files import replacing, write_text
from mosaic.rendering.notes import read_manifest
from scripts.pocket import world
from scripts.pocket.scenes import count_phrase, sample_pose
from scripts.pocket.sheets import PANEL_LATTICE, PANEL_SCALES, render_pose

FIRST_SEED = 70_000_000  # of scenes; far from those that anything was trained or measured on
SIDE = 64  # px of a scene
POSES, ALONE = 2, 2  # pictures of a subject beside its reference: in other poses on white, and in scenes of its own
#: Palette of each class's first individual. Five further on or back the held-out pattern is the same again; classes that stand in one case
#: have different ones.
_PLACES = (0, 1, 2, 5, 6, 7, 2, 5)
STRIDES = {1: 1, 2: 3, 3: 3, 4: 1}  # between the subjects of a case in `SUBJECTS`, by their number


class Item(NamedTuple):
    """A case: names of subjects, in the order in which the prompt names them, and where they are."""

    subjects: tuple[str, ...]
    background: str

    @property
    def prompt(self) -> str:
        """Says what and where, never how it looks."""
        return f"{count_phrase([SUBJECTS[name] for name in self.subjects])} {self.background}"


@dataclass(frozen=True)
class Size:
    """How much is rendered.

    Attributes:
        blocks: Sets of subjects, for each number of them.
        prompts: Of each.
        steps: Sampling steps.
    """

    blocks: int
    prompts: int
    steps: int


SIZES = {"tiny": Size(2, 1, 1), "full": Size(24, 3, 10)}


def _held_out(class_name: str, palette: str, marking: str) -> world.Identity:
    """The held-out individual of a class with a palette and a marking; there is one pattern for it."""
    known = (world.Identity(class_name, palette, pattern, marking) for pattern in world.PATTERNS)
    return next(identity for identity in known if world.is_held_out(identity))


def _subjects() -> dict[str, world.Identity]:
    first, second, third = {}, {}, {}
    for number, name in enumerate(world.CLASSES):
        place, count = _PLACES[number], len(world.MARKINGS)
        marking, other = world.MARKINGS[number % count], world.MARKINGS[(number + 1) % count]
        first[name] = _held_out(name, world.PALETTES[place], marking)
        second[f"{name}2"] = _held_out(name, world.PALETTES[place], other)
        third[f"{name}3"] = _held_out(name, world.PALETTES[place + 5 if place < 5 else place - 5], marking)
    return first | second | third


#: By name, so that neighbours are of different classes: all first individuals, all second, all third.
SUBJECTS: dict[str, world.Identity] = _subjects()


def other_of_class(name: str) -> str:
    """The next of the class's three individuals."""
    names = list(SUBJECTS)
    return names[(names.index(name) + len(world.CLASSES)) % len(names)]


def items(num_subjects: int, size: Size) -> list[Item]:
    """The list of cases of so many subjects: sets of subjects of different classes, each with all its prompts, as in DreamBench."""
    names, stride = list(SUBJECTS), STRIDES[num_subjects]
    blocks = [tuple(names[(start + stride * k) % len(names)] for k in range(num_subjects)) for start in range(size.blocks)]
    return [
        Item(block, world.BACKGROUNDS[(start + number) % len(world.BACKGROUNDS)])
        for start, block in enumerate(blocks)
        for number in range(size.prompts)
    ]


def lists(size: Size) -> dict[str, list[Item]]:
    """The lists by the name of the benchmark whose rules they follow: one subject, and two to four."""
    return {"dreambench": items(1, size), "dreambench_multi": [item for k in (2, 3, 4) for item in items(k, size)]}


def scene_of(item: Item) -> world.Scene:
    """A scene that is what the case asks for; the same one each time."""
    names = list(SUBJECTS)
    numbers = [*(names.index(name) for name in item.subjects), world.BACKGROUNDS.index(item.background)]
    seed = FIRST_SEED + int(np.random.default_rng(numbers).integers(10_000_000))
    identities = [SUBJECTS[name] for name in item.subjects]
    return world.arrange(np.random.default_rng([seed, 0xBE7C]), identities, item.background, seed)


def write_subjects(folder: Path, names: Collection[str]) -> None:
    """Draw the folders of some subjects: 00.png is the reference, then come other poses on white, then scenes of the subject alone."""
    for number, (name, identity) in enumerate(SUBJECTS.items()):
        if name not in names or (folder / name).is_dir():
            continue
        rng = np.random.default_rng([FIRST_SEED, number])
        views = [world.render_reference(identity, world.REFERENCE_SIZE)]
        views += [render_pose(sample_pose(rng, identity, PANEL_SCALES, PANEL_LATTICE), SIDE) for _ in range(POSES)]
        for background in rng.choice(world.BACKGROUNDS, ALONE, replace=False):
            scene = world.arrange(rng, [identity], str(background), FIRST_SEED + number)
            views.append(world.render_scene(scene, SIDE).image)
        with replacing(folder / name) as aside:
            _save(views, aside)


def write_real(folder: Path, wanted: Sequence[Item]) -> None:
    """Draw the cases as they should be, 00.png for the first."""
    if not folder.is_dir():
        with replacing(folder) as aside:
            _save([world.render_scene(scene_of(item), SIDE).image for item in wanted], aside)


def _save(pictures: Sequence[Image.Image], folder: Path) -> None:
    folder.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:02d}.png")


def write_list(path: Path, wanted: Sequence[Item], *, of_others: bool) -> None:
    """Write a list in UNO's form; with `of_others` the reference of each subject is that of another one of its class."""
    values = []
    for item in wanted:
        given = [other_of_class(name) if of_others else name for name in item.subjects]
        values.append({"prompt": item.prompt, "image_paths": [f"{name}/00.png" for name in given]})
    write_text(path, json.dumps(values, indent=1) + "\n")


class Folder:
    """Where everything of a pocket bench lies.

    Attributes:
        output: The folder.
        size: How much is in it.
        lists: Its cases, as `lists` gives them.
    """

    def __init__(self, output: Path, size: Size) -> None:
        self.output, self.size, self.lists = output, size, lists(size)

    @property
    def subjects(self) -> Path:
        """The subjects' folders."""
        return self.output / "data"

    def prepared(self, name: str, *, of_others: bool) -> Path:
        """A list made ready for rendering."""
        return self.output / "lists" / (f"{name}_of_others" if of_others else name)

    def rendered(self, arm: str, name: str) -> Path:
        """An arm's pictures of a list."""
        return self.output / arm / name

    def scores(self, arm: str, name: str) -> Path:
        """An arm's scores of a list."""
        return self.output / "scores" / arm / name

    def pictures(self, arm: str, name: str) -> list[Path]:
        """An arm's pictures of a list, in its order."""
        folder = self.rendered(arm, name)
        if arm == "real":
            return [folder / f"{number:02d}.png" for number in range(len(self.lists[name]))]
        return [folder / row["file"] for row in sorted(read_manifest(folder), key=lambda row: row["index"])]
