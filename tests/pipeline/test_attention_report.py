"""Where references look: synthetic maps with known answers, and plain loops over every token."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mosaic.method.correspondence import batch_points
from mosaic.method.grids import Grid
from mosaic.method.metrics import attention_leakage, leakage_matrix
from mosaic.pipeline.attention_report import AttentionRecorder, PictureAttention, subject_tokens

REFERENCE, TARGET = Grid(2, 3), Grid(3, 4)


def random_attention(seed: int, num_references: int = 3, peaked: float = 4.0) -> PictureAttention:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_references, REFERENCE.num_tokens, TARGET.num_tokens)
    maps = torch.softmax(peaked * torch.randn(shape, generator=generator), dim=-1)
    subject = torch.rand(shape[:2], generator=generator) < 0.7
    subject[:, 1] = True
    return PictureAttention(maps, torch.zeros(1, num_references), subject, REFERENCE, TARGET)


def one_hot_attention(peaks: list[list[int]], subject: Tensor | None = None) -> PictureAttention:
    """All of a token's attention on its peak."""
    maps = torch.nn.functional.one_hot(torch.tensor(peaks), TARGET.num_tokens).float()
    subject = torch.ones(maps.shape[:2], dtype=torch.bool) if subject is None else subject
    return PictureAttention(maps, torch.zeros(1, len(peaks)), subject, REFERENCE, TARGET)


# ---- naive twins


def naive_owner(attention: PictureAttention, v: int) -> int:
    votes = Counter()
    for k in range(len(attention.maps)):
        for u in range(REFERENCE.num_tokens):
            if attention.subject[k, u] and int(np.argmax(attention.maps[k, u].numpy())) == v:
                votes[k] += 1
    return min(votes, key=lambda k: (-votes[k], k)) if votes else -1


def naive_leakage(attention: PictureAttention, i: int, j: int) -> float:
    shares = []
    for u in range(REFERENCE.num_tokens):
        if attention.subject[i, u]:
            row = attention.maps[i, u].tolist()
            shares.append(sum(p for v, p in enumerate(row) if naive_owner(attention, v) == j) / sum(row))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("seed", range(6))
def test_owners_leakage_and_distributions_against_loops(seed: int) -> None:
    attention = random_attention(seed, num_references=1 + seed % 4, peaked=(0.3, 3.0)[seed % 2])
    num_references = len(attention.maps)
    owners = [naive_owner(attention, v) for v in range(TARGET.num_tokens)]
    assert attention.owners.tolist() == owners
    assert attention.owned.tolist() == pytest.approx([owners.count(k) / len(owners) for k in range(num_references)])
    expected = [[naive_leakage(attention, i, j) for j in range(num_references)] for i in range(num_references)]
    torch.testing.assert_close(attention.leakage, torch.tensor(expected))
    for k in range(num_references):
        rows = [attention.maps[k, u] for u in range(REFERENCE.num_tokens) if attention.subject[k, u]]
        torch.testing.assert_close(attention.distributions[k], sum(rows) / len(rows))


