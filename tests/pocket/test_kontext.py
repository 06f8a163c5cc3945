"""The pocket Kontext: its tokens as diffusers' pipeline has them, its inputs, its measure, and a training that goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from PIL import Image
from safetensors.torch import load_file

from scripts import make_pocket_kontext
from scripts.pocket import kontext, train_kontext, world
from scripts.pocket.base_data import PANEL_GRID
from scripts.pocket.scenes import Scene


def test_position_ids_are_those_of_the_pipeline() -> None:
    ids = FluxKontextPipeline._prepare_latent_image_ids(1, PANEL_GRID, PANEL_GRID, "cpu", torch.float32)
    given = ids.clone()
    given[..., 0] = 1
    assert torch.equal(kontext.position_ids(), torch.cat([ids, given]))


def test_cut_outs_stand_on_white_and_worn_masks_stay_near() -> None:
    picture, mask = Image.new("RGB", (64, 64), (200, 0, 0)), np.zeros((64, 64), bool)
    mask[10:40, 30:50] = True
    found = np.asarray(kontext.cut_out(picture, mask, 0.9, Image.Resampling.NEAREST))
    red = found[..., 1] == 0
    assert red.any(1).sum() == round(kontext.PIXELS * 0.9)
    assert (found[~red] == 255).all()
    columns = np.nonzero(red.any(0))[0]
    assert abs(columns[0] + columns[-1] - (kontext.PIXELS - 1)) <= 1, "in the middle"
    rng = np.random.default_rng(0)
    for _ in range(50):
        worn = kontext.worn_mask(mask, rng)
        assert (worn & mask).sum() / (worn | mask).sum() > 0.3


def test_references_are_judged_in_scenes() -> None:
    scene = world.sample_scene(3, "heldout", 1)
    reference = world.render_reference(scene.placements[0].identity, kontext.PIXELS)
    shown = np.asarray(train_kontext.in_a_scene(reference, 4))
    bare = np.asarray(world.render_scene(Scene(world.BACKGROUNDS[4], 4, ()), 64).image)
    inner = slice(16, 48)
    assert (shown[:16] == bare[:16]).all()
    subject = np.asarray(reference).min(axis=2) < train_kontext.NEAR_WHITE
    assert (shown[inner, inner][subject] == np.asarray(reference)[subject]).all()
    corner = np.zeros_like(subject)
    corner[:2, :2] = True
    assert (shown[inner, inner][corner] == bare[inner, inner][corner]).all(), "white around it is background"
    assert train_kontext.outline_agreement(reference, reference) == 1


def arguments(output: Path, *more: str) -> list[str]:
    small = ["--num-scenes", "2", "--batch-size", "2", "--rank", "2", "--test-scenes", "1", "--test-steps", "1", "--steps", "3"]
    return ["--output", str(output), *small, *more]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_a_training_goes_on_and_its_lora_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_kontext, "_CHECKPOINT_EVERY", 1)
    assert make_pocket_kontext.main(arguments(tmp_path / "whole")) == 0
    append, steps = train_kontext.runs.save_checkpoint, []

    def stop(*given: object) -> None:
        append(*given)
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_kontext.runs, "save_checkpoint", stop)
        assert make_pocket_kontext.main(arguments(tmp_path / "stopped")) == 130
    assert make_pocket_kontext.main(arguments(tmp_path / "stopped")) == 0
    found, wanted = (load_file(tmp_path / name / "kontext" / kontext.WEIGHTS) for name in ("stopped", "whole"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert any(bool(value.any()) for name, value in wanted.items() if ".lora_B." in name)
    record = json.loads((tmp_path / "whole" / "kontext" / train_kontext.RECORD).read_text())
    assert record["held_out"]["1_steps"]["reference"]["class"]["share"] == 1
    assert make_pocket_kontext.main(arguments(tmp_path / "whole", "--lr", "1")) == 2
