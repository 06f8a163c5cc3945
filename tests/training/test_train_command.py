"""scripts/train.py and train.sh: one error line instead of a traceback, nothing half written; and two processes."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import mosaic.training
from mosaic.config.loading import load_config
from mosaic.data import collate
from mosaic.training import Trainer
from scripts.train import main
from tests import forks, runs

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def config_file(world: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(runs.settings(world, tmp_path / "run")))
    return path


def test_a_run_and_its_resume(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config_file), "--set", "training.max_steps=1"]) == 0
    assert capsys.readouterr().out == f"reference LoRA: {tmp_path / 'run/lora.safetensors'}\n"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(config_file), "--set", "training.max_steps=2", "--resume", "auto"]) == 0
    assert (tmp_path / "run/checkpoints/step_00000002/state.json").is_file()


def test_the_resolved_config_is_printed(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config_file), "--print-config", "--set", "lora.rank=7"]) == 0
    assert json.loads(capsys.readouterr().out)["lora"]["rank"] == 7
    assert not (tmp_path / "run").exists()


def test_dry_run_looks_over_the_run(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config_file), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("\n{\n") :])["lora"]["rank"] == runs.RANK
    assert "predicted memory of one process" in printed
    assert printed.startswith("ready\n")
    assert not (tmp_path / "run").exists()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "data folder": ({"data.root": "nowhere"}, "nowhere: there is no such folder; data.root must be"),
    "split": ({"data.split": "test"}, 'manifest.parquet: has no sample of the split "test". Splits found: heldout, train.'),
    "held-out split": ({"validation.every": 1, "validation.split": "test"}, 'has no sample of the split "test"'),
    "validation cases": ({"validation.every": 1, "validation.cases": "none.json"}, "none.json: file not found."),
    "references": ({"data.max_references": 1}, "references: must be at most 1 (data.max_references), got 2; so 6 of 9 samples."),
    "image size": ({"data.image_size": [16, 26]}, "data.image_size: height and width must be positive multiples of the token size 4 px"),
    "reference size": ({"data.reference_size": 13}, "data.reference_size: height and width must be positive multiples"),
    "grid": ({"data.image_size": [48, 72]}, "target_grid: must be about as fine as the token grid 12 x 18 or finer, got 8 x 12"),
    "blocks": ({"loss.capture_blocks": [5]}, "capture_blocks must name blocks of 0..1"),
    "adapter": ({"lora.pretrained": "none.safetensors"}, "reference LoRA not found: none.safetensors"),
    "model": ({"model.pretrained": "no/such/folder"}, "model 'no/such/folder': no such folder"),
    "accumulation": ({"training.gradient_accumulation_steps": 9}, "x 1 processes must be at most the number of samples, 9, got 18."),
    "unknown": ({"lora.rnak": 3}, "lora.rnak is not a known setting. Did you mean rank? (--set lora.rnak=3)."),
    "resume": ({}, "--resume missing: no complete checkpoint there"),
}


@pytest.mark.parametrize("kind", BAD)
def test_user_mistakes(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    overrides, message = BAD[kind]
    monkeypatch.chdir(tmp_path)
    before = runs.files_below(tmp_path)
    arguments = [part for key, value in overrides.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    assert main([str(config_file), *arguments, *(["--resume", "missing"] if kind == "resume" else [])]) == 2
    assert_one_error(capsys.readouterr().err, message)
    assert runs.files_below(tmp_path) == before
    assert not (tmp_path / "run").exists()


def assert_one_error(stderr: str, message: str) -> None:
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in stderr


def test_a_missing_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.json")]) == 2
    assert_one_error(capsys.readouterr().err, "none.json: file not found.")


def test_a_bad_sample_stops_the_run_even_in_a_loading_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = runs.write_world(tmp_path / "world")
    for path in (world / "data/images").glob("train-*_target.png"):
        path.write_bytes(b"")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(runs.settings(world, tmp_path / "run")))
    assert main([str(config), "--set", "data.num_workers=1"]) == 2
    assert_one_error(capsys.readouterr().err, ".target: the picture file is empty (0 bytes)")
    assert not (tmp_path / "run/lora.safetensors").exists()


def run_shell(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "train.sh"), *arguments],
        cwd=ROOT.parent,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_train_sh_without_arguments_says_how() -> None:
    result = run_shell([])
    assert result.returncode == 2
    assert result.stderr.startswith("usage: bash train.sh CONFIG")


def test_train_sh_from_another_folder_passes_all_arguments_on(config_file: Path) -> None:
    result = run_shell([str(config_file), "--set", "training.max_steps=5", "--set", "lora.rnak=8"])
    assert result.returncode != 0
    assert_one_error(result.stderr, "lora.rnak is not a known setting. Did you mean rank? (--set lora.rnak=8).")


def train_and_keep_gradients(folder: Path) -> None:
    """One rank; leaves its gradients, and the samples and seeds it saw."""
    ids: list[tuple[str, ...]] = []
    seeds: list[int] = []

    def seen(_: int, batch: Any, generators: list[torch.Generator]) -> None:
        ids.append(batch.ids)
        seeds.extend(generator.initial_seed() for generator in generators)

    runs.watch_steps(seen)
    trainer = Trainer(load_config(folder / "config.json"))
    rank, step = trainer.accelerator.process_index, trainer.optimizer.step

    def keep_gradients() -> None:
        save_file({key: p.grad.contiguous() for key, p in trainer.parameters.items()}, folder / f"gradients_{rank}.safetensors")
        step()

    trainer.optimizer.step = keep_gradients
    wrapper = weakref.ref(trainer.transformer)
    trainer.fit()
    assert trainer.accelerator.num_processes == 2
    assert wrapper() is None  # it could hang the end of the process group
    (folder / f"rank_{rank}.json").write_text(json.dumps({"ids": ids, "seeds": seeds}))


def test_two_processes(world: Path, tmp_path: Path) -> None:
    """Two ranks of batch 1 with 2 micro-steps: other samples and noise on each, one gradient, the mean of all four."""
    options = {
        "training__batch_size": 1,
        "training__gradient_accumulation_steps": 2,
        "training__max_steps": 1,
        "optimizer__max_grad_norm": None,
    }
    values = runs.settings(world, tmp_path / "run")
    for name, value in options.items():
        section, field = name.split("__")
        values[section][field] = value
    values["validation"].update(every=1, num_cases=1)
    (tmp_path / "config.json").write_text(json.dumps(values))
    codes = forks.wait(forks.start_ranks(train_and_keep_gradients, tmp_path, output=tmp_path / "log", processes=2))
    assert codes == [0, 0], (tmp_path / "log").read_text()[-3000:]

    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert len({name for rank in ranks for ids in rank["ids"] for name in ids}) == 4
    assert len({seed for rank in ranks for seed in rank["seeds"]}) == 4
    found = [load_file(tmp_path / f"gradients_{rank}.safetensors") for rank in range(2)]
    runs.assert_same_tensors(found[0], found[1])

    single = Trainer(runs.make_config(world, tmp_path / "single", **options))
    samples = {sample.id: sample for sample in (single.dataset[i] for i in range(len(single.dataset)))}
    terms, names = [], ("total", "flow_matching", "correspondence", "disentanglement")
    for rank, record in enumerate(ranks):
        for micro_step, (name,) in enumerate(record["ids"]):
            loss = runs.step_loss(single, collate([samples[name]]), single.config.training.seed, micro_step * 2 + rank)
            (loss.total / 4).backward()
            terms.append([float(getattr(loss, term).detach()) for term in names])
    torch.testing.assert_close(found[0], {key: p.grad for key, p in single.parameters.items()}, rtol=1e-4, atol=1e-6)
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [("loss/total" in entry, "attention/exact" in entry) for entry in entries] == [(False, True), (True, False), (False, True)]
    logged = [entries[1][f"loss/{name}"] for name in names]
    assert logged == pytest.approx(np.mean(terms, axis=0).tolist(), rel=1e-4)


def test_a_full_device_is_said_with_the_cure(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(mosaic.training, "train", full)
    assert main([str(config_file)]) == 2
    assert_one_error(capsys.readouterr().err, "the device's memory is full: CUDA out of memory. Less memory, in this order:")
