"""What constructed data are worth: a construction that is exact is found to be exact, and every kind of fault is found."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mosaic.data.multi_reference.records import reference_grid_of
from preprocess.construct.candidates import Candidate, picture_name, points_name
from preprocess.construct.chunks import Chunks, Stored, as_json
from preprocess.construct.config import ConstructConfig, load_construct_config
from preprocess.construct.references.stage import chosen_edits
from preprocess.construct.rows import Edit, Found, Matched, PointsRow, ReferencesRow, Row, SegmentationRow
from preprocess.construct.run import WORK, stages_of
from scripts.construction.drawings import draw_candidates, scene_of
from scripts.construction.tables import block
from scripts.construction.tracing import every_candidate, trace
from scripts.pocket import world

COUNT = 6


@pytest.fixture(scope="module")
def config() -> ConstructConfig:
    return load_construct_config("configs/construct_pocket.json", ["num_samples=6", "chunk_size=6"])


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, config: ConstructConfig) -> Path:
    """A construction whose masks, references and points are those of the world."""
    output = tmp_path_factory.mktemp("worth")
    draw_candidates(config, output, COUNT)
    stages, chunks = stages_of(config), Chunks(output / WORK, config.chunk_size)
    for stage in stages[2:]:
        candidates = chunks.candidates(stages, 0)
        with chunks.adding(stage, 0, {}) as (folder, added):
            for candidate in candidates:
                row = exact_row(stage.name, candidate, scene_of(candidate.number, config), folder)
                added.append(Stored(row, as_json(stage.inputs(candidate))))
    return output


def exact_row(stage: str, candidate: Candidate, scene: world.Scene, folder: Path) -> Row:
    subjects = range(len(scene.placements))
    if stage == "segmentation":
        for k, mask in enumerate(world.render_scene(scene, 64).masks):
            Image.fromarray(mask * 255).save(folder / picture_name(candidate.number, f"mask{k}"))
        found = Found(box=(0, 0, 1, 1), score=0.9, number_found=1, area=0.1, truncated=0, overlap=0)
        return SegmentationRow(number=candidate.number, subjects=(found,) * len(subjects))
    if stage == "references":
        for k in subjects:
            world.render_reference(scene.placements[k].identity, 32).save(folder / picture_name(candidate.number, f"ref{k}_0"))
        edit = Edit(seed=0, instruction="", scores={"similarity": 0.9, "contrast": 0.5, "border": 1.0})
        return ReferencesRow(number=candidate.number, subjects=((edit,),) * len(subjects))
    assert reference_grid_of((32, 32), 32) == (32, 32)
    pairs = {f"{k}": torch.from_numpy(world.correspondences(scene, k, 32, 32, 32)).int().contiguous() for k in subjects}
    save_file(pairs, folder / points_name(candidate.number))
    matched = [Matched(edit=0, number_of_points=len(one), scores={"affine": 0.9}) for one in pairs.values()]
    return PointsRow(number=candidate.number, subjects=tuple(matched))


def test_an_exact_construction_is_found_exact(exact: Path, config: ConstructConfig) -> None:
    decisions, candidates = every_candidate(config, exact)
    assert [decisions.dropped(candidate) for candidate in candidates] == [None] * COUNT
    assert {len(candidate.prompt.subjects) for candidate in candidates} > {1}
    for candidate in candidates:
        assert chosen_edits(config.references, candidate) == (0,) * len(candidate.prompt.subjects)
        assert candidate.prompt.prompt == world.caption(scene_of(candidate.number, config))
        assert all(subject.phrase in candidate.prompt.prompt for subject in candidate.prompt.subjects)
    found = trace(config, exact, COUNT, drawn=True)
    assert found["yields"] == dict.fromkeys(("prompts", "synthesis", "segmentation", "references", "points"), 1.0)
    assert found["iou"] == found["found"]["iou"] == found["right"]["share"] == found["found"]["share"] == 1.0
    assert found["candidates"] == COUNT
    assert trace(config, exact, 2, drawn=True)["candidates"] == 2
    assert found["recognised"]["share"] > 0.8
    assert found["same_looks"]["palette"]["share"] > 0.8
    assert found["same_looks"]["looks"]["count"] == sum(len(candidate.prompt.subjects) for candidate in candidates)


def test_faults_of_every_stage_are_found(exact: Path, config: ConstructConfig, tmp_path: Path) -> None:
    """Masks moved by eight pixels, the references of the candidate before, points moved by a quarter of the reference."""
    spoilt = tmp_path / "spoilt"
    shutil.copytree(exact, spoilt)
    chunks = Chunks(spoilt / WORK, config.chunk_size)
    for path in chunks.folder("segmentation", 0).glob("*.png"):
        Image.fromarray(np.roll(np.asarray(Image.open(path)), 8, axis=1)).save(path)
    for path in chunks.folder("references", 0).glob("*.png"):
        other = world.sample_identity(np.random.default_rng(7), "rocket", "heldout")
        world.render_reference(other, 32).save(path)
    for path in chunks.folder("points", 0).glob("*.safetensors"):
        moved = {name: torch.stack([(pairs[:, 0] + 8 * 32) % 1024, pairs[:, 1]], dim=1) for name, pairs in load_file(path).items()}
        save_file(moved, path)
    found = trace(config, spoilt, COUNT, drawn=True)
    assert found["iou"] < 0.6
    assert found["right"]["share"] < 0.1
    assert found["recognised"]["share"] < 0.5
    assert found["same_looks"]["looks"]["share"] < 0.3
    assert "iou" not in trace(config, spoilt, COUNT, drawn=False)


def test_the_tables_hold_each_number_and_its_difference() -> None:
    def run(arm: str, seed: int, hit: str) -> dict[str, Any]:
        measured = {"scenes": dict.fromkeys(("identification", "leakage", "presence"), hit)}
        cells = {f"distinct_k{k}": copy.deepcopy(measured) for k in (1, 2)}
        return {"arm": arm, "meaning": arm, "seed": seed, "seconds": 1800.0, "measures": {"9": {"pictures": cells}}}

    share = {"share": 0.5, "low": 0.4, "high": 0.6, "count": 10}
    traced = {"yields": {"points": 0.25}, "candidates": 20, "references": {"1": 4, "3": 1}, "same_looks": {"looks": share}}
    drawn = traced | {"found": share | {"iou": 0.7}, "iou": 0.8, "recognised": share, "right": share, "points": 30.0}
    results = {
        "date": "2026-12-01T00:00:00",
        "samples": 5,
        "steps": 9,
        "cases": 4,
        "hardware": {"processor": "CPU"},
        "cells": ["distinct_k1", "distinct_k2"],
        "traces": {"drawn": drawn, "constructed": traced},
        "runs": [run(arm, seed, hit) for arm, hit in (("exact", "1 1 1 0"), ("constructed", "0 0 1 0")) for seed in (40, 41)],
    }
    text = block(results)
    assert "5 samples each, 9 steps of batch 16, 2 training seeds, 4 held-out scenes" in text
    assert "together 2.0 h" in text
    (row,) = [line for line in text.splitlines() if "identification" in line and "constructed - exact" in line]
    assert row.count("-50.0 [") == 2
    assert "| leakage, % | exact | - | 75.0 [" in text
    assert "| candidates per sample | 4.0 | 4.0 |" in text
    assert "| samples with 1, 2, 3 references | 4, 0, 1 | 4, 0, 1 |" in text
    assert "| passes stage 5, `points` | 25 | 25 |" in text
    assert "50.0 [40.0, 60.0]; 30" in text