@pytest.mark.parametrize("seed", range(4))
def test_off_the_diagonal_it_is_the_leakage_of_the_metrics(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randperm(TARGET.num_tokens, generator=generator)
    points = [torch.stack([torch.arange(n), v[start : start + n]], dim=1) for start, n in ((0, 5), (5, 2), (7, 3))]
    rows = torch.rand(1, 10, TARGET.num_tokens, generator=generator)
    batch = batch_points([points], REFERENCE.num_tokens, TARGET.num_tokens)
    owner = torch.full((TARGET.num_tokens,), -1)
    owner[batch.target_index[0]] = batch.reference[0]
    matrix = leakage_matrix(rows[0], batch.reference[0], owner, 3)
    leaked = (matrix.sum(dim=1) - matrix.diagonal()) @ torch.tensor([5.0, 2.0, 3.0]) / 10
    assert float(leaked) == pytest.approx(attention_leakage(rows, batch).leakage, rel=1e-5)


# ---- known answers


def test_subjects_that_do_not_mix_leak_nothing() -> None:
    attention = one_hot_attention([[0, 1, 2, 0, 1, 2], [9, 9, 9, 9, 10, 11]])
    assert attention.leakage.tolist() == [[1, 0], [0, 1]]
    assert attention.owners.tolist() == [0, 0, 0, -1, -1, -1, -1, -1, -1, 1, 1, 1]
    assert attention.owned.tolist() == [0.25, 0.25]


def test_who_looks_at_whom_is_not_symmetric() -> None:
    # Reference 1 looks at the place of reference 0 with four of its six tokens, and holds token 9 with the other two.
    attention = one_hot_attention([[3] * 6, [3, 3, 3, 3, 9, 9]])
    torch.testing.assert_close(attention.leakage, torch.tensor([[1, 0], [4 / 6, 2 / 6]]))


def test_only_the_subject_counts() -> None:
    subject = torch.tensor([[True, True, False, False, False, False], [False, False, False, False, True, True]])
    attention = one_hot_attention([[0, 1, 11, 11, 11, 11], [0, 0, 0, 0, 10, 11]], subject)
    assert attention.leakage.tolist() == [[1, 0], [0, 1]]
    assert attention.distributions[0].tolist() == [0.5, 0.5] + [0] * 10


def test_a_tie_goes_to_the_lowest_reference() -> None:
    attention = one_hot_attention([[4] * 6, [4] * 6])
    assert attention.leakage.tolist() == [[1, 0], [1, 0]]
    assert int(attention.owners[4]) == 0


def test_uniform_attention_has_the_share_that_is_owned() -> None:
    maps = torch.full((1, 6, 12), 1 / 12)
    maps[0, 2] = torch.nn.functional.one_hot(torch.tensor(7), 12)
    attention = PictureAttention(maps, torch.zeros(1, 1), torch.ones(1, 6, dtype=torch.bool), REFERENCE, TARGET)
    assert attention.owners.tolist() == [0] + [-1] * 6 + [0] + [-1] * 4  # uniform rows peak on the first token
    assert float(attention.leakage) == pytest.approx((5 * 2 / 12 + 1) / 6)
    assert attention.uniform_entropy == pytest.approx(math.log(12))


# ---- lines


def test_strongest_lines_are_sharp_apart_and_on_the_subject() -> None:
    grid = Grid(3, 5)
    weights = [9, 8, 1, 2, 7, 1, 1, 1, 1, 1, 6, 1, 5, 1, 10]  # of 3 x 5 tokens; token 1 lies beside 0
    maps = torch.full((1, 15, 12), 0.0)
    for u, weight in enumerate(weights):
        maps[0, u, (u + 3) % 12] = weight / 100
    subject = torch.ones(1, 15, dtype=torch.bool)
    subject[0, 14] = False
    attention = PictureAttention(maps, torch.zeros(1, 1), subject, grid, TARGET)
    lines = attention.strongest(0, 3)
    assert [(line.reference, line.u, line.v) for line in lines] == [(0, 0, 3), (0, 4, 7), (0, 10, 1)]
    assert [line.weight for line in lines] == pytest.approx([0.09, 0.07, 0.06])
    assert [line.u for line in attention.strongest(0, 6)] == [0, 1, 4, 10, 12, 2]  # one beside a sharper one, to be six
    assert len(attention.strongest(0, 99)) == 14
    assert attention.line(0, 14).v == 5  # any token may be asked for


def test_lines_spread_over_a_large_grid() -> None:
    maps = torch.zeros(1, 400, 12)
    maps[0, :, 0] = torch.linspace(1, 0.5, 400)  # the sharpest rows are those of the first row of 20 x 20
    attention = PictureAttention(maps, torch.zeros(1, 1), torch.ones(1, 400, dtype=torch.bool), Grid(20, 20), TARGET)
    assert [line.u for line in attention.strongest(0, 6)] == [0, 5, 10, 15, 100, 105]


# ---- the recorder


def test_recorder_against_a_loop_over_kept_maps() -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (2, 3 * REFERENCE.num_tokens, TARGET.num_tokens)
    steps = [torch.softmax(3 * torch.randn(shape, generator=generator), dim=-1) for _ in range(4)]
    subjects = [random_attention(seed).subject for seed in (1, 2)]
    recorder, kept = AttentionRecorder(subjects), [step.clone() for step in steps]
    for step in steps:
        recorder.add(step)
    assert all(torch.equal(a, b) for a, b in zip(steps, kept, strict=True))  # what it was given is not changed
    for b, found in enumerate(recorder.results(REFERENCE, TARGET)):
        torch.testing.assert_close(found.maps.flatten(0, 1), sum(step[b] for step in steps) / 4)
        assert torch.equal(found.subject, subjects[b])
        for s, step in enumerate(steps):
            for k in range(3):
                rows = [step[b, k * 6 + u].tolist() for u in range(6) if subjects[b][k, u]]
                entropies = [-sum(p * math.log(p) for p in row) for row in rows]
                assert float(found.entropy[s, k]) == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


def test_entropy_at_its_ends() -> None:
    recorder = AttentionRecorder([torch.ones(1, 6, dtype=torch.bool)])
    recorder.add(torch.nn.functional.one_hot(torch.arange(6), 12).float()[None])
    recorder.add(torch.full((1, 6, 12), 1 / 12))
    (found,) = recorder.results(REFERENCE, TARGET)
    assert found.entropy[:, 0].tolist() == pytest.approx([0, found.uniform_entropy])


def test_a_recorder_without_steps_has_nothing() -> None:
    assert AttentionRecorder([torch.ones(1, 6, dtype=torch.bool)] * 2).results(REFERENCE, TARGET) == [None, None]


# ---- the subject


def test_subject_tokens() -> None:
    def found(picture: np.ndarray, grid: Grid) -> list[int]:
        return subject_tokens(Image.fromarray(picture), grid).nonzero().squeeze(1).tolist()

    picture = np.full((40, 40, 3), 255, np.uint8)
    picture[10:20, 20:40] = (0, 120, 0)  # tokens (1, 2) and (1, 3) of 4 x 4
    picture[30:40, 0:2] = 0  # less than half of token (3, 0)
    assert found(picture, Grid(4, 4)) == [6, 7]
    picture[10:20] = 255
    assert found(picture, Grid(4, 4)) == [12]  # thin, but there
    assert found(np.full((6, 6, 3), 255, np.uint8), Grid(2, 3)) == [0, 1, 2, 3, 4, 5]
