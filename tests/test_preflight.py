"""The look before a run: what it counts, what it finds, and what its exit code says."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError

from mosaic.config import Config, from_dict, load_config
from mosaic.digests import file_digest
from mosaic.planning import memory_model, preflight, preflight_checks
from mosaic.planning.memory_model import BASE, BUCKETS, CONTEXT, EMA, ENCODERS, GIB, OPTIMIZER, ROWS, SAVED, TRANSIENT
from mosaic.planning.model_shape import FLUX_DEV_SHAPE
from mosaic.planning.preflight_checks import NOTE, OK, STOP
from mosaic.training.checkpoint import CHECKSUMS, REQUIRED
from scripts import memory_table
from scripts.preflight import main
from tests import runs

#: What a dry run could have found; the real one takes half a minute for FLUX.1-dev.
DRY = {"base weights": 22 * GIB, "adapter": GIB, "optimizer state": GIB, "saved activations": 4 * GIB, "transient": GIB, "gradients": GIB}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dry run and no network."""
    monkeypatch.setattr(memory_model, "dry_parts", lambda *arguments: dict(DRY))

    class Hub:
        def model_info(self, *_: Any, **__: Any) -> None:
            raise ConnectionError

    monkeypatch.setattr(preflight_checks, "HfApi", Hub)
    monkeypatch.setattr(preflight_checks, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(preflight_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=200 * GIB))


@pytest.fixture
def config_file(world: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(runs.settings(world, tmp_path / "run")))
    return path


def levels(report: preflight.Preflight) -> dict[str, str]:
    return {finding.subject: finding.level for finding in report.findings}


