"""lora_tools.py push: a card that says what the adapter is, beside adapter, scores and examples; nothing uploaded in a dry run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from scripts import lora_tools
from scripts.loras import publishing
from tests.evaluation import toys
from tests.runs import files_below

LORA = Path(__file__).resolve().parents[2] / "assets/pocket/lora.safetensors"
BASE = ["--base-model", "black-forest-labs/FLUX.1-dev"]


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """A command with scores and an example."""
    scores = {
        "format": "mosaic-scores", "version": 1, "benchmark": "dreambench", "dino": 61.234, "intervals": {"dino": [60.0, 62.5]},
        "num_cases": 12, "num_runs": 6, "protocol": {"runs": 6, "size": 512, "seed": 3407}, "partial": False, "left_out": [],
        "models": {"dino": {"model": "facebook/dino-vits16", "revision": "0123456789", "preprocessing": "p"}},
    }  # fmt: skip
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "scores.json").write_text(json.dumps(scores))
    toys.picture(1).save(tmp_path / "example.PNG")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.parquet").write_bytes(b"rows")
    flags = ["--lora", str(LORA), "--scores", f"Mine={tmp_path / 'scores'}", "--examples", str(tmp_path / "example.PNG")]
    return ["push", "user/name", *flags, "--data", str(tmp_path / "data")]


def test_a_dry_run_writes_what_would_be_uploaded(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "HfApi", lambda: pytest.fail("nothing may be uploaded"))
    assert lora_tools.main([*given, *BASE, "--dry-run", str(tmp_path / "card")]) == 0
    files = files_below(tmp_path / "card")
    assert sorted(files) == ["README.md", "examples/0.png", "lora.safetensors", "scores/0.json"]
    assert files["lora.safetensors"] == LORA.read_bytes()
    _, header, text = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": "black-forest-labs/FLUX.1-dev", "library_name": "diffusers", "license": "other",
        "license_name": "flux-1-dev-non-commercial-license", "pipeline_tag": "text-to-image",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
        "tags": ["lora", "flux", "multi-subject", "subject-driven", "mosaic"],
    }  # fmt: skip
    digest = publishing.file_digest(tmp_path / "data" / "manifest.parquet")
    for said in (
        "up to 6 references",
        "rank 32",
        "losses `light`",
        digest,
        "image_guidance_scale 2.0",
        "(examples/0.png)",
        "--lora user/name",
    ):
        assert said in text
    assert "| **Mine** | - | - | 61.23 (60.0 to 62.5) | 3 |" in text
    assert "DIFFERS from the protocol in cases (12, not 750)" in text


def test_pushing_uploads_the_same(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uploaded: dict[str, Any] = {}
    hub = SimpleNamespace(
        create_repo=lambda repo_id, **options: uploaded.update(repo=repo_id, private=options["private"]),
        model_info=lambda repo_id: SimpleNamespace(private=False),
        upload_folder=lambda **options: uploaded.update(files=files_below(Path(options["folder_path"])), to=options["repo_id"]),
    )
    monkeypatch.setattr(publishing, "HfApi", lambda: hub)
    assert lora_tools.main([*given, *BASE, "--dry-run", str(tmp_path / "card")]) == 0
    assert lora_tools.main([*given, *BASE]) == 0
    assert (uploaded["repo"], uploaded["to"], uploaded["private"]) == ("user/name", "user/name", False)
    assert uploaded["files"] == files_below(tmp_path / "card")
    del uploaded["files"]
    assert lora_tools.main([*given, *BASE, "--private"]) == 2
    assert "files" not in uploaded
    assert "is there already, and public" in capsys.readouterr().err


@pytest.mark.parametrize(("changes", "message"), [
    ([], "--base-model: must be given as a hub id, for the LoRA was trained on assets/pocket/flux"),
    (["--base-model", "user/base"], "--license: must be given, for the licence of user/base is not known"),
    ([*BASE, "--data", "none"], "manifest.parquet is missing"),
    ([*BASE, "--scores", "none"], "none"),
    ([*BASE, "--examples", "none.png"], "none.png"),
    ([*BASE, "--lora", "none.safetensors"], "none.safetensors"),
    ([*BASE, "--dry-run", "."], "is there already"),
])  # fmt: skip
def test_what_push_refuses(
    changes: list[str], message: str, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(publishing, "HfApi", lambda: pytest.fail("nothing may be uploaded"))
    assert lora_tools.main([*given, "--dry-run", "card", *changes]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "card").exists()


def test_a_name_that_the_hub_does_not_take(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given[1] = "user/na me"
    assert lora_tools.main([*given, *BASE, "--dry-run", str(tmp_path / "card")]) == 2
    assert "user/na me" in capsys.readouterr().err
