"""Stage 5 and 6 on pocket scenes whose masks and references are exact: points as matching finds them, and the samples made of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mosaic.config.schema import FieldError
from mosaic.data import Manifest
from mosaic.data.multi_reference.points_file import read_match_scores
from mosaic.method.grids import Grid
from preprocess.construct.candidates import Candidate, picture_name
from preprocess.construct.config import ConstructConfig
from preprocess.construct.exporting import export
from preprocess.construct.points.settings import PointsSettings
from preprocess.construct.points.stage import PointsWorker, points_stage
from preprocess.construct.rows import Edit, Found, PointsRow, PromptRow, ReferencesRow, SegmentationRow, Subject, SynthesisRow
from preprocess.extractors import build_extractor, extractor_spec
from preprocess.matching.samples import ReferencePicture, SamplePictures, match_sample, sample_seed

SETTINGS: dict[str, Any] = {"extractors": {"pixels": {"cells": 16}}, "target_cells": 16, "reference_cells": 16}
FOUND = Found(box=(0, 0, 8, 8), score=0.9, number_found=1, area=0.1, truncated=0.0, overlap=0.0)


def checkerboard(seed: int, size: int = 32) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 200, (8, 8, 3)).astype(np.uint8)
    return Image.fromarray(colours).resize((size, size), Image.Resampling.NEAREST)


@pytest.fixture
def candidate(tmp_path: Path) -> Candidate:
    """Two subjects, each half of the picture; of the first one two tries, of which the second is its own half."""
    folders = {name: tmp_path / name for name in ("synthesis", "segmentation", "references", "points")}
    for folder in folders.values():
        folder.mkdir()
    target = Image.new("RGB", (64, 32))
    parts = [checkerboard(0), checkerboard(1)]
    for k, part in enumerate(parts):
        target.paste(part, (32 * k, 0))
        mask = np.zeros((32, 64), np.uint8)
        mask[:, 32 * k : 32 * k + 32] = 255
        Image.fromarray(mask).save(folders["segmentation"] / picture_name(7, f"mask{k}"))
    target.save(folders["synthesis"] / picture_name(7))
    checkerboard(5).save(folders["references"] / picture_name(7, "ref0_0"))
    parts[0].save(folders["references"] / picture_name(7, "ref0_1"))
    parts[1].save(folders["references"] / picture_name(7, "ref1_0"))
    subjects = (Subject(phrase="a red cat", name="cat", kind="animal"), Subject(phrase="a mug", name="mug", kind="object"))
    edits = tuple(Edit(seed=j, instruction=f"turn {j}", scores={"similarity": 0.8}) for j in range(2))
    return Candidate(
        7,
        folders,
        PromptRow(number=7, prompt="a red cat and a mug, at night", caption="a red cat and a mug", subjects=subjects, seed=3),
        SynthesisRow(number=7, seed=4, height=32, width=64, scores={"blur": 0.5}),
        SegmentationRow(number=7, subjects=(FOUND, FOUND)),
        ReferencesRow(number=7, subjects=(edits, edits[:1])),
    )


def matched(candidate: Candidate, settings: PointsSettings, chosen: tuple[int | None, ...]) -> Candidate:
    stage = points_stage(settings, 0, torch.float32, lambda _: chosen)
    (row,) = stage.load(torch.device("cpu"))([candidate], candidate.folders["points"])
    assert isinstance(row, PointsRow)
    assert stage.inputs(candidate) == list(chosen)
    rows = candidate.synthesis, candidate.segmentation, candidate.references
    return Candidate(candidate.number, candidate.folders, candidate.prompt, *rows, row)


def test_points_are_those_of_matching_on_the_chosen_pictures(candidate: Candidate, tmp_path: Path) -> None:
    config = ConstructConfig(num_samples=1, points=SETTINGS)
    done = matched(candidate, config.points, (1, 0))
    target, masks = Image.open(candidate.folders["synthesis"] / picture_name(7)), np.zeros((2, 32, 64), bool)
    masks[0, :, :32] = masks[1, :, 32:] = True
    references = [ReferencePicture(checkerboard(k), Grid(16, 16), masks[k]) for k in range(2)]
    extractor = build_extractor(extractor_spec("pixels", {"cells": 16}))
    wanted = match_sample(SamplePictures(target, Grid(12, 23), references), [extractor], config.points.matching, sample_seed(0, "7"))
    assert done.points is not None
    assert [one.number_of_points for one in done.points.subjects if one] == [len(found.pairs) for found in wanted]
    assert min(len(found.pairs) for found in wanted) > 50

    assert export(config, lambda: iter([done]), {"points": {"seed": 0}}, tmp_path / "dataset")
    assert not export(config, lambda: iter([done]), {"points": {"seed": 0}}, tmp_path / "dataset"), "it is there"
    manifest = Manifest(tmp_path / "dataset", "train")
    row = manifest.row(0)
    for k, found in enumerate(wanted):
        assert torch.equal(manifest.read_points(row)[k].long(), found.pairs)
        assert np.array_equal(manifest.read_mask(row, k, target) > 0, masks[k])
    stored = manifest.read_picture(row.references[0].image, "reference")
    assert np.array_equal(np.asarray(stored), np.asarray(checkerboard(0))), "the second try"
    assert torch.equal(load_file(tmp_path / "dataset" / row.points)["1.similarity"], wanted[1].similarity.half())
    counts = [len(found.pairs) for found in wanted]
    assert counts[0] != counts[1]
    stricter = config.replace(points=config.points.replace(limits={"min_points": max(counts)}))
    assert export(stricter, lambda: iter([done]), {"points": {"seed": 0}}, tmp_path / "dataset"), "other references, another data set"
    export(config, lambda: iter([done]), {"points": {"seed": 0}}, tmp_path / "dataset")
    assert read_match_scores((tmp_path / "dataset" / row.points).read_bytes(), 2)[0].keys() == {"cyclic"}
    assert row.prompt == "a red cat and a mug"
    assert [entry.phrase for entry in row.references] == ["a red cat", "a mug"]
    assert next(manifest.column("references"))[0]["kind"] == "animal"


def test_a_reference_without_points_goes_and_its_sample_stays(candidate: Candidate, tmp_path: Path) -> None:
    config = ConstructConfig(num_samples=1, points=SETTINGS)
    done = matched(candidate, config.points, (None, 0))
    stage = points_stage(config.points, 0, torch.float32, lambda _: (None, 0))
    assert done.points is not None
    assert done.points.subjects[0] is None
    assert stage.reasons(done) == []
    export(config, lambda: iter([done]), {}, tmp_path / "dataset")
    row = Manifest(tmp_path / "dataset", "train").row(0)
    assert [entry.phrase for entry in row.references] == ["a mug"]
    assert row.prompt == "a red cat and a mug", "the picture shows both"
    two = config.points.replace(limits={"min_references": 2})
    assert points_stage(two, 0, torch.float32, lambda _: (None, 0)).reasons(done) == ["no reference"]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"min_points": 10_000}, "min_points"),
        ({"min_similarity": 1.1}, "min_similarity"),
        ({"min_cyclic": 1.0}, "min_cyclic"),
        ({"min_affine": 0.99}, "min_affine"),
        ({"min_coherence": 0.9}, "min_coherence"),
    ],
)
def test_limits_of_points(limits: dict[str, float], reason: str, candidate: Candidate) -> None:
    settings = {**SETTINGS, "matching": SETTINGS.get("matching", {}) | {"affine": 3}}
    done = matched(candidate, PointsSettings(**settings), (0, None))
    assert points_stage(PointsSettings(**settings, limits={"min_points": 1}), 0, torch.float32, lambda _: (0, None)).reasons(done) == []
    found = points_stage(PointsSettings(**settings, limits={"min_points": 1, **limits}), 0, torch.float32, lambda _: (0, None)).reasons(
        done
    )
    assert found == sorted(["no reference", reason])


def test_settings_of_points_are_checked() -> None:
    with pytest.raises(FieldError, match="there is no extractor"):
        PointsSettings(extractors={"diftt": {}})
    with pytest.raises(FieldError, match="needs two extractors"):
        PointsSettings(extractors={"pixels": {}}, limits={"min_agreement": 0.5})
    with pytest.raises(FieldError, match=r"needs points\.matching\.affine"):
        PointsSettings(extractors={"pixels": {}}, limits={"min_affine": 0.5})


def test_noise_of_extractors_follows_from_the_seed_and_the_candidate(candidate: Candidate) -> None:
    worker = points_stage(PointsSettings(**SETTINGS), 3, torch.float32, lambda _: (0, None)).load(torch.device("cpu"))
    assert isinstance(worker, PointsWorker)
    (extractor,), seeds = worker.extractors, set()

    def listening(image: Image.Image, seed: int) -> torch.Tensor:
        seeds.add(seed)
        return extractor(image, seed)

    worker.extractors = [listening]
    list(worker([candidate], candidate.folders["points"]))
    assert seeds == {sample_seed(3, f"{candidate.number}")}
