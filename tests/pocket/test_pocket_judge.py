"""The identity judge: candidate rules, the loader, what its methods compare, and that it can learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.pocket import judge as pocket_judge
from scripts.pocket import train_judge as training
from scripts.pocket import world
from scripts.pocket.world import Identity

TRUE = Identity("cat", "ember", "dots", "star")


@pytest.fixture
def small_judge() -> pocket_judge.Judge:
    torch.manual_seed(0)
    return pocket_judge.Judge(pocket_judge.JudgeConfig(fine=8, coarse=16, found=16)).eval()


def test_candidates_follow_the_rules() -> None:
    shared = {"palette": set(), "pattern": set(), "position": set()}
    for seed in range(60):
        candidates = pocket_judge.make_candidates(TRUE, np.random.default_rng(seed))
        assert candidates == pocket_judge.make_candidates(TRUE, np.random.default_rng(seed))
        assert len(set(candidates)) == 8
        assert TRUE in candidates
        assert {c.class_name for c in candidates} == {"cat"}
        others = [c for c in candidates if c != TRUE]
        palette = sum(c.palette == TRUE.palette and c.pattern != TRUE.pattern for c in others)
        pattern = sum(c.pattern == TRUE.pattern and c.palette != TRUE.palette for c in others)
        assert palette + pattern == 7
        shared["palette"].add(palette)
        shared["pattern"].add(pattern)
        shared["position"].add(candidates.index(TRUE))
    assert shared == {"palette": {3, 4}, "pattern": {3, 4}, "position": set(range(8))}


def test_score_sums_the_log_probabilities_of_the_class_asked_for(small_judge: pocket_judge.Judge) -> None:
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    verdict = small_judge(pictures)
    c = world.CLASSES.index("mug")
    identities = [TRUE, Identity("mug", "mint", "half", "none")]  # another subject's looks may be asked for
    scores = small_judge.score(pictures, "mug", identities)
    assert scores.shape == (2, 2)
    for column, identity in enumerate(identities):
        expected = sum(
            logits[:, c].log_softmax(-1)[:, names.index(value)]
            for logits, names, value in (
                (verdict.palette, world.PALETTES, identity.palette),
                (verdict.pattern, world.PATTERNS, identity.pattern),
                (verdict.marking, world.MARKINGS, identity.marking),
            )
        )
        torch.testing.assert_close(scores[:, column], expected)
    assert not torch.allclose(scores, small_judge.score(pictures, "cat", identities))
    assert small_judge.identify(pictures, "mug", identities).tolist() == scores.argmax(1).tolist()
    torch.testing.assert_close(verdict.attention.sum(-1), torch.ones(2, len(world.CLASSES)))


def test_bad_input(small_judge: pocket_judge.Judge) -> None:
    with pytest.raises(ValueError, match="class must be one of cat, .*'dog'"):
        small_judge.score(torch.zeros(1, 3, 64, 64), "dog", [TRUE])
    with pytest.raises(ValueError, match=r"64, 64\]; got \[1, 3, 32, 32\]"):
        small_judge.score(torch.zeros(1, 3, 32, 32), "cat", [TRUE])


def test_save_and_load(small_judge: pocket_judge.Judge, tmp_path: Path) -> None:
    path = tmp_path / "new" / "judge.safetensors"
    pocket_judge.save_judge(small_judge, path)
    assert [p.name for p in path.parent.iterdir()] == ["judge.safetensors"]
    loaded = pocket_judge.load_judge(path)
    assert loaded.config == small_judge.config
    assert not loaded.training
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(loaded(picture).palette, small_judge(picture).palette, atol=5e-3, rtol=0)


def test_loader_refuses_what_does_not_fit(small_judge: pocket_judge.Judge, tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    with pytest.raises(FileNotFoundError, match="judge.safetensors: no judge weights"):
        pocket_judge.load_judge(path)
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a safetensors file"):
        pocket_judge.load_judge(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="metadata must say format 'pocket-judge'"):
        pocket_judge.load_judge(path)
    metadata = {"format": "pocket-judge", "config": '{"fine": 8, "coarse": 16, "found": 16}'}
    save_file({"a": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"missing .*trunk.*unexpected \['a'\]"):
        pocket_judge.load_judge(path)
    pocket_judge.save_judge(small_judge, path)
    tensors = load_file(path)
    tensors["palette.bias"] = torch.zeros(3)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="palette.bias"):
        pocket_judge.load_judge(path)


def test_batches_mark_what_can_be_learned() -> None:
    batch, again = training.Batch(range(40)), training.Batch(range(40))
    assert torch.equal(batch.pictures, again.pictures)
    for row, scene in enumerate(batch.scenes):
        names = [p.identity.class_name for p in scene.placements]
        for c, name in enumerate(world.CLASSES):
            assert batch.counts[row, c] == names.count(name)
            known = names.count(name) == 1 and batch.visible[row, c] >= training.MIN_VISIBLE
            assert (batch.looks[row, c, 0] >= 0) == known
            if known:
                identity = scene.placements[names.index(name)].identity
                assert world.PATTERNS[batch.looks[row, c, 1]] == identity.pattern
            assert (batch.regions[row, c].sum() > 0) == (name in names)


def test_training_reduces_the_loss(small_judge: pocket_judge.Judge) -> None:
    small_judge.train()
    optimizer = torch.optim.AdamW(small_judge.parameters(), lr=3e-3)
    batch = training.Batch(range(16))
    losses = [training.train_step(small_judge, optimizer, batch, torch.Generator().manual_seed(i)) for i in range(12)]
    assert losses[-1] < losses[0] - 0.5


def test_shipped_judge_recognises_real_renderings() -> None:
    if not pocket_judge.WEIGHTS.is_file():
        pytest.skip("no shipped judge weights")
    assert pocket_judge.WEIGHTS.stat().st_size < 4 * 2**20
    accuracy = training.evaluate(pocket_judge.load_judge(), 25, first_seed=20_000_000)
    assert min(accuracy.values()) >= 0.9, accuracy  # 25 to 100 subjects each: a coarse net under the measured 0.95
