"""DeepSpeed ZeRO-2: the numbers, checkpoints and exit codes of a replicated run. What needs no DeepSpeed is tested without."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mosaic.config.sections import OptimizerConfig
from mosaic.training.checkpoints.optimizer_state import optimizer_tensors, pack_state, unpack_state
from mosaic.training.distributed import environment
from mosaic.training.distributed.environment import check_distribution
from tests import runs

ROOT = Path(__file__).resolve().parents[2]
ZERO = str(ROOT / "configs/accelerate/deepspeed_zero2.yaml")
DDP = str(ROOT / "configs/accelerate/ddp.yaml")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def write_config(world: Path, folder: Path, name: str, steps: int) -> Path:
    """Two micro-batches per step, clipping that bites, a warm-up and an average; a checkpoint every three steps."""
    values = runs.settings(world, folder / name)
    values["training"].update(batch_size=1, gradient_accumulation_steps=2, max_steps=steps, checkpoint_every=3)
    values["optimizer"].update(ema_decay=0.9, max_grad_norm=0.05, warmup_steps=4)
    config = folder / f"{name}.json"
    config.write_text(json.dumps(values))
    return config


def start(config: Path, accelerate_config: str) -> subprocess.Popen:
    environ = {**os.environ, "NUM_PROCESSES": "2", "NNODES": "1", "ACCELERATE_CONFIG": accelerate_config, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, str(ROOT / "scripts/launch.py"), str(config), "--resume", "auto"], env=environ)


def assert_close(found: Path, expected: Path) -> None:
    """Names, types and values of a checkpoint to float tolerance, and its hyperparameters exactly."""
    for name in ("lora", "optimizer", "ema"):
        tensors, wanted = (load_file(folder / f"{name}.safetensors") for folder in (found, expected))
        assert tensors.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(tensors[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()) + 1e-12, msg=key)
    states = [json.loads((folder / "state.json").read_text())["optimizer"] for folder in (found, expected)]
    assert states[0] == states[1]


@needs_deepspeed
@pytest.mark.cluster
def test_zero_2_is_ddp_resumes_both_ways_and_stops_with_the_requeue_code(world: Path, tmp_path: Path) -> None:
    step_3, step_6 = "checkpoints/step_00000003", "checkpoints/step_00000006"
    for name, accelerate_config in (("ddp", DDP), ("zero", ZERO)):
        assert start(write_config(world, tmp_path, name, 6), accelerate_config).wait(300) == 0
    losses = [
        [json.loads(line)["loss/total"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("ddp", "zero")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for step in (step_3, step_6):
        assert_close(tmp_path / "zero" / step, tmp_path / "ddp" / step)
        assert not [path for path in (tmp_path / "zero" / step).iterdir() if path.suffix not in (".safetensors", ".json")]
    for name, first, accelerate_config in (("there", "ddp", ZERO), ("back", "zero", DDP)):
        shutil.copytree(tmp_path / first / step_3, tmp_path / name / step_3)
        assert start(write_config(world, tmp_path, name, 6), accelerate_config).wait(300) == 0
        assert_close(tmp_path / name / step_6, tmp_path / "ddp" / step_6)
    launcher = start(write_config(world, tmp_path, "stopped", 100_000), ZERO)
    deadline = time.monotonic() + 300
    while not (tmp_path / "stopped" / step_3).is_dir():
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(120) == 75


def test_a_shared_out_state_is_packed_as_that_of_a_whole_optimizer() -> None:
    parameters = {name: torch.nn.Parameter(torch.arange(3.0) + i) for i, name in enumerate("ab")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, betas=(0.5, 0.75))
    for parameter in parameters.values():
        parameter.grad = torch.sin(parameter.detach())
    optimizer.step()
    states = {key: optimizer.state[parameter] for key, parameter in parameters.items()}
    tensors, values = optimizer_tensors(optimizer, parameters)
    packed = pack_state(states, optimizer.param_groups)
    runs.assert_same_tensors(packed[0], tensors)
    assert packed[1] == values
    found, (group,) = unpack_state(tensors, json.loads(json.dumps(values)), parameters, 1)
    assert (group["lr"], group["betas"]) == (0.1, (0.5, 0.75))
    for key, state in states.items():
        runs.assert_same_tensors(found[key], state)
    with pytest.raises(ValueError, match="the optimizer's state is of 2 tensors, the adapter has 1"):
        unpack_state(tensors, values, ["a"], 1)


@pytest.mark.parametrize(
    ("environ", "optimizer", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "zero_stage must be 2 in the Accelerate config, got 3; see deepspeed_zero2.yaml"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "offload_optimizer_device must be none"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, {}, r"gradient_clipping must not be set .*got 1\.0: optimizer\.max_grad_norm says it"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "z.json"}, {}, "deepspeed_config_file must not be set"),
        ({}, {"name": "adamw_8bit"}, 'optimizer.name must be "adamw" with DeepSpeed, got "adamw_8bit"'),
    ],
)
def test_what_zero_2_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], optimizer: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(environment, "require_package", lambda *_: None)
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    check_distribution(OptimizerConfig())
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_distribution(OptimizerConfig(**optimizer))


def test_processes_of_their_own_and_the_package_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with monkeypatch.context() as installed:
        installed.setattr(environment, "require_package", lambda *_: None)
        with pytest.raises(ValueError, match="LOCAL_RANK is not set"):
            check_distribution(OptimizerConfig())
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="DEEPSPEED of the Accelerate config needs the package deepspeed.*pip install deepspeed"):
        check_distribution(OptimizerConfig())
