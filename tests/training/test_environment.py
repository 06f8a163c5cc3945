"""Variables and keys of an Accelerate config that would change numbers beside the training config are refused by name."""

import re
from pathlib import Path

import accelerate
import pytest

from mosaic.config.sections import OptimizerConfig
from mosaic.training import Trainer
from mosaic.training.distributed.environment import SAID_ELSEWHERE, check_distribution
from scripts.launching.launch import make_plan, process_environments
from scripts.train import main as train_main
from tests import runs
from tests.training.test_processes import write_config

#: What Accelerate reads besides, and why it changes no number of a run.
HARMLESS = {
    "ACCELERATE_USE_CPU": "the device",
    "ACCELERATE_TORCH_DEVICE": "the device",
    "ACCELERATE_CPU_AFFINITY": "where threads run",
    "ACCELERATE_DEBUG_MODE": "more checks",
    "ACCELERATE_MIXED_PRECISION": "training.mixed_precision is handed over instead",
    "ACCELERATE_DOWNCAST_BF16": "TPUs",
    "ACCELERATE_USE_FSDP": "read here too",
    "ACCELERATE_USE_DEEPSPEED": "read here too",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "its sizes are read here",
    "ACCELERATE_USE_SAGEMAKER": "how processes meet",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "how processes meet",
    "ACCELERATE_ALLOW_CP_STANDALONE": "context parallelism is refused",
    "ACCELERATE_BYPASS_DEVICE_MAP": "no model has a device map",
    "ACCELERATE_DYNAMO_": "options of dynamo, which is refused",
    "ACCELERATE_FP8_": "options of fp8, which is refused",
    "ACCELERATE_FP8_OPT_LEVEL": "options of fp8, which is refused",
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", r"got 4: training\.gradient_accumulation_steps says it"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", r"got 0\.5: optimizer\.max_grad_norm says it"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", "deepspeed_config_file must not be set"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", r"got INDUCTOR: model\.compile says it"),
        ("ACCELERATE_FP8_BACKEND", "TE", "there is no fp8"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "distributed_type MEGATRON_LM must not be set"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", r"model\.gradient_checkpointing says it"),
        ("PARALLELISM_CONFIG_TP_SIZE", "2", "parallelism_config_tp_size must not be set"),
        ("PARALLELISM_CONFIG_CP_SIZE", "2", "a sample stays in one process"),
        ("PARALLELISM_CONFIG_SP_SIZE", "2", "a sample stays in one process"),
        ("DIFFUSERS_ATTN_BACKEND", "flash", "DIFFUSERS_ATTN_BACKEND must not be set, got flash"),
    ],
)
def test_what_the_training_config_says_is_not_taken_from_elsewhere(name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_distribution(OptimizerConfig(), {name: value})
    nothing = SAID_ELSEWHERE[name][0]
    if nothing is not None:  # as `accelerate launch` writes it where it is not asked for
        check_distribution(OptimizerConfig(), {name: nothing, name.replace("A", "B"): value})
        check_distribution(OptimizerConfig(), {name: nothing.upper()})


def test_no_variable_of_accelerate_is_forgotten() -> None:
    """Each that its training objects read is refused, or harmless for a reason; a new version may bring new ones."""
    folder = Path(accelerate.__file__).parent
    found = set()
    for file in ("accelerator.py", "state.py", "data_loader.py", "optimizer.py", "utils/dataclasses.py"):
        found |= set(re.findall(r"\bACCELERATE_[A-Z0-9_]+", (folder / file).read_text(encoding="utf-8")))
    deepspeed = {name for name in found if name.startswith(("ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_"))}  # of a plugin not used
    assert found - deepspeed - SAID_ELSEWHERE.keys() <= HARMLESS.keys()


def test_a_run_does_not_begin(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """4 would divide the gradient by 4 once more; 1 is what Accelerate has anyway."""
    config = write_config(world, tmp_path / "config.json", "run", max_steps=1)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert train_main([config]) == 2
    assert "gradient_accumulation_steps must not be set in the Accelerate config" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        Trainer(runs.make_config(world, tmp_path / "run"))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert Trainer(runs.make_config(world, tmp_path / "run")).accelerator.gradient_accumulation_steps == 1


def test_an_accelerate_config_with_a_compiler_is_refused_in_the_processes(tmp_path: Path) -> None:
    file = tmp_path / "dynamo.yaml"
    file.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\ndynamo_config:\n  dynamo_backend: INDUCTOR\n")
    environ = {"NUM_PROCESSES": "2", "ACCELERATE_CONFIG": str(file)}
    with pytest.raises(ValueError, match=r"dynamo_backend must not be set in the Accelerate config .*got INDUCTOR"):
        check_distribution(OptimizerConfig(), process_environments(make_plan(environ, 0), environ)[0])
