"""preprocess/construct.py from prompts to a data set, with random models of the real classes: what it writes, and that neither kills nor
processes nor the way there show in it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mosaic.data import Manifest
from preprocess.construct import command as construct
from tests import forks, tiny, tiny_extractors
from tests.evaluation import tiny_models

NUM_SAMPLES = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a random segmenter finds passes; the cut-outs are the references."""
    folder = tmp_path_factory.mktemp("models")
    settings: dict[str, Any] = {
        "num_samples": NUM_SAMPLES,
        "max_candidates": 8,
        "dtype": "float32",
        "chunk_size": 2,
        "prompts": {
            "templates": "preprocess/construct/prompts/templates_pocket.json",
            "num_subjects": [0.5, 0.5],
            "limits": {"max_uses": None},
        },
        "synthesis": {
            "model": str(tiny_extractors.save_flux(folder / "flux")),
            "sizes": [[16, 24]],
            "num_inference_steps": 1,
            "max_sequence_length": tiny.TEXT_LENGTH,
            "batch_size": 2,
            "limits": {"max_uniformity": 0.9},
        },
        "segmentation": {
            "kind": "clipseg",
            "model": str(tiny_models.write_clipseg(folder / "clipseg")),
            "detector": None,
            "mask_threshold": 0.1,
            "limits": dict.fromkeys(("min_score", "min_area", "max_area", "max_truncated", "max_overlap", "max_rival")),
        },
        "references": {
            "editor": "none",
            "size": [16, 16],
            "encoder": None,
            "limits": {"min_border": None, "min_contrast": None, "min_similarity": None, "max_similarity": None},
        },
        "points": {
            "extractors": {"pixels": {"cells": 8}},
            "target_cells": 8,
            "reference_cells": 8,
            "limits": {"min_points": 2},
        },
        "output": {"test_share": 0.3},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    return path


def arguments(config: Path, output: Path, *more: str) -> list[str]:
    return [str(config), "--output", str(output), "--device", "cpu", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, without the doctor's look, which random pictures do not stand."""
    output = tmp_path_factory.mktemp("whole") / "constructed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocess.construct.run.examine", lambda *args: 0)
        assert construct.main(arguments(config, output)) == 0
    return output


def test_samples_come_out(whole: Path) -> None:
    rows = [
        (row, manifest)
        for split in ("train", "test")
        for manifest in [Manifest(whole / "dataset", split)]
        for row in map(manifest.row, range(len(manifest)))
    ]
    assert len(rows) == NUM_SAMPLES
    for row, manifest in rows:
        points = manifest.read_points(row)
        assert all(len(pairs) >= 2 for pairs in points)
        metadata = json.loads(row.metadata)
        assert metadata["source"] == "construction"
        assert all(entry.phrase in row.prompt for entry in row.references)
    description = json.loads((whole / "dataset" / "dataset.json").read_text())
    assert description["license"] == "other"
    assert description["construction"].keys() == {"prompts", "synthesis", "segmentation", "references", "points"}
    assert "<h1" in (whole / "report" / "index.html").read_text()


def test_processes_and_single_stages_do_not_show(config: Path, whole: Path, tmp_path: Path) -> None:
    shared = tmp_path / "constructed"
    started = forks.start("preprocess/construct.py", *arguments(config, shared), output=tmp_path / "log.txt", processes=2)
    forks.wait(started)
    assert contents(shared / "dataset") == contents(whole / "dataset"), (tmp_path / "log.txt").read_text()
    assert (shared / "report" / "index.html").read_bytes() == (whole / "report" / "index.html").read_bytes()
    shutil.rmtree(shared / "dataset")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocess.construct.run.examine", lambda *args: 1)
        assert construct.main(arguments(config, shared, "--stages", "6")) == 1, "the doctor's word is the command's"
    assert contents(shared / "dataset") == contents(whole / "dataset")


def test_a_dry_run_computes_nothing(config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(whole)
    assert construct.main(arguments(config, whole, "--dry-run")) == 0
    assert "synthesis" in capsys.readouterr().out
    assert contents(whole) == before
    assert construct.main(arguments(config, tmp_path / "nothing", "--dry-run")) == 0
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "begun" / "work").mkdir(parents=True)  # killed before its first chunk
    assert construct.main(arguments(config, tmp_path / "begun", "--dry-run")) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--stages", "2-3"], "Run the stage prompts first"),
        (["--set", "num_sample=3"], "num_sample"),
        (["--set", "points.limits.min_point=3"], "points.limits.min_point is not a known setting"),
        (["--set", "points.limits.min_points=100000"], "samples are wanted, but only 0 of"),
    ],
)
def test_users_mistakes_are_told(more: list[str], words: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert construct.main(arguments(config, tmp_path / "constructed", *more)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "constructed" / "dataset").exists()


@pytest.mark.parametrize("text", ["0", "3-2", "7", "1-", "x", "1-2-3"])
def test_stages_are_a_range(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        construct.parse_arguments(["config.json", "--output", "x", "--stages", text])
    assert "must be a stage of 1 to 6" in capsys.readouterr().err
