"""The look before a run: what it counts, what it finds, and what its exit code says."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from PIL import Image

from mosaic.config.loading import Config, from_dict, load_config
from mosaic.data import DatasetWriter, ReferenceRecord, SampleRecord
from mosaic.lora.adapter import write_reference_lora
from mosaic.planning import memory_model, preflight, preflight_checks
from mosaic.planning.cards import CARDS, cards_of_size, find_card
from mosaic.planning.data_checks import DataFacts
from mosaic.planning.findings import NOTE, OK, STOP
from mosaic.planning.memory_model import BASE, BUCKETS, CONTEXT, EMA, ENCODERS, GIB, GRADIENTS, OPTIMIZER, ROWS, SAVED, TRANSIENT
from mosaic.planning.model_shape import FLUX_DEV_SHAPE
from mosaic.training import train
from mosaic.training.distributed.environment import Distribution, read_distribution
from mosaic.weights import quantization
from scripts.launching import launch, memory_table
from scripts.preflight import main, planned_environment
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
    assert printed.startswith("ready\n")
    assert report["config"] == json.loads(printed[printed.index("\n{\n") :])
    fast, slow = report["hours_range_per_1k_steps"]
    assert fast < report["hours_per_1k_steps"] < slow
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
    "adapter": ({"lora.pretrained": "none.safetensors"}, "stop  lora.pretrained: reference LoRA not found: none.safetensors"),
    "rank": ({"lora.rank": 2}, "lora.safetensors has rank 3. Set lora.rank=3, or lora.resize=true to change it."),
    "batch": ({"training.batch_size": 99}, "stop  batches: training.batch_size 99"),
    "cache": ({"data.text_cache": "none"}, "stop  data.text_cache: data.text_cache: there is no cache in none. Build it: "),
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
    captured = capsys.readouterr()
    printed = captured.out
    assert message in printed
    assert printed.startswith("NOT READY: ")
    verdict, first = printed.splitlines()[:2]
    assert first.startswith("stop  ")
    assert verdict.split()[2] == str(printed.count("\nstop  "))
    assert captured.err.splitlines()[0] == "preflight: looking at model, data, packages and disk ..."


@pytest.mark.usefixtures("quick", "fresh_accelerator")
def test_an_earlier_run_in_the_folder(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it started from may be gone."""
    train(load_config(config_file, ["training.max_steps=2"]))
    capsys.readouterr()
    assert main([str(config_file)]) == 1
    assert "holds checkpoints of an earlier run" in capsys.readouterr().out
    assert main([str(config_file), "--resume", "auto", "--set", "lora.pretrained=gone.safetensors"]) == 0
    assert "continues from step_00000002" in capsys.readouterr().out
    assert main([str(config_file), "--resume", "auto", "--set", "optimizer.learning_rate=0.5"]) == 1
    assert "stop  --resume: " in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_wrong_commands(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config_file), "--set", "data.image_size=[16, 26]"]) == 2
    assert "error: data.image_size: height and width must be" in capsys.readouterr().err
    assert main([str(tmp_path / "none.json")]) == 2
    for arguments, message in (
        ([], "give either CONFIG or --table"),
        (["x", "--gpu-memory", "0"], "--gpu-memory must be positive, got 0.0"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samples with points fine enough for every preset, as many as the largest batch takes."""
    root, rng = tmp_path_factory.mktemp("large") / "data", np.random.default_rng(0)
    with DatasetWriter(root) as writer:
        for split, count in (("train", 16), ("heldout", 2)):
            for index in range(count):
                points = np.stack([np.arange(64), rng.permutation(64 * 64)[:64]], axis=1)
                reference = ReferenceRecord(Image.new("RGB", (32, 32)), "cat", points)
                writer.add(SampleRecord(f"{split}-{index}", split, "a cat", Image.new("RGB", (64, 64)), [reference], (32, 32), (64, 64)))
    return root


#: What commands that the findings name install and build.
STILL_TO_COME = {"model.quantization", "optimizer.name", "data.latent_cache", "data.text_cache"}


@pytest.mark.parametrize(
    "name",
    sorted(path.name for path in Path("configs").glob("*.json") if "schema" not in path.name and path.name[:4] not in ("flux", "cons")),
)
@pytest.mark.usefixtures("quick")
def test_every_preset_is_ready_where_its_data_are(name: str, large: Path, tmp_path: Path) -> None:
    overrides = [f"data.root={large}", f"training.output_dir={tmp_path / 'run'}", "data.format=multi_reference"]
    report = preflight.preflight(load_config(Path("configs") / name, overrides))
    assert [finding for finding in report.findings if finding.level == STOP and finding.subject not in STILL_TO_COME] == []
    if "24gb" not in name:
        assert levels(report)["points"] == levels(report)["batches"] == OK


@pytest.mark.usefixtures("quick")
def test_the_hub(monkeypatch: pytest.MonkeyPatch, world: Path, tmp_path: Path) -> None:
    """Unreachable is worth a note; a gate that is closed to this machine would stop training; a cached copy is all one needs."""
    settings = runs.settings(world, tmp_path / "run") | {"model": {"pretrained": "black-forest-labs/FLUX.1-dev", "text_length": 8}}
    settings["data"] |= {"image_size": [64, 64], "reference_size": 32}
    settings["lora"] = {}
    config = from_dict(settings)
    report = preflight.preflight(config)
    assert levels(report)["model.pretrained"] == NOTE
    assert report.ready

    class Gated:
        def model_info(self, *_: Any, **__: Any) -> None: ...

        def auth_check(self, name: str) -> None:
            raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(preflight_checks, "HfApi", Gated)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    report = preflight.preflight(config)
    assert levels(report)["model.pretrained"] == STOP
    assert "accept its licence" in next(finding.message for finding in report.findings if finding.subject == "model.pretrained")
    monkeypatch.setattr(preflight_checks, "try_to_load_from_cache", lambda *_: "/cache/model_index.json")
    assert levels(preflight.preflight(config))["model.pretrained"] == OK


@pytest.mark.usefixtures("quick")
def test_room_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 128: 12 bytes per weight, three kept, one being written, the best."""
    facts = DataFacts(2, 1000)
    (finding,) = preflight_checks.check_disk(flux(), FLUX_DEV_SHAPE, facts)
    assert finding.level == OK
    assert f"5 x 5.181 GiB = {5 * 12 * 463_609_856 / GIB:.1f} GiB" in finding.message
    monkeypatch.setattr(preflight_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=20 * GIB))
    (finding,) = preflight_checks.check_disk(flux(), FLUX_DEV_SHAPE, facts)
    assert finding.level == STOP


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"training__keep_checkpoints": 2}, 4),
        ({"training__keep_checkpoints": 2, "training__best_metric": None}, 3),
        ({"training__keep_checkpoints": 2, "validation__every": None}, 3),
        ({"training__keep_checkpoints": 2, "training__milestone_every": 1000}, 4 + 10),
        ({"training__keep_checkpoints": 2, "training__milestone_every": 1500}, 4 + 3),  # those that are checkpoints, too
        ({"training__keep_checkpoints": None}, 10),
        ({"training__keep_checkpoints": None, "training__max_steps": None, "training__max_epochs": 5}, 3),
    ],
)
@pytest.mark.usefixtures("quick")
def test_the_number_of_checkpoints(changes: dict[str, Any], number: int) -> None:
    settings = {"training__max_steps": 10_000, "training__checkpoint_every": 1000} | changes
    (finding,) = preflight_checks.check_disk(flux(**settings), FLUX_DEV_SHAPE, DataFacts(2, 1000, 10, 500))
    assert finding.message.startswith(f"{number} x 5.181 GiB")


