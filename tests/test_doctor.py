"""The doctor: what it counts, when it calls a data set starved, and the quick form that training runs."""

import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from mosaic.data import Sample
from mosaic.data.inspection import Coverage, Inspection, check_supervision, fingerprint, mask_cells
from mosaic.data.readable import Unreadable
from mosaic.tokens import Grid
from scripts.doctor_findings import Findings, Training, near_duplicates, share_outside, shared_cells, summarise, tokens_per_sample

GRID = Grid(2, 4)


def pairs(*points: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(points, dtype=torch.int64).reshape(-1, 2)


def cells(*covered: int) -> torch.Tensor:
    return torch.zeros(GRID.num_tokens, dtype=torch.bool).index_fill(0, torch.tensor(covered), True)


def picture(width: int, height: int, seed: str = "") -> Image.Image:
    rng = np.random.default_rng(list(seed.encode()))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def inspection(name: str = "a", **changes: object) -> Inspection:
    values = {
        "id": name,
        "prompt": "a cat and a mug",
        "target": picture(64, 32, name),
        "references": (picture(32, 32), picture(16, 32)),
        "points": (pairs((0, 1), (2, 3)), pairs((1, 2))),
        "reference_grids": (GRID, GRID),
        "target_grid": GRID,
        "masks": (cells(1), None),
    }
    return Inspection(**(values | changes))


def collect(*found: Inspection | Unreadable) -> Findings:
    findings = Findings(Training(token_pixels=8, image_size=(32, 64), reference_size=32, text_length=10))
    for one in found:
        findings.add(one)
    return findings


def test_a_healthy_set() -> None:
    summary = summarise(collect(inspection("a"), inspection("b", prompt="a dog", masks=(cells(1, 3), cells(2)))))
    assert summary["healthy"] and summary["reasons"] == []
    assert (summary["coverage"]["points"], summary["coverage"]["masks"], summary["coverage"]["references"]) == (1.0, 0.75, 4)
    assert summary["references_per_sample"] == {"2": 2}
    assert summary["points_per_reference"] == {"min": 1, "median": 1.5, "mean": 1.5, "max": 2, "below_8": 4}
    assert summary["points_outside_masks"] == {"share": pytest.approx((0.5 + 0 + 0) / 3), "examples": ["a"]}
    assert summary["target_sizes"] == [["64 x 32", 2.0, 2]]
    assert sorted(summary["reference_sizes"]) == [["16 x 32", 0.5, 2], ["32 x 32", 1.0, 2]]
    assert summary["tokens_per_sample"] == 10 + 4 * 8 + 2 * 16
    assert (summary["captions"]["distinct"], summary["captions"]["max_words"]) == (2, 5)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (
            inspection(points=(pairs((0, 1)), pairs()), missing=("points",)),
            r"1 of 2 references \(50.0%\) have points, 95% are wanted: .*match.py",
        ),
        (inspection(points=(pairs((0, 1)), pairs((3, 1)))), r"1 samples have a target cell in two references \(Eq. 2\)"),
        (Unreadable(7, "x.png: broken"), "1 of 2 samples cannot be read"),
    ],
)
def test_a_starved_set(found: Inspection | Unreadable, reason: str) -> None:
    coverage = 0.5 if isinstance(found, Inspection) and found.missing else 1.0
    findings = collect(found) if coverage < 1 else collect(inspection("b"), found)
    summary = summarise(findings)
    assert not summary["healthy"]
    assert re.search(reason, " ".join(summary["reasons"]))
    if isinstance(found, Unreadable):
        assert summary["unreadable"]["examples"] == [[7, "x.png: broken"]]


def test_nothing_at_all_is_starved() -> None:
    assert not summarise(collect())["healthy"]


def test_shared_cells_and_shares() -> None:
    assert shared_cells([pairs((0, 1), (1, 1)), pairs((0, 2))]) == 0  # v may repeat within a reference
    assert shared_cells([pairs((0, 1)), pairs((0, 1), (1, 3)), pairs((2, 3))]) == 2
    assert share_outside(pairs((0, 1), (1, 2), (2, 5), (3, 6)), cells(1, 2, 6)) == 0.25
    assert share_outside(pairs(), cells(1)) is share_outside(pairs((0, 1)), None) is None


def test_near_duplicates_equal_brute_force() -> None:
    rng = np.random.default_rng(0)
    base = [int(x) for x in rng.integers(0, 2**64, 40, dtype=np.uint64)]
    near = [value ^ sum(1 << int(bit) for bit in rng.choice(64, size=flips, replace=False)) for flips, value in enumerate(base[:6])]
    named = [(value, str(i)) for i, value in enumerate(base + near)]
    want = {(a, b) for i, (x, a) in enumerate(named) for y, b in named[i + 1 :] if (x ^ y).bit_count() <= 3}
    assert set(near_duplicates(named)) == want
    assert len(want) == 4  # 0 to 3 flipped bits, not 4 and 5


def test_fingerprints_follow_the_picture_not_its_encoding() -> None:
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(6))
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    same = (fingerprint(picture) ^ fingerprint(picture.resize((192, 128)))).bit_count()
    assert same <= 3 < (fingerprint(picture) ^ fingerprint(other)).bit_count()
    ramp = Image.fromarray(np.tile(np.arange(0, 180, 20, dtype=np.uint8), (8, 1)))
    assert (fingerprint(ramp), fingerprint(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) == (2**64 - 1, 0)


def test_mask_cells_are_those_that_the_mask_touches() -> None:
    mask = np.zeros((32, 64), np.uint8)
    mask[0, 16] = mask[31, 63] = 255
    assert mask_cells(Image.fromarray(mask), GRID).nonzero().flatten().tolist() == [1, 7]


def test_tokens() -> None:
    assert tokens_per_sample(Training(), 2) == 512 + 1024 + 2 * 1024


# ---- the quick form


class Stored:
    """A data set of which every `gap`-th sample has no points on its second reference."""

    def __init__(self, count: int, gap: int) -> None:
        self.count, self.gap, self.read = count, gap, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        second = pairs() if index % self.gap == 0 else pairs((1, 2))
        return Sample(f"s{index}", "a cat", torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8), [pairs((0, 1)), second])


def test_starved_supervision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only 3 of 4 references \(75%\) .*asks for 95%.*Samples without: s0\..*doctor.*match.py.*=0"):
        check_supervision(Stored(2, 2), 0.95)
    assert check_supervision(Stored(2, 2), 0.75) == Coverage(4, 3, ["s0"])
    assert check_supervision(Stored(2, 1), 0.0).share == 0.5
    data = Stored(1000, 40)
    assert check_supervision(data, 0.95, 50).references == 100
    assert (data.read[0], data.read[-1], len(set(data.read))) == (0, 999, 50)
