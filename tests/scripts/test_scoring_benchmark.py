"""benchmark.py scoring: what it measures in one process."""

from pathlib import Path

import pytest

from scripts.benchmarks import command, scoring


@pytest.mark.usefixtures("fresh_accelerator")
def test_references_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "SUBJECTS", 2)
    scoring.write_pictures(tmp_path, 32)
    found = scoring.measure(tmp_path, 12)
    assert (found["pictures"], found["references"]) == (12, 10)
    assert 0 < found["ms_looking"] < found["ms"]
    assert len((tmp_path / "scores_12" / "records.jsonl").read_text().splitlines()) == 3 * 12


def test_flags() -> None:
    args = command.parse(["scoring", "--pictures", "6", "12"])
    assert (args.pictures, args.size) == ([6, 12], 512)