@pytest.mark.usefixtures("quick")
def test_room_for_caches(tmp_path: Path) -> None:
    """Those that are not there yet: one entry per sample, one per prompt."""
    config = flux(data__latent_cache=str(tmp_path / "latents"), data__text_cache=str(tmp_path / "text"))
    _, latents, text = preflight_checks.check_disk(config, FLUX_DEV_SHAPE, DataFacts(2, 2**20, 256))
    assert latents.message.startswith("1,048,576 x 0.001 GiB = 768.0 GiB at most")
    assert latents.level == STOP
    assert text.message.startswith(f"256 x 0.004 GiB = {256 * 2 * (512 * 4096 + 768) / GIB:.1f} GiB")
    (tmp_path / "latents").mkdir()
    findings = preflight_checks.check_disk(config, FLUX_DEV_SHAPE, DataFacts(2, 9, 2))
    assert [finding.subject for finding in findings] == ["disk for checkpoints", "disk for data.text_cache"]


@pytest.mark.parametrize(
    ("part", "missing"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "vae/*.safetensors"),
        ("text_encoder_2/model.safetensors", "text_encoder_2/*.safetensors"),
        ("tokenizer_2", "tokenizer_2"),
        ("shard", "transformer/two.safetensors"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_weights_that_are_missing(part: str, missing: str, world: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(world / "model", tmp_path / "model"))
    if part == "shard":
        (model / "transformer/model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "two.safetensors"}})
        )
    elif (model / part).is_dir():
        shutil.rmtree(model / part)
    else:
        (model / part).unlink()
    report = preflight.preflight(runs.make_config(world, tmp_path / "run", model__pretrained=str(model)))
    (finding,) = [finding for finding in report.findings if finding.subject == "model.pretrained"]
    assert (finding.level, finding.message) == (STOP, f"not a complete diffusers FLUX folder; missing: {model / missing}.")


@pytest.mark.usefixtures("quick")
def test_an_adapter_of_another_model(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    write_reference_lora({key: torch.zeros(value.shape[0] + 1, value.shape[1]) for key, value in runs.lora_tensors().items()}, path)
    settings = runs.settings(world, tmp_path / "run")
    settings["lora"] = {"pretrained": str(path), "rank": runs.RANK + 1}
    settings["data"] |= {"image_size": [64, 64], "reference_size": 32}
    for model, level in ((settings["model"]["pretrained"], STOP), ("someone/FLUX.1-lite", OK)):  # whose shape is not known here
        report = preflight.preflight(from_dict({**settings, "model": {**settings["model"], "pretrained": model}}))
        (finding,) = [finding for finding in report.findings if finding.subject == "lora.pretrained"]
        assert finding.level == level
        assert level == OK or "Is it for another base model?" in finding.message


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

    def rows(**loss: Any) -> float:
        """TFLOP of a step with more rows, beyond one without."""
        changed, usual = (flux(**{f"loss__{name}": value for name, value in given.items()}) for given in (loss, {}))
        return preflight.step_tflop(changed, FLUX_DEV_SHAPE, 2, "none") - preflight.step_tflop(usual, FLUX_DEV_SHAPE, 2, "none")

    # 1024 rows over 1024 keys are 1.469 TFLOP. Of the target over all keys; of it over the references, and single heads; of all tokens.
    assert rows(supervised_queries="target") == pytest.approx((512 + 1024 + 2048) / 1024 * 1.469, rel=1e-3)
    assert rows(own_reference_weight=1.0, target_keys="references", heads="each") == pytest.approx((2048 + 1024) / 1024 * 1.469, rel=1e-3)
    assert rows(region_weight=1.0) == pytest.approx(2 * 1.469, rel=1e-3)


@pytest.mark.usefixtures("quick")
def test_parts_beside_the_dry_run() -> None:
    adapter = 4 * 463_609_856
    parts = memory_model.predict_memory(flux(optimizer__ema_decay=0.99), FLUX_DEV_SHAPE, 2, distribution=Distribution(2))
    assert (parts[EMA], parts[BUCKETS], parts[OPTIMIZER]) == (adapter, adapter, 2 * adapter)
    assert parts[ENCODERS] == 2 * (83_819_683 + 123_060_480 + 4_762_310_656)
    assert parts[CONTEXT] > 0
    assert memory_model.predict_memory(flux(), FLUX_DEV_SHAPE, 2, device_type="cpu")[CONTEXT] == 0
    packed = memory_model.predict_memory(flux(), FLUX_DEV_SHAPE, 2, quantization="nf4")
    assert packed[BASE] == pytest.approx(6.7e9, rel=0.01)
    assert packed[TRANSIENT] == DRY["transient"] + 2 * 5 * 3072**2
    packed = memory_model.predict_memory(flux(), FLUX_DEV_SHAPE, 2, quantization="fp8_dynamic")
    assert packed[BASE] == pytest.approx(11.9e9, rel=0.01)
    tokens = 512 + 1024 + 2 * 1024
    assert packed[TRANSIENT] == DRY["transient"] + 4 * 3072 * tokens * 9 + 5 * 3072**2  # float32 gradients, and a matrix transposed


@pytest.mark.usefixtures("quick")
def test_what_is_shared_out() -> None:
    """A sharded base is gathered by two blocks; shared optimizer state holds a float32 copy of the adapter."""
    adapter = 4 * 463_609_856
    whole = memory_model.predict_memory(flux(), FLUX_DEV_SHAPE, 2)
    sharded = memory_model.predict_memory(flux(), FLUX_DEV_SHAPE, 2, distribution=Distribution(8, base_shards=8))
    assert sharded[BASE] == whole[BASE] / 8
    outside = 11_901_408_320 - 19 * 339_831_296 - 38 * 141_591_808
    assert sharded[TRANSIENT] - whole[TRANSIENT] == 2 * (2 * 339_831_296 + outside)
    assert {part for part in whole if whole[part] != sharded[part]} == {BASE, TRANSIENT}
    shared = memory_model.predict_memory(flux(), FLUX_DEV_SHAPE, 2, distribution=Distribution(4, optimizer_shards=4))
    assert (shared[OPTIMIZER], shared[GRADIENTS], shared[BUCKETS]) == (3 * adapter / 4, DRY["gradients"] / 4, 200_000_000)
    assert shared[BASE] == whole[BASE]


def test_processes_on_a_cpu_share_its_memory() -> None:
    device = preflight.Device("cpu", "2 CPU cores", 10 * GIB, 2, 0.05)
    (finding,) = preflight.check_device(flux(), device, 4 * GIB)
    assert (finding.level, finding.message) == (OK, "2 processes x 4.0 GiB predicted, 10.0 GiB on 2 CPU cores.")
    assert preflight.check_device(flux(), device, 6 * GIB)[0].level == NOTE


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of processes, on a machine without a GPU."""
    for name in ("NUM_PROCESSES", "ACCELERATE_CONFIG", "LOCAL_RANK", "WORLD_SIZE", "NNODES", "SLURM_JOB_NUM_NODES", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "count_gpus", lambda: 0)
    return monkeypatch


def planned(elsewhere: bool = False) -> Distribution:
    return read_distribution(planned_environment(elsewhere))


def test_processes_and_shards_come_from_the_environment(no_gpu: pytest.MonkeyPatch) -> None:
    assert planned() == Distribution()
    no_gpu.setenv("NUM_PROCESSES", "4")
    assert planned() == Distribution(4)
    for name, expected in (("fsdp2", (4, 4, 1)), ("hsdp", (4, 4, 1)), ("deepspeed_zero2", (4, 1, 4)), ("ddp", (4, 1, 1))):
        no_gpu.setenv("ACCELERATE_CONFIG", f"configs/accelerate/{name}.yaml")
        assert planned() == Distribution(*expected)
    for name, value in (("NNODES", "2"), ("NODE_RANK", "0"), ("MASTER_ADDR", "a"), ("ACCELERATE_CONFIG", "configs/accelerate/hsdp.yaml")):
        no_gpu.setenv(name, value)
    assert planned() == Distribution(8, 4, 1)


def test_a_run_is_planned_for_other_machines(no_gpu: pytest.MonkeyPatch) -> None:
    """For cards of another size, however many are here; and in a job of several machines before srun."""
    no_gpu.setattr(launch, "count_gpus", lambda: 2)
    assert planned() == planned(elsewhere=True) == Distribution(2)
    no_gpu.setenv("NUM_PROCESSES", "8")
    assert planned(elsewhere=True) == Distribution(8)
    with pytest.raises(ValueError, match="NUM_PROCESSES=8, but this machine has 2"):
        planned()
    no_gpu.setenv("NUM_PROCESSES", "2")
    no_gpu.setenv("SLURM_JOB_NUM_NODES", "3")
    assert planned() == Distribution(6)


@pytest.mark.usefixtures("quick")
def test_what_training_would_refuse_of_an_accelerate_config(no_gpu: pytest.MonkeyPatch, world: Path, tmp_path: Path) -> None:
    file = tmp_path / "fsdp1.yaml"
    file.write_text(Path("configs/accelerate/fsdp2.yaml").read_text().replace("fsdp_version: 2", "fsdp_version: 1"))
    no_gpu.setenv("NUM_PROCESSES", "2")
    for path, level in ((file, STOP), ("configs/accelerate/fsdp2.yaml", OK)):
        no_gpu.setenv("ACCELERATE_CONFIG", str(path))
        report = preflight.preflight(runs.make_config(world, tmp_path / "run"), planned_environment())
        assert levels(report)["Accelerate config"] == level
        assert report.device.count == 2


@pytest.mark.usefixtures("quick")
def test_validation_needs_the_encoders_that_caches_stand_for() -> None:
    cached = {"data__latent_cache": "a", "data__text_cache": "b"}
    whole = memory_model.predict_memory(flux(), FLUX_DEV_SHAPE, 2)[ENCODERS]
    assert memory_model.predict_memory(flux(**cached), FLUX_DEV_SHAPE, 2)[ENCODERS] == whole > 0
    assert memory_model.predict_memory(flux(**cached, validation__every=None), FLUX_DEV_SHAPE, 2)[ENCODERS] == 0


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
@pytest.mark.usefixtures("quick")
def test_a_damaged_index_of_weights(text: str, world: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(world / "model", tmp_path / "model"))
    (model / "transformer/model.safetensors.index.json").write_text(text)
    report = preflight.preflight(runs.make_config(world, tmp_path / "run", model__pretrained=str(model)))
    (finding,) = [finding for finding in report.findings if finding.subject == "model.pretrained"]
    assert finding.level == STOP
    assert "model.safetensors.index.json" in finding.message


@pytest.mark.usefixtures("quick")
def test_checkpoints_that_are_there_need_no_room(tmp_path: Path) -> None:
    config, facts = flux(training__output_dir=str(tmp_path)), DataFacts(2, 9)
    for step, number in ((1, 4), (2, 3), (3, 2), (4, 1), (5, 1)):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (finding,) = preflight_checks.check_disk(config, FLUX_DEV_SHAPE, facts)
        assert finding.message.startswith(f"{number} x 5.181 GiB")


def test_rows_are_apart_from_the_other_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import Counter

    from mosaic.planning.dry_run import StepMemory

    monkeypatch.setattr(memory_model, "dry_run", lambda *_: StepMemory(Counter(DRY), 4 * GIB, 22 * GIB))
    monkeypatch.setattr(memory_model, "row_bytes", lambda *_: GIB)
    parts = memory_model.dry_parts(flux(), FLUX_DEV_SHAPE, 2)
    assert (parts[SAVED], parts[ROWS]) == (3 * GIB, GIB)


def test_the_cache_sizes_of_flux_dev() -> None:
    """16 channels x 64 x 64 of mean and log-variance per picture of 512 px; 512 x 4096 and 768 numbers per prompt."""
    facts = DataFacts(2, 9, 5)
    sizes = preflight_checks.cache_bytes(flux(), FLUX_DEV_SHAPE, facts)
    assert sizes == {"latent_cache": (3 * 2 * 16 * 64 * 64 * 2, 9), "text_cache": (2 * (512 * 4096 + 768), 5)}
    larger = flux(model__dtype="float32", data__buckets=[[512, 512], [1024, 768]])
    assert preflight_checks.cache_bytes(larger, FLUX_DEV_SHAPE, facts)["latent_cache"][0] == 2 * 16 * (2 * 64 * 64 + 128 * 96) * 4


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


@pytest.mark.usefixtures("quick")
def test_packages_are_looked_for_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _: None)
    config = flux(model__quantization="int8", optimizer__name="prodigy", optimizer__learning_rate=1.0)
    found = {finding.subject: finding for finding in preflight.preflight(config, gpu_memory=80).findings}
    assert found["model.quantization"].level == found["optimizer.name"].level == STOP
    assert "needs the package torchao, which is not installed: pip install torchao" in found["model.quantization"].message
    assert "prodigyopt" in found["optimizer.name"].message


def test_a_known_card_counts_with_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="NVIDIA A100-SXM4-80GB", total_memory=80 * GIB))
    for name, given, peak in (("NVIDIA A100-SXM4-80GB", None, 312), ("A card of tomorrow", None, 989), ("NVIDIA A100-SXM4-80GB", 50.0, 50)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, name=name: name)
        assert preflight.find_device(from_dict({"training": {"peak_tflops": given}}), None).peak_tflops == peak
    other = preflight.find_device(Config(), 24.0)  # a card that is not here
    assert (other.peak_tflops, other.slowest_tflops, other.cards) == (165, 71, ("RTX 3090", "L4", "RTX 4090"))
    assert preflight.find_device(Config(), 80.0).peak_tflops == 989
    assert preflight.find_device(Config(), 60.0).peak_tflops == 989  # of a size that no card has
    assert preflight.find_device(from_dict({"training": {"peak_tflops": 50}}), 24.0).peak_tflops == 50
    named = preflight.find_device(Config(), None, card=find_card("4090"))
    assert (named.name, named.peak_tflops, named.slowest_tflops, named.memory) == ("RTX 4090", 165, None, int(23.6 * GIB))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("A100", "--gpu: must name one card, but 'A100' may be A100 40GB, A100 80GB."),
        ("RTX 4091", "--gpu: must be a known card, got 'RTX 4091'. Did you mean RTX 4090? Known: RTX 3090, RTX 4090, L4,"),
        ("", "--gpu: must be a known card, got ''."),
    ],
)
def test_cards_by_their_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        find_card(name)
    assert find_card("h100").name == "H100"
    assert find_card("L4").memory == 22.5
    assert all(card.peak_tflops > 0 for card in CARDS)
    assert [card.name for card in cards_of_size(79)] == ["A100 80GB", "H100 PCIe", "H100"]


@pytest.mark.usefixtures("quick")
def test_the_time_is_a_range_over_the_cards_that_may_be_meant() -> None:
    report = preflight.preflight(flux(), gpu_memory=24, num_references=2)
    line = next(line for line in preflight.as_text(report).splitlines() if line.startswith("time for"))
    assert line.endswith("at 25% to 50% (assumed) of 71 to 165 TFLOP/s (RTX 3090, L4, RTX 4090); --gpu NAME says which")
    fast, slow = report.hours_range
    assert fast == pytest.approx(180.0 / (0.5 * 165) / 3.6, rel=2e-3)
    assert slow == pytest.approx(180.0 / (0.25 * 71) / 3.6, rel=2e-3)
    named = preflight.preflight(flux(), card=find_card("RTX 4090"), num_references=2)
    assert named.hours_range[1] == pytest.approx(180.0 / (0.25 * 165) / 3.6, rel=2e-3)
    assert "of 165 TFLOP/s" in preflight.as_text(named)
