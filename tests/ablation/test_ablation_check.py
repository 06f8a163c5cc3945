"""Shipped adapters against their rows: what is measured, what counts as reproduced, and what is missing."""

import json
from pathlib import Path
from typing import Any

import pytest

from mosaic.config.loading import load_config, resolved_dict
from mosaic.lora.adapter import write_reference_lora
from scripts.ablation import check as ablation_check
from scripts.ablation.plan import WORLD_DIGEST, base_digest, judge_digest
from scripts.ablation.results import BEFORE, FORMAT, VERSION
from scripts.ablation.tasks import Task, features_file
from scripts.ablation_check import main
from tests import runs


def measures(identification: float) -> dict[str, Any]:
    entry = {"share": identification, "low": identification - 0.1, "high": identification + 0.1, "count": 20}
    return {"identification": entry, "leakage": {"share": None, "low": None, "high": None, "count": 0}, "presence": entry}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of two arms, one of which has two seeds, and their adapters; as the ablation before the trial wrote them."""
    config = resolved_dict(load_config("configs/pocket.json", ["model.reference_attention=isolated"]))
    for name in ("scal", "paper"):
        write_reference_lora(runs.lora_tensors(), tmp_path / f"arms/{name}.safetensors", config)
    entries = [("base", 0, 0.1), ("scal", 0, 0.5), ("scal", 1, 0.9), ("paper", 0, 0.3)]
    found = {
        "format": FORMAT,
        "version": BEFORE,
        "size": {"cases": 2},
        "commit": "abc",
        "model": {"name": "assets/pocket/flux", "digest": base_digest("assets/pocket/flux")},
        "judge_digest": judge_digest(),
        "world_digest": WORLD_DIGEST,
        "real": {"1": {}, "2": {}},
        "runs": [
            {"arm": arm, "seed": seed, "steps": 9, "parts": ["main"], "adapter_digest": None if arm == "base" else "a",
             "measures": {"1": measures(share), "2": measures(share)}}
            for arm, seed, share in entries
        ],
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(found))
    return tmp_path


def check(folder: Path, *flags: str) -> int:
    places = ["--results", str(folder / "results.json"), "--arms", str(folder / "arms"), "--output", str(folder / "check")]
    return main([*places, *flags])


@pytest.mark.parametrize(("identification", "code"), [(0.45, 0), (0.61, 1), (0.2, 1)])
def test_shares_must_lie_within_the_intervals_of_seed_0(
    folder: Path, identification: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Task] = []

    def measure(task: Task) -> dict[str, Any]:
        seen.append(task)
        features_file(task).write_bytes(b"")
        return measures(0.3 if task.lora and "paper" in task.lora else identification)

    monkeypatch.setattr(ablation_check, "measure", measure)
    assert check(folder, "--ks", "2", "1") == code
    assert [(task.kind, task.num_references) for task in seen] == 2 * [("pictures", 1), ("pictures", 2)]
    assert {(task.cases, task.regime, task.first_scene) for task in seen} == {(2, "distinct", 0)}
    assert load_config(seen[-1].config).model.reference_attention == "isolated"
    table = capsys.readouterr().out
    assert f"| scal | distinct, K = 2 | - | {100 * identification:.1f} ({'in' if not code else 'NOT in'} 40.0 to 60.0) | - |" in table
    assert "| paper | distinct, K = 1 | - | 30.0 (in 20.0 to 40.0)" in table
    seen.clear()
    assert check(folder, "--ks", "1", "2") == code  # measured already
    assert seen == []


def test_adapters_of_the_trial_are_measured_in_all_cells(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of each arm that of the lowest seed of its part, at its end."""
    results = json.loads((folder / "results.json").read_text())
    rows = {"distinct_k2": measures(0.5), "twins_k2": {"apart": measures(0.3)["identification"]}}
    of_steps = {"5": {"pictures": {"distinct_k2": measures(0.9)}}, "10": {"pictures": rows}}
    runs_ = [
        {"part": part, "arm": "light", "seed": seed, "adapter_digest": "a", "first_scene": 300, "measures": of_steps if seed == 10 else {}}
        for part, seed in (("late", 21), ("scratch", 11), ("scratch", 10))
    ]
    (folder / "results.json").write_text(json.dumps({**results, "version": VERSION, "runs": runs_}))
    (folder / "arms/scal.safetensors").rename(folder / "arms/scratch_light.safetensors")
    seen: list[Task] = []

    def measure(task: Task) -> dict[str, Any]:
        seen.append(task)
        features_file(task).write_bytes(b"")
        return rows[f"{task.regime}_k{task.num_references}"]

    monkeypatch.setattr(ablation_check, "measure", measure)
    assert check(folder, "--ks", "2") == 0
    assert [(task.regime, task.num_references, task.first_scene) for task in seen] == [("distinct", 2, 300), ("twins", 2, 300)]
    table = capsys.readouterr().out
    assert "| scratch_light | twins, K = 2 | 30.0 (in 20.0 to 40.0) | - | - | - |" in table
    assert "| scratch_light | distinct, K = 2 | - | 50.0 (in 40.0 to 60.0) | - | 50.0 (in 40.0 to 60.0) |" in table


def test_another_world_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "judge_digest": "other", "world_digest": "other"}))
    assert check(folder, "--ks", "1") == 2
    assert "the judge and the world of this checkout are not those of the results: check out abc." in capsys.readouterr().err


def test_what_is_missing_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(folder, "--ks", "5") == 2
    assert "has K = 1, 2, got 5" in capsys.readouterr().err
    (folder / "arms/paper.safetensors").unlink()
    assert check(folder, "--ks", "1") == 2
    assert "paper.safetensors" in capsys.readouterr().err
    (folder / "results.json").unlink()
    assert check(folder) == 2
    assert "file not found" in capsys.readouterr().err
