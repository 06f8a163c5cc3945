"""The pocket world's encoders: their losses, that training goes on bit for bit, and what the shipped ones can tell apart."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mosaic.evaluation.encoders import ClipEncoder, DinoEncoder
from mosaic.weights.digests import weights_digest
from scripts import make_pocket_encoders
from scripts.pocket import encoders, train_encoders, world
from scripts.pocket.train_encoders import IDENTITIES, Batch, Drawn

ASSETS = Path("assets/pocket")
FLAGS = ("--num-scenes", "8", "--batch-size", "2", "--steps", "2", "--test-scenes", "4")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> train_encoders.Pictures:
    """Eight scenes, and white views of all identities, which are not drawn."""
    folder = tmp_path_factory.mktemp("pictures")
    blank = Image.new("RGB", (encoders.SIDE, encoders.SIDE), "white")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_encoders, "POSES", 1)
        patch.setattr(train_encoders, "sample_pose", lambda *_: None)
        patch.setattr(train_encoders, "render_pose", lambda pose, size: blank)
        patch.setattr(world, "render_reference", lambda identity, size: blank)
        train_encoders.draw_pictures(folder, 8)
        return train_encoders.load_pictures(folder, 8, "dino")


def test_matching_loss_tells_each_pair_from_all_that_do_not_belong_together() -> None:
    """Two columns belong to row 0: neither counts against the other."""
    similarity = torch.tensor([[2.0, 1.0, -1.0], [0.5, -0.5, 3.0]], requires_grad=True)
    positive = torch.tensor([[True, True, False], [False, False, True]])

    def cross_entropy(own: float, *others: float) -> float:
        return math.log(sum(math.exp(value) for value in (own, *others))) - own

    rows = [cross_entropy(2, -1), cross_entropy(1, -1), cross_entropy(3, 0.5, -0.5)]
    columns = [cross_entropy(2, 0.5), cross_entropy(1, -0.5), cross_entropy(3, -1)]
    loss = train_encoders.matching_loss(similarity, positive)
    assert loss.item() == pytest.approx((sum(rows) + sum(columns)) / 6, abs=1e-6)
    loss.backward()
    assert similarity.grad is not None
    assert (similarity.grad[positive] < 0).all()
    assert (similarity.grad[~positive] > 0).all()
    alone = torch.zeros(1, 2, requires_grad=True)  # nothing to tell from: no loss, and no NaN
    train_encoders.matching_loss(alone, torch.ones(1, 2, dtype=torch.bool)).backward()
    assert alone.grad is not None
    assert alone.grad.abs().max() < 1e-6


def test_batches_hold_views_of_the_subjects_and_of_individuals_near_to_them(
    pictures: train_encoders.Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_encoders, "POSES", 1)
    assert len(IDENTITIES) == 1024
    assert not any(world.is_held_out(identity) for identity in IDENTITIES)
    assert [len(scene.subjects) for scene in pictures.drawn] == [1, 2, 3, 4] * 2
    batch = train_encoders.draw_batch(pictures, 4, np.random.default_rng(0))
    assert len(set(batch.views)) == len(batch.views)
    assert batch.pixels.shape == (4 + len(batch.views), 3, encoders.SIDE, encoders.SIDE)
    for scene, row in zip(batch.scenes, batch.contains, strict=True):
        assert {view for view, shown in zip(batch.views, row, strict=True) if shown} == set(scene.subjects)
    subjects = {number for scene in batch.scenes for number in scene.subjects}
    for other in set(batch.views) - subjects:
        alike = [IDENTITIES[number] for number in subjects if IDENTITIES[number].class_name == IDENTITIES[other].class_name]
        assert any(IDENTITIES[other].palette == one.palette or IDENTITIES[other].pattern == one.pattern for one in alike)


def test_captions_belong_to_their_scenes_and_phrases_to_whoever_shows_them() -> None:
    identities = [IDENTITIES[0], IDENTITIES[200], IDENTITIES[1]]  # two cats, and a bird
    scenes = [Drawn((0, 200), "in a room", "a cat and a bird in a room"), Drawn((1, 200), "in a room", "a cat and a bird in a room")]
    contains = torch.tensor([[True, True, False], [False, True, True]])
    batch = Batch(torch.empty(0), scenes, [0, 200, 1], contains)
    full = [encoders.looks_caption([IDENTITIES[i] for i in scene.subjects], scene.background) for scene in scenes]
    seen = set()
    for seed in range(8):
        texts, positive = train_encoders.caption_pairs(batch, np.random.default_rng(seed))
        assert texts[2:] == [encoders.looks_phrase(identity) for identity in identities]
        assert positive[:2, 2:].equal(contains)
        assert positive[2:, 2:].equal(torch.eye(3, dtype=torch.bool))
        assert not positive[2:, :2].any()
        for column, text in enumerate(texts[:2]):  # the plain caption is that of both scenes
            assert positive[:2, column].tolist() == ([True, True] if text == scenes[0].caption else [text == one for one in full])
        seen |= set(texts[:2])
    assert seen == {scenes[0].caption, *full}


def test_training_goes_on_bit_for_bit(pictures: train_encoders.Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_encoders, "_CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(train_encoders, "POSES", 1)
    arguments = make_pocket_encoders.parse_arguments(["--output", str(tmp_path), *FLAGS])
    whole = train_encoders.train("clip", arguments, pictures, tmp_path / "whole")[0].state_dict()
    draw, calls = train_encoders.draw_batch, []

    def killed(*values: Any) -> Batch:
        calls.append(values)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*values)

    with monkeypatch.context() as patch:
        patch.setattr(train_encoders, "draw_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            train_encoders.train("clip", arguments, pictures, tmp_path / "killed")
        again = train_encoders.train("clip", arguments, pictures, tmp_path / "killed")[0].state_dict()
    assert len(calls) == 3  # the first step was not done again
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())
    torch.manual_seed(0)
    fresh = train_encoders.Trained("clip").state_dict()
    assert all(not torch.equal(whole[name], fresh[name]) for name in ("head.linear.weight", "model.logit_scale"))


def test_folders_begun_with_other_flags_and_flags_that_will_not_do_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "settings.json").write_text(json.dumps({"num_scenes": 8, "steps": 7, "batch_size": 2, "lr": 1e-3, "seed": 0}))
    assert make_pocket_encoders.main(["--output", str(tmp_path), *FLAGS]) == 2
    assert "was begun with --steps 7. Give the same flags" in capsys.readouterr().err
    assert make_pocket_encoders.main(["--output", str(tmp_path), "--num-scenes", "2"]) == 2
    assert "--num-scenes must be at least --batch-size 16, got 2." in capsys.readouterr().err


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer = encoders.build_tokenizer()
    everyone = [world.Identity(name, palette, "checks", "scarf") for name, palette in zip(world.CLASSES, world.PALETTES, strict=True)]
    for text in [encoders.looks_caption(everyone[:4], world.BACKGROUNDS[0]), "three mugs, a mushroom and two cars under a night sky"]:
        words = text.replace(",", " ,").split()
        assert tokenizer.tokenize(text) == [f"{word}</w>" for word in words]
        assert len(words) + 2 <= encoders.TEXT_LENGTH


def test_the_shipped_encoders_recognise_held_out_individuals() -> None:
    """By the cosine alone, among eight of a class; chance is one in eight."""
    clip = ClipEncoder(str(ASSETS / "clip"))
    for encoder in (clip, DinoEncoder(str(ASSETS / "dino"))):
        assert encoders.identification(encoder, 1, 12)["share"] > 0.5
    assert encoders.retrieval(clip, 16, looks=True)["captions_of_pictures"] > 0.6


def test_the_shipped_encoders_are_those_that_were_measured_and_small() -> None:
    record = json.loads((ASSETS / "encoders.json").read_text())
    for kind in encoders.KINDS:
        assert record["encoders"][kind]["digest"] == weights_digest(ASSETS / kind / "model.safetensors")
    files = [path for kind in encoders.KINDS for path in (ASSETS / kind).iterdir()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
