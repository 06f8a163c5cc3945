"""A sharded base: the same numbers as a replicated one, with a part of the base in each process."""

import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from mosaic.config.sections import OptimizerConfig
from mosaic.training import Trainer
from mosaic.training.distributed import sharding
from mosaic.training.distributed.environment import check_distribution
from scripts.launching.launch import make_plan, process_environments
from scripts.launching.processes import run_processes
from tests import runs

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import sys, warnings
import torch
from torch.distributed.tensor import DTensor
from mosaic.config.loading import load_config
from mosaic.training.distributed.sharding import is_sharded
from mosaic.training import Trainer

warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
trainer, shards = Trainer(load_config(sys.argv[1])), int(sys.argv[2])
base = [p for p in trainer.pipeline.transformer.parameters() if not p.requires_grad]
assert is_sharded(trainer.transformer) == (shards > 1)
if shards > 1:
    assert all(isinstance(p, DTensor) for p in base)
    local = sum(p.to_local().numel() for p in base)
    assert local < 1.1 * sum(p.numel() for p in base) / shards, local
    assert not any(isinstance(p, DTensor) for p in trainer.parameters.values())
trainer.fit()
"""


#: Before training: a signal that the second process alone has got when the first validation asks for the second time.
INTERRUPT = """
import os
asked, here = [], Trainer._asked_here

def ask(self):
    asked.append(1)
    if os.environ["RANK"] == "1" and len(asked) == 2:
        self.signals.received = "SIGTERM"
    return here(self)

Trainer._asked_here = ask
"""

#: Before training: the second process alone fails between the first two pictures of the first validation.
FAIL = """
import os
asked, here = [], Trainer._asked_here

def ask(self):
    asked.append(1)
    if os.environ["RANK"] == "1" and len(asked) == 2:
        raise ValueError("sample 4 is damaged")
    return here(self)

Trainer._asked_here = ask
"""


def run(world: Path, folder: Path, name: str, environ: dict[str, str], shards: int, before: str = "", code: int = 0) -> Path:
    """Train three steps of two micro-batches, with validation and a moving average; returns the run's folder."""
    options = {"batch_size": 1, "gradient_accumulation_steps": 2}
    values = runs.settings(world, folder / name)
    values["training"].update(options)
    values["optimizer"]["ema_decay"] = 0.9
    values["validation"].update(every=3, num_cases=1)
    config, worker = folder / f"{name}.json", folder / "worker.py"
    config.write_text(json.dumps(values))
    worker.write_text(WORKER.replace("trainer, shards =", f"{before}\ntrainer, shards ="))
    environ = {"PYTHONPATH": str(ROOT), **environ}
    environments = []
    for machine in range(int(environ.get("NNODES", "1"))):
        environ["NODE_RANK"] = str(machine)
        environments += process_environments(make_plan(environ, 0), environ)
    assert run_processes([sys.executable, str(worker), str(config), str(shards)], environments) == code
    return folder / name


@pytest.mark.usefixtures("fresh_accelerator")
def test_mixed_precision_is_that_of_a_replicated_model() -> None:
    """Bit for bit what Accelerate makes of a model, and only while it is called, even where that fails."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    inputs, accelerator = torch.randn(5, 8), Accelerator(cpu=True, mixed_precision="bf16")
    replicated = accelerator.prepare_model(deepcopy(model), evaluation_mode=True)
    expected, plain = replicated(inputs), model(inputs)
    sharding._autocast(model, accelerator)
    found = model(inputs)
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32
    assert not torch.equal(found, plain)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(inputs[:, :7])
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.usefixtures("fresh_accelerator")
def test_replicas_send_one_another_the_adapter_alone(trainer: Trainer) -> None:
    transformer = trainer.pipeline.transformer
    names = {name for name, _ in [*transformer.named_parameters(), *transformer.named_buffers()]}
    adapter = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert len(adapter) == len(trainer.parameters)
    assert set(transformer._ddp_params_and_buffers_to_ignore) == names - adapter


@pytest.mark.cluster
def test_sharded_equals_replicated(world: Path, tmp_path: Path) -> None:
    configs = ROOT / "configs/accelerate"
    two = {"NNODES": "1", "NUM_PROCESSES": "2"}
    replicated = run(world, tmp_path, "ddp", two, 1)
    sharded = run(world, tmp_path, "fsdp2", {**two, "ACCELERATE_CONFIG": str(configs / "fsdp2.yaml")}, 2)
    for name in ("lora", "optimizer", "ema"):
        tensors = [load_file(folder / f"checkpoints/step_00000003/{name}.safetensors") for folder in (replicated, sharded)]
        runs.assert_same_tensors(*tensors)
    assert (sharded / "metrics.jsonl").read_text() == (replicated / "metrics.jsonl").read_text()
    pictures = [(folder / "validation/step_00000003/case_0.png").read_bytes() for folder in (replicated, sharded)]
    assert pictures[0] == pictures[1]


@pytest.mark.cluster
def test_a_signal_to_one_process_ends_a_sharded_validation_on_all(world: Path, tmp_path: Path) -> None:
    """All are asked together: were each to look at its own signals only, the others would wait in the next forward pass."""
    environ = {"NNODES": "1", "NUM_PROCESSES": "2", "ACCELERATE_CONFIG": str(ROOT / "configs/accelerate/fsdp2.yaml")}
    folder = run(world, tmp_path, "stopped", environ, 2, INTERRUPT, code=1)  # TrainingStopped, which no script catches here
    assert (folder / "checkpoints/step_00000000/state.json").is_file()
    assert not (folder / "metrics.jsonl").exists()
    assert (folder / "validation/step_00000000/case_0.png").is_file()


@pytest.mark.cluster
def test_a_failure_of_one_process_ends_a_sharded_validation_on_all_and_no_run(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    environ = {"NNODES": "1", "NUM_PROCESSES": "2", "ACCELERATE_CONFIG": str(ROOT / "configs/accelerate/fsdp2.yaml")}
    folder = run(world, tmp_path, "failed", environ, 2, FAIL)
    printed = capfd.readouterr().err
    assert printed.count("validation at step 0 failed; training goes on") == 2
    assert printed.count("FailedElsewhere: process 1: sample 4 is damaged") == 1
    measured = [
        entry["step"] for entry in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "attention/exact" in entry
    ]
    assert measured == [3]
    assert (folder / "lora.safetensors").is_file()


@pytest.mark.cluster
def test_hybrid_sharding_over_two_machines_starts_and_saves(world: Path, tmp_path: Path) -> None:
    environ = {"NNODES": "2", "NUM_PROCESSES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29000 + hash(str(tmp_path)) % 900)}
    folder = run(world, tmp_path, "hsdp", {**environ, "ACCELERATE_CONFIG": str(ROOT / "configs/accelerate/hsdp.yaml")}, 2)
    assert (folder / "checkpoints/step_00000003/state.json").is_file()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version must be 2 in the Accelerate config, got 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "True"}, "fsdp_offload_params must be false"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading must be false"),
    ],
)
def test_what_cannot_be_done_is_refused(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], message: str) -> None:
    check_distribution(OptimizerConfig())
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_distribution(OptimizerConfig())
