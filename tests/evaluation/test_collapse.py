"""Subjects that are lost, doubled or of another reference's looks, by hand-made places, and by a picture of coloured squares."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mosaic.evaluation.collapse import METRICS, Collapse, collapsed, judge_places
from mosaic.evaluation.detection import Box
from mosaic.evaluation.encoders import Provenance
from mosaic.evaluation.entries import Entry, Subject
from mosaic.evaluation.instances import InstanceFinder
from mosaic.evaluation.records import Key

RED, BLUE, GREEN = np.eye(3)


def judged(
    embeddings: list[np.ndarray], place: list[int], of_subject: list[list[int]], names: list[str] | None = None
) -> dict[str, list[float]]:
    """Of a red and a blue reference."""
    names = names or ["cat", "mug"]
    found = judge_places(
        np.stack([RED, BLUE])[: len(names)], (RED + BLUE) / 2, np.array(embeddings).reshape(len(embeddings), 3), place,
        [np.array(one, dtype=int) for one in of_subject], names,
    )  # fmt: skip
    return {metric: found[len(names) * k : len(names) * (k + 1)] for k, metric in enumerate(METRICS)}


def test_both_there() -> None:
    assert judged([RED, BLUE], [0, 1], [[0], [1]]) == {
        "instance": [100, 100], "whole": [50, 50], "leakage": [0, 0], "missing": [0, 0], "doubled": [0, 0],
    }  # fmt: skip


def test_nothing_there() -> None:
    found = judged([], [], [[], []])
    assert (found["instance"], found["missing"], found["leakage"]) == ([0, 0], [100, 100], [0, 0])


def test_both_of_one_look() -> None:
    found = judged([RED, RED], [0, 1], [[0], [1]])
    assert found["instance"] == [100, 0]  # no reference has the same place as another
    assert found["leakage"] == [0, 100]


def test_looks_that_have_changed_places_are_given_back() -> None:
    """What a name finds does not decide whose it is."""
    assert judged([BLUE, RED], [0, 1], [[0], [1]])["instance"] == [100, 100]


def test_one_place_that_both_names_find_counts_once() -> None:
    found = judged([RED, RED], [0, 0], [[0], [0]])
    assert sorted(found["instance"]) == [0, 100]
    assert found["doubled"] == [0, 0]


def test_twins_need_two_places() -> None:
    twins = ["cat", "cat"]
    found = judged([RED], [0], [[0], [0]], twins)
    assert (found["missing"], found["doubled"]) == ([0, 100], [0, 0])
    found = judged([RED, BLUE, GREEN], [0, 1, 2], [[0, 1, 2], [0, 1, 2]], twins)
    assert (found["missing"], found["doubled"]) == ([0, 0], [100, 100])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 1000))
def test_another_place_never_lowers_the_sum(count: int, instances: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    references, embeddings = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (rng.normal(size=(count, 4)), rng.normal(size=(instances + 1, 4)))
    )
    names, nothing = [str(k) for k in range(count)], [np.array([], dtype=int)] * count
    sums = []
    for number in (instances, instances + 1):
        found = judge_places(np.abs(references), references[0], np.abs(embeddings[:number]), list(range(number)), nothing, names)
        sums.append(sum(found[:count]))
        assert all(0 <= value <= 100 + 1e-9 for value in found[:count])
    assert sums[0] <= sums[1] + 1e-9


class Colours:
    """An encoder of mean colours without white, a detector of coloured squares by their names, and a segmenter of whole boxes."""

    provenance = Provenance("colours", "1", "none")
    by_name: ClassVar = {"cat": (255, 0, 0), "mug": (0, 0, 255)}

    def images(self, pictures: list[Image.Image]) -> torch.Tensor:
        found = []
        for picture in pictures:
            pixels = np.asarray(picture, dtype=np.float32).reshape(-1, 3)
            found.append(torch.from_numpy(pixels[pixels.min(axis=1) < 200].mean(axis=0)))
        return torch.nn.functional.normalize(torch.stack(found), dim=-1)

    def boxes(self, picture: Image.Image, phrase: str) -> list[Box]:
        found = np.argwhere((np.asarray(picture) == self.by_name[phrase]).all(axis=2))
        return [Box(*found.min(axis=0)[::-1], *(found.max(axis=0)[::-1] + 1))] if len(found) else []

    def masks(self, picture: Image.Image, boxes: list[Box]) -> np.ndarray:
        return np.ones((len(boxes), picture.height, picture.width), dtype=bool)


def test_a_picture_with_one_of_two_subjects(tmp_path: Path) -> None:
    for name, colour in Colours.by_name.items():
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    subjects = tuple(Subject(name, (tmp_path / f"{name}.png",)) for name in Colours.by_name)
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((255, 0, 0), (4, 4, 34, 34))
    case = [Entry(tmp_path / "made.png", "both", run, "a cat and a mug", subjects) for run in (0, 1)]
    both = picture.copy()
    both.paste((0, 0, 255), (40, 40, 60, 60))
    measure = Collapse(Colours(), InstanceFinder(Colours(), Colours()))
    values = dict(zip(measure.keys(case), measure(case, [picture, both]), strict=True))
    assert [values[Key("instance", "both", run, name)] for run in (0, 1) for name in ("cat", "mug")] == pytest.approx([100, 0, 100, 100])
    assert [values[Key("missing", "both", run, "mug")] for run in (0, 1)] == [100, 0]
    assert values[Key("whole", "both", 0, "cat")] == pytest.approx(100)
    by_metric = {metric: {key: value for key, value in values.items() if key.metric == metric} for metric in METRICS}
    shares = collapsed(by_metric)
    assert shares["instance"] == {"2": {"40": 25.0, "50": 25.0, "60": 25.0}}
    assert shares["whole"]["2"]["50"] == 50.0  # the mug's, beside the larger cat and without it
