"""The pocket world's segmenter: what it is trained on, that training goes on bit for bit, and how well the shipped one finds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from transformers import CLIPTokenizer

from mosaic.weights.digests import weights_digest
from preprocess.construct.segmentation.clipseg import ClipSegSegmenter
from preprocess.construct.segmentation.masks import overlap_of_masks
from scripts import make_pocket_segmenter
from scripts.pocket import segmenter, train_segmenter, world

ASSETS = Path("assets/pocket")
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of the norms of the pocket FLUX in bfloat16
FLAGS = ("--num-scenes", "6", "--batch-size", "4", "--tower-steps", "1", "--decoder-steps", "1", "--test-scenes", "4")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> train_segmenter.Pictures:
    folder = tmp_path_factory.mktemp("pictures")
    train_segmenter.draw_pictures(folder, 6)
    return train_segmenter.load_pictures(folder, 6)


def test_what_was_drawn_over_is_still_in_its_place(pictures: train_segmenter.Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered, over = pictures.pixels[:, 0].astype(float), pictures.pixels[:, 1].astype(float)
    apart = np.abs(rendered[:, None] - over[None]).mean(axis=(2, 3, 4))
    assert (apart.argmin(axis=1) == np.arange(6)).all()
    assert 1 < np.diag(apart).min() <= np.diag(apart).max() < 25
    scene = train_segmenter.draw_scene(train_segmenter.FIRST_SEED + 3)
    exact = world.render_scene(scene, segmenter.SIDE)
    assert np.array_equal(pictures.pixels[3, 0], np.asarray(exact.image))
    assert all(np.array_equal(pictures.front[3] == k, mask > 0) for k, mask in enumerate(exact.masks))
    assert pictures.classes[3] == tuple(placement.identity.class_name for placement in scene.placements)
    monkeypatch.setattr(train_segmenter, "MOST_NOISE", 0.0)  # then the VAE alone changes it
    flux = FluxPipeline.from_pretrained(train_segmenter.FLUX)
    again = train_segmenter.draw_over(flux, pictures.pixels[:2, 0], ["", ""], torch.Generator())
    assert np.abs(again.astype(float) - rendered[:2]).mean() < np.abs(over[:2] - rendered[:2]).mean()


def test_individuals_of_a_class_that_touch_are_parted_behind() -> None:
    front = np.full((6, 6), -1)
    front[1:4, 0:3], front[1:4, 3:6], front[4] = 0, 2, 1
    mask, seam = train_segmenter.class_mask(front, [0, 2])
    assert np.argwhere(seam).tolist() == [[1, 2], [2, 2], [3, 2]]  # of the one behind; what another class hides is no seam
    assert np.array_equal(mask, np.isin(front, [0, 2]) & ~seam)
    assert not train_segmenter.class_mask(front, [0])[1].any()


def test_batches_ask_for_what_is_there_and_what_is_not(pictures: train_segmenter.Pictures) -> None:
    asked = set()
    for seed in range(12):
        batch = train_segmenter.draw_batch(pictures, 4, np.random.default_rng(seed))
        rows = np.random.default_rng(seed).choice(len(pictures.front), 4, replace=False)
        for k, row in enumerate(rows):
            (name,) = (name for name in world.CLASSES if batch.phrases[k] in segmenter.phrases(name))
            own = [i for i, other in enumerate(pictures.classes[row]) if other == name]
            seen = torch.from_numpy(np.isin(pictures.front[row], own))
            mask, seam = batch.masks[k] > 0, batch.weights[k] > 1
            assert torch.equal(mask, batch.labels[k] == 1 + world.CLASSES.index(name))  # masks, weights and labels are mirrored alike
            assert any(torch.equal(mask | seam, one) for one in (seen, seen.flip(-1)))
            assert not (mask & seam).any()
            asked.add(bool(own))
    assert asked == {True, False}


def test_the_heads_labels_lie_where_its_tokens_do() -> None:
    head, labels = train_segmenter.ClassHead(4, 8), torch.zeros(1, segmenter.SIDE, segmenter.SIDE, dtype=torch.int64)
    labels[0, 8:16, 24:32] = 3
    tokens = torch.zeros(1, 64, 4)
    tokens[0, 8 + 3, 0] = 1
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.bias.copy_(torch.tensor([20.0, *[0.0] * 8]).repeat_interleave(64))
        head.linear.weight[3 * 64 : 4 * 64, 0] = 40
    assert head.loss(tokens, labels) < 1e-6
    assert head.loss(tokens, labels.transpose(1, 2)) > 0.1


def test_training_goes_on_bit_for_bit(pictures: train_segmenter.Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_segmenter, "_CHECKPOINT_EVERY", 1)
    arguments = make_pocket_segmenter.parse_arguments(["--output", str(tmp_path), *FLAGS])
    tokenizer = CLIPTokenizer.from_pretrained(segmenter.CLIP)
    whole = train_segmenter.train(arguments, pictures, tokenizer, tmp_path / "whole")[0].state_dict()
    draw, calls = train_segmenter.draw_batch, []

    def killed(*values: Any) -> train_segmenter.Batch:
        calls.append(values)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*values)

    with monkeypatch.context() as patch:
        patch.setattr(train_segmenter, "draw_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            train_segmenter.train(arguments, pictures, tokenizer, tmp_path / "killed")
        again = train_segmenter.train(arguments, pictures, tokenizer, tmp_path / "killed")[0].state_dict()
    assert len(calls) == 3  # the first step was not done again
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())
    torch.manual_seed(0)
    fresh = segmenter.build_segmenter().state_dict()
    changed = {name for name, tensor in fresh.items() if not torch.equal(whole[name], tensor)}
    assert {"clip.vision_model.encoder.layers.0.mlp.fc1.weight", "decoder.film_mul.weight"} < changed
    assert not any("text" in name for name in changed)  # the pocket CLIP reads the texts


def test_flags_that_will_not_do_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_pocket_segmenter.main(["--output", str(tmp_path), "--num-scenes", "2"]) == 2
    assert "--num-scenes must be at least --batch-size 48, got 2." in capsys.readouterr().err
    assert make_pocket_segmenter.main(["--output", str(tmp_path), "--tower-steps", "0"]) == 2
    assert "--tower-steps must be at least 1, got 0." in capsys.readouterr().err


def test_subjects_of_one_class_are_told_apart_as_fits_best() -> None:
    one, other, none = (np.zeros((4, 4), bool) for _ in range(3))
    one[:2], other[2:] = True, True
    assert segmenter.subject_ious([other, one, none], [one, other, one], ["cat", "cat", "mug"]) == [1, 1, 0]
    assert overlap_of_masks(none, none) == 0


def test_the_shipped_segmenter_finds_the_subjects_of_held_out_scenes() -> None:
    record = json.loads((ASSETS / train_segmenter.RECORD).read_text())
    assert record["digest"] == weights_digest(ASSETS / "segmenter" / "model.safetensors")
    assert sum(file.stat().st_size for file in (ASSETS / "segmenter").iterdir()) < 5e6
    found = ClipSegSegmenter(str(ASSETS / "segmenter"), torch.device("cpu"), torch.float32, 0.5)
    for k in (1, 3):
        measured, stated = segmenter.measure(found, k, 8), record["held_out"]["distinct"][str(k)]
        assert measured["iou"] > stated["iou"] - 0.1
        assert measured["found"] > 0.9