def test_a_run_that_is_ready(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = runs.files_below(tmp_path)
    assert main([str(config_file), "--json", str(tmp_path / "deep/report.json")]) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "deep/report.json").read_text())
    assert report["ready"]
    assert printed.endswith("ready\n")
    assert report["config"] == json.loads(printed[: printed.index("\n}\n") + 2])
    assert report["counts"]["references"] == 2
    assert report["counts"]["samples"] == 9
    assert report["counts"]["target tokens"] == 24
    assert report["counts"]["reference tokens"] == 18
    assert sum(report["memory_bytes"].values()) > report["memory_bytes"]["base weights"] > 0
    (tmp_path / "deep/report.json").unlink()
    assert runs.files_below(tmp_path) == before
    assert not (tmp_path / "run").exists()


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data.root": "nowhere"}, "stop  data.root: nowhere: there is no such folder"),
    "split": ({"validation.every": 1, "validation.split": "x"}, "stop  validation.split: "),
    "cases": ({"validation.every": 1, "validation.cases": "none.json"}, "stop  validation.cases: "),
    "adapter": ({"lora.pretrained": "none.safetensors"}, "stop  lora.pretrained: none.safetensors: no such file"),
    "semalign": (
        {"data.format": "semalign", "data.image_size": [16, 16], "data.root": "."},
        "stop  data.root: data.root: . lacks the folder data",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
@pytest.mark.usefixtures("quick")
def test_what_would_stop_training(
    kind: str, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides, message = MISTAKES[kind]
    assert main([str(config_file), *(part for key, value in overrides.items() for part in ("--set", f"{key}={json.dumps(value)}"))]) == 1
    printed = capsys.readouterr().out
    assert message in printed
    assert printed.endswith("NOT READY\n")


@pytest.mark.usefixtures("quick")
def test_an_earlier_run_in_the_folder(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run/checkpoints/step_00000002"
    folder.mkdir(parents=True)
    for name in REQUIRED:
        (folder / name).write_text("{}")
    (folder / CHECKSUMS).write_text(json.dumps({name: file_digest(folder / name) for name in REQUIRED}))
    assert main([str(config_file)]) == 1
    assert "holds checkpoints of an earlier run" in capsys.readouterr().out
    assert main([str(config_file), "--resume", "auto"]) == 0
    assert "continues from step_00000002" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_wrong_commands(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config_file), "--set", "data.image_size=[16, 26]"]) == 2
    assert "preflight.py: error: data.image_size or data.buckets: height and width must be" in capsys.readouterr().err
    assert main([str(tmp_path / "none.json")]) == 2
    for arguments, message in (
        ([], "give either CONFIG or --table"),
        (["x", "--gpu-memory", "0"], "--gpu-memory must be positive, got 0.0"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", sorted(path.name for path in Path("configs").glob("*.json") if "schema" not in path.name and path.name != "flux_dev.json")
)
@pytest.mark.usefixtures("quick")
def test_every_preset_is_ready_where_its_data_are(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"data.root={world / 'data'}", f"training.output_dir={tmp_path / 'run'}", "data.format=multi_reference"]
    config = load_config(Path("configs") / name, overrides)
    report = preflight.preflight(config)
    stopped = [
        finding for finding in report.findings if finding.level == STOP and finding.subject not in preflight_checks.PACKAGES.values()
    ]
    assert stopped == []


@pytest.mark.usefixtures("quick")
def test_the_hub(monkeypatch: pytest.MonkeyPatch, world: Path, tmp_path: Path) -> None:
    """Unreachable is worth a note; a gate that is closed to this machine would stop training; a cached copy is all one needs."""
    settings = runs.settings(world, tmp_path / "run") | {"model": {"pretrained": "black-forest-labs/FLUX.1-dev", "text_length": 8}}
    settings["data"] |= {"image_size": [64, 64], "reference_size": 32}
    config = from_dict(settings)
    report = preflight.preflight(config)
    assert levels(report)["model.pretrained"] == NOTE
    assert report.ready

    class Gated:
        def model_info(self, *_: Any, **__: Any) -> None: ...

        def auth_check(self, name: str) -> None:
            raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(preflight_checks, "HfApi", Gated)
    report = preflight.preflight(config)
    assert levels(report)["model.pretrained"] == STOP
    assert "accept its licence" in next(finding.message for finding in report.findings if finding.subject == "model.pretrained")
    monkeypatch.setattr(preflight_checks, "try_to_load_from_cache", lambda *_: "/cache/model_index.json")
    assert levels(preflight.preflight(config))["model.pretrained"] == OK


@pytest.mark.usefixtures("quick")
def test_room_for_checkpoints_and_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 128: 12 bytes per weight, three kept and one being written."""
    facts = preflight_checks.DataFacts(1000, 2)
    (finding,) = preflight_checks.check_disk(flux(), FLUX_DEV_SHAPE, facts)
    assert finding.level == OK
    assert f"4 x 5.181 GiB = {4 * 12 * 463_609_856 / GIB:.1f} GiB" in finding.message
    monkeypatch.setattr(preflight_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=20 * GIB))
    (finding,) = preflight_checks.check_disk(flux(), FLUX_DEV_SHAPE, facts)
    assert finding.level == STOP


def flux(**changes: Any) -> Config:
    """FLUX.1-dev's defaults with other settings."""
    values: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, field = name.split("__")
        values.setdefault(section, {})[field] = value
    return from_dict(values)


@pytest.mark.usefixtures("quick")
def test_a_card_that_is_too_small() -> None:
    for memory, level in ((24.0, STOP), (80.0, OK)):
        assert levels(preflight.preflight(flux(), gpu_memory=memory, num_references=2))["memory"] == level


@pytest.mark.usefixtures("quick")
def test_time_and_flops() -> None:
    """512 px, K = 2, 1024 points: 123.3 TFLOP and the rows' 1.5; recomputing the blocks 180.0; at 40 % of 989 TFLOP/s 0.455 s."""
    report = preflight.preflight(flux(training__gradient_accumulation_steps=2), gpu_memory=80, num_references=2)
    assert report.model_tflop_per_step == pytest.approx(2 * 124.8, rel=2e-3)
    assert report.tflop_per_step == pytest.approx(2 * (178.5 + 1.5), rel=2e-3)
    assert report.hours_per_1k_steps * 3.6 == pytest.approx(2 * 180.0 / (0.4 * 989), rel=2e-3)


@pytest.mark.usefixtures("quick")
def test_parts_beside_the_dry_run() -> None:
    adapter = 4 * 463_609_856
    parts = memory_model.predict_memory(flux(optimizer__ema_decay=0.99), FLUX_DEV_SHAPE, 2, num_processes=2)
    assert (parts[EMA], parts[BUCKETS], parts[OPTIMIZER]) == (adapter, adapter, 2 * adapter)
    assert parts[ENCODERS] == 2 * (83_819_683 + 123_060_480 + 4_762_310_656)
    assert parts[CONTEXT] > 0
    assert memory_model.predict_memory(flux(), FLUX_DEV_SHAPE, 2, device_type="cpu")[CONTEXT] == 0
    packed = memory_model.predict_memory(flux(), FLUX_DEV_SHAPE, 2, quantization="nf4")
    assert packed[BASE] == pytest.approx(6.7e9, rel=0.01)
    assert packed[TRANSIENT] == DRY["transient"] + 2 * 5 * 3072**2


def test_rows_are_apart_from_the_other_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import Counter

    from mosaic.planning.dry_run import StepMemory

    monkeypatch.setattr(memory_model, "dry_run", lambda *_: StepMemory(Counter(DRY), 4 * GIB, 22 * GIB))
    monkeypatch.setattr(memory_model, "row_bytes", lambda *_: GIB)
    parts = memory_model.dry_parts(flux(), FLUX_DEV_SHAPE, 2)
    assert (parts[SAVED], parts[ROWS]) == (3 * GIB, GIB)


def test_the_cache_sizes_of_flux_dev() -> None:
    """16 channels x 64 x 64 of mean and log-variance per picture of 512 px; 512 x 4096 and 768 numbers per prompt."""
    sizes = preflight_checks.cache_bytes(flux(), FLUX_DEV_SHAPE, 2)
    assert sizes == {"latent_cache": 3 * 2 * 16 * 64 * 64 * 4, "text_cache": 2 * (512 * 4096 + 768)}


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Interpolated in K, and the first choice that fits is named."""

    def parts(config: Config, shape: Any, num_references: int) -> dict[str, int]:
        recomputed = config.model.gradient_checkpointing != "none"
        return {BASE: 22 * GIB, SAVED: (1 if recomputed else 10) * num_references * GIB}

    monkeypatch.setattr(memory_table, "dry_parts", parts)
    cells = memory_table.totals()
    live = next(choice for choice in memory_table.CHOICES if choice.name == "bf16, none, live")
    assert cells[512, 4][live] - cells[512, 2][live] == pytest.approx(20)
    assert cells[512, 6][live] == pytest.approx(22 + 60 + 2 * 4_969_190_819 / GIB + 2 * 4 * 463_609_856 / GIB + 1)
    assert memory_table.best_fit(cells[512, 6], 20.0).name == "nf4, block, cached"
    assert memory_table.best_fit(cells[512, 6], 139.8) == live
    assert memory_table.best_fit(cells[512, 6], 5.0) is None
    memory_table.print_table()
    printed = capsys.readouterr().out
    assert "| 512 | 6 | none of these" not in printed
    assert "| px | K | 24 GB | 48 GB | 80 GB | 141 GB |" in printed
