"""Predicted memory of rendering: what a run really takes, how it grows, and the choice that is made by it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file

from mosaic.config.loading import Config, from_dict
from mosaic.model.reference_cache import reference_cache_bytes
from mosaic.planning import memory_choice
from mosaic.planning.inference_memory import ACTIVATIONS, ADAPTER, ENCODERS, TRANSFORMER, VAE, Demand, predict_inference
from mosaic.planning.memory_choice import auto_config, choose_preset, free_memory, largest_demand, lora_rank
from mosaic.planning.memory_model import CONTEXT, GIB
from mosaic.planning.meta_kernels import kernels_of
from mosaic.planning.model_shape import FLUX_DEV_SHAPE, read_model_shape
from mosaic.planning.storage_meter import StorageMeter, storage_bytes
from mosaic.rendering import memory_presets
from mosaic.rendering.cases.reading import load_cases
from mosaic.rendering.loading import load_pipeline
from mosaic.rendering.memory_presets import PLAIN, PRESETS
from scripts.launching import memory_table
from tests import runs, tiny

CPU = torch.device("cpu")
FLUX_DEV = from_dict({"model": {"pretrained": "black-forest-labs/FLUX.1-dev"}})
DEMAND = Demand(1024, 1024, 6)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def config(world: Path) -> Config:
    return from_dict(runs.settings(world, world / "unused"))


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that a call has alive at its fullest moment."""
    meter = StorageMeter()
    with meter, torch.no_grad(), kernels_of("cpu"):
        call()
    return meter.peak.total()


@pytest.mark.parametrize("num_references", [1, 2])
def test_a_run_takes_what_was_predicted(config: Config, world: Path, num_references: int) -> None:
    height, width = 96, 128  # so that activations are most of it
    pipeline = load_pipeline(config, world / "lora.safetensors", CPU)
    shape = read_model_shape(config.model.pretrained)
    memory = predict_inference(config, shape, PLAIN, Demand(height, width, num_references), runs.RANK, "cpu")
    base = [p for name, p in pipeline.transformer.named_parameters() if "lora_" not in name]
    assert memory.stages["steps"][TRANSFORMER] == storage_bytes(base)
    assert memory.stages["steps"][ADAPTER] == storage_bytes(p for name, p in pipeline.transformer.named_parameters() if "lora_" in name)
    assert memory.stages["steps"][VAE] == storage_bytes(pipeline.vae.parameters())
    assert memory.stages["prompts"][ENCODERS] == storage_bytes([*pipeline.text_encoder.parameters(), *pipeline.text_encoder_2.parameters()])

    call: dict[str, Any] = {
        "height": height,
        "width": width,
        "reference_size": runs.REFERENCE_SIZE,
        "max_sequence_length": tiny.TEXT_LENGTH,
    }
    pictures = [tiny.picture(k) for k in range(num_references)]
    steps = peak_of(lambda: pipeline("a cat", pictures, **call, num_inference_steps=2, output_type="latent"))
    assert steps == pytest.approx(memory.stages["steps"][ACTIVATIONS], rel=0.15)
    latents = torch.zeros(1, tiny.CHANNELS // 4, height // 2, width // 2)
    assert peak_of(lambda: pipeline.vae.decode(latents)) == pytest.approx(memory.stages["decoding"][ACTIVATIONS], rel=0.15)
    prepared = torch.zeros(num_references, 3, runs.REFERENCE_SIZE, runs.REFERENCE_SIZE)
    assert peak_of(lambda: pipeline.vae.encode(prepared)) == pytest.approx(memory.stages["references"][ACTIVATIONS], rel=0.25)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("report", [False, True])
def test_kept_references_take_what_was_predicted(config: Config, world: Path, report: bool, guidance: float) -> None:
    """Each of a step's passes keeps its own keys and values; the one that maps are read from keeps queries too."""
    settings = {"reference_cache": True, "image_guidance_scale": guidance, "report": report, "batch_size": 2}
    isolated = config.replace(model=config.model.replace(reference_attention="isolated"))
    cached = isolated.replace(inference=isolated.inference.replace(**settings))
    plain = cached.replace(inference=cached.inference.replace(reference_cache=False))
    pipeline = load_pipeline(isolated, world / "lora.safetensors", CPU)
    shape, demand = read_model_shape(config.model.pretrained), Demand(96, 128, 2)

    def run() -> int:
        pictures = [[tiny.picture(k) for k in range(2)]] * 2
        call = {"height": 96, "width": 128, "reference_size": runs.REFERENCE_SIZE, "max_sequence_length": tiny.TEXT_LENGTH}
        call |= {"reference_attention": "isolated", "image_guidance_scale": guidance, "output_attention": report}
        call |= {"num_inference_steps": 2, "output_type": "latent", "reference_cache": True}
        return peak_of(lambda: pipeline(["a cat"] * 2, pictures, **call))

    predictions = [predict_inference(c, shape, PLAIN, demand, runs.RANK, "cpu") for c in (cached, plain)]
    with_cache, without = (memory.stages["steps"][ACTIVATIONS] for memory in predictions)
    sizes = (shape.transformer, 2, 9, 2, 4)  # two references of 9 tokens, two pictures, float32
    kept = reference_cache_bytes(*sizes, with_attention=report) + (guidance != 1) * reference_cache_bytes(*sizes)
    assert with_cache - without == kept
    assert run() == pytest.approx(with_cache, rel=0.15)
    unguided = cached.replace(inference=cached.inference.replace(image_guidance_scale=1.0))
    given = predict_inference(unguided, shape, PLAIN, demand._replace(guided=guidance != 1), runs.RANK, "cpu")
    assert given.stages["steps"][ACTIVATIONS] == with_cache, "what the cases say counts"


def test_a_batch_is_decoded_at_once(config: Config, world: Path) -> None:
    shape = read_model_shape(config.model.pretrained)
    batch = config.replace(inference=config.inference.replace(batch_size=3))
    memory = predict_inference(batch, shape, PLAIN, Demand(48, 64, 1), runs.RANK, "cpu")
    pipeline = load_pipeline(config, world / "lora.safetensors", CPU)
    latents = torch.zeros(3, tiny.CHANNELS // 4, 24, 32)
    assert peak_of(lambda: pipeline.vae.decode(latents)) == pytest.approx(memory.stages["decoding"][ACTIVATIONS], rel=0.15)
    one, in_turn = (
        predict_inference(c, shape, preset, Demand(48, 64, 1), runs.RANK, "cpu").stages["decoding"][ACTIVATIONS]
        for c, preset in ((config, PLAIN), (batch, replace(PLAIN, vae_tiling=True)))
    )
    assert in_turn < 2 * one < memory.stages["decoding"][ACTIVATIONS], "a tiled VAE takes one picture after the other"


def test_references_that_are_not_kept_take_nothing(config: Config) -> None:
    shape, demand = read_model_shape(config.model.pretrained), Demand(96, 128, 2)
    every_step = config.replace(inference=config.inference.replace(refresh_references=1))
    assert predict_inference(every_step, shape, PLAIN, demand, runs.RANK) == predict_inference(config, shape, PLAIN, demand, runs.RANK)


def test_a_style_lora_takes_memory(config: Config, world: Path, tmp_path: Path) -> None:
    base = tiny.build_transformer(False, stock=True, num_layers=1, num_single_layers=1)
    shapes = tiny.linear_shapes(base, ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"])
    save_file(tiny.random_lora_file(shapes, 2, 5), tmp_path / "style.safetensors")
    styled = config.replace(inference=config.inference.replace(style_lora=str(tmp_path / "style.safetensors")))
    demand = largest_demand([], styled)
    shape = read_model_shape(config.model.pretrained)
    predicted = predict_inference(styled, shape, PLAIN, demand, runs.RANK, "cpu").stages["steps"][ADAPTER]
    pipeline = load_pipeline(styled, world / "lora.safetensors", CPU)
    assert predicted == storage_bytes(p for name, p in pipeline.transformer.named_parameters() if "lora_" in name)
    (tmp_path / "style.safetensors").write_bytes(b"nothing")
    assert largest_demand([], styled).style_parameters == 0


def test_maps_take_memory(config: Config) -> None:
    shape, demand = read_model_shape(config.model.pretrained), Demand(96, 128, 2)
    with_maps = config.replace(inference=config.inference.replace(report=True))
    plain, mapped = (predict_inference(c, shape, PLAIN, demand, runs.RANK, "cpu").stages["steps"] for c in (config, with_maps))
    assert mapped[ACTIVATIONS] - plain[ACTIVATIONS] >= 2 * 4 * (2 * 9) * (24 * 32)
    assert {**mapped, ACTIVATIONS: 0} == {**plain, ACTIVATIONS: 0}


def test_the_presets_on_flux_dev() -> None:
    memory = {name: predict_inference(FLUX_DEV, FLUX_DEV_SHAPE, preset, DEMAND, 512) for name, preset in PRESETS.items()}
    steps = {name: prediction.stages["steps"] for name, prediction in memory.items()}
    assert steps["80gb"][TRANSFORMER] == 2 * 11_901_408_320
    assert steps["80gb"][ENCODERS] == 2 * (123_060_480 + 4_762_310_656)
    assert steps["80gb"][ADAPTER] == 2 * 512 * 463_609_856 // 128
    assert 0.5 < steps["24gb"][TRANSFORMER] / 11_901_408_320 < 1.02
    assert 0.5 < steps["16gb"][TRANSFORMER] / 11_901_408_320 < 0.6
    assert all(ENCODERS not in steps[name] for name in PRESETS if name != "80gb")
    assert all(TRANSFORMER not in memory[name].stages["prompts"] for name in PRESETS if name != "80gb")
    peaks = [prediction.peak for prediction in memory.values()]
    assert peaks == sorted(peaks, reverse=True)
    for name, prediction in memory.items():
        assert prediction.peak < 0.95 * memory_table.CARDS[int(name.removesuffix("gb"))] * GIB, name  # the rank and sizes that need most


def test_what_is_offloaded_still_lies_in_a_cpus_memory() -> None:
    offloaded, resident = PRESETS["12gb"], replace(PRESETS["12gb"], group_offload=False)
    cuda, cpu = (predict_inference(FLUX_DEV, FLUX_DEV_SHAPE, offloaded, DEMAND, 128, device) for device in ("cuda", "cpu"))
    assert cuda.stages["steps"][TRANSFORMER] < 0.15 * cpu.stages["steps"][TRANSFORMER]
    assert cpu == predict_inference(FLUX_DEV, FLUX_DEV_SHAPE, resident, DEMAND, 128, "cpu")
    assert CONTEXT in cuda.stages["steps"]
    assert CONTEXT not in cpu.stages["steps"]


# ---- the choice


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The optional packages that are there."""
    present = {"torchao", "bitsandbytes", "gguf"}
    monkeypatch.setattr(memory_presets.importlib.util, "find_spec", lambda name: name if name in present else None)
    return present


@pytest.mark.parametrize(
    ("free", "preset"), [(78.7, "80gb"), (31.0, "48gb"), (23.1, "24gb"), (15.3, "16gb"), (11.5, "12gb"), (7.4, "12gb")]
)
def test_the_fastest_that_fits_is_chosen(free: float, preset: str, packages: set[str]) -> None:
    choice = choose_preset(FLUX_DEV, DEMAND, 512, torch.device("cuda"), int(free * GIB))
    assert choice.preset == preset
    assert f"{free:.1f} GiB free" in choice.reason
    assert "1024 x 1024 px and 6 references" in choice.reason
    assert choice.reason.startswith(f"memory auto: {preset} (transformer in ")
    assert "\n" not in choice.reason
    skipped = list(PRESETS)[: list(PRESETS).index(preset)]
    assert all(f"{name} " in choice.reason.partition("; not ")[2] for name in skipped)


def test_a_preset_without_its_package_is_passed_over(packages: set[str]) -> None:
    packages.remove("bitsandbytes")
    choice = choose_preset(FLUX_DEV, DEMAND, 512, torch.device("cuda"), int(15.3 * GIB))
    assert choice.preset == "12gb"
    assert "16gb needs bitsandbytes" in choice.reason
    packages.clear()
    with pytest.raises(
        ValueError,
        match=r"none of the presets fits 15.3 GiB .*12gb needs torchao\). Install what is missing \(pip install -r req.*, render",
    ):
        choose_preset(FLUX_DEV, DEMAND, 512, torch.device("cuda"), int(15.3 * GIB))


def test_too_little_memory_is_an_error(packages: set[str]) -> None:
    with pytest.raises(
        ValueError, match='"auto": none of the presets fits 3.0 GiB .* at 1024 x 1024 px and 6 references .*12gb [0-9.]+ GiB'
    ):
        choose_preset(FLUX_DEV, DEMAND, 512, torch.device("cuda"), 3 * GIB)


def test_other_weights_are_counted(packages: set[str], tmp_path: Path) -> None:
    def chosen(**settings: Any) -> str:
        config = FLUX_DEV.replace(inference=FLUX_DEV.inference.replace(**settings))
        return choose_preset(config, DEMAND, 128, torch.device("cuda"), 20 * GIB).preset

    assert chosen() == "24gb"
    assert chosen(quantization="nf4") == "48gb"
    (tmp_path / "small.gguf").write_bytes(bytes(1000))
    assert chosen(gguf=str(tmp_path / "small.gguf")) == "80gb"


def test_only_presets_that_will_do_are_looked_at(packages: set[str]) -> None:
    only = {"80gb": PRESETS["80gb"]}
    assert choose_preset(FLUX_DEV, DEMAND, 512, torch.device("cuda"), 78 * GIB, only).preset == "80gb"
    with pytest.raises(ValueError, match=r"none of the presets fits 31.0 GiB .* references \(80gb [0-9.]+ GiB\)"):
        choose_preset(FLUX_DEV, DEMAND, 512, torch.device("cuda"), 31 * GIB, only)


def test_the_largest_case_counts(world: Path, config: Config) -> None:
    cases = load_cases(config.inference.cases, config.data.reference_size)
    assert largest_demand(cases, config) == Demand(*runs.IMAGE_SIZE, 2, False)
    larger = replace(cases[0], options=cases[0].options.replace(height=64, width=32))
    assert largest_demand([larger, cases[1]], config) == Demand(64, 32, 2, False)
    guided = replace(cases[1], options=cases[1].options.replace(image_guidance_scale=0.0))
    assert largest_demand([cases[0], guided], config).guided
    guided_run = config.replace(inference=config.inference.replace(image_guidance_scale=2.0))
    unguided = [replace(case, options=case.options.replace(image_guidance_scale=1.0)) for case in cases]
    assert largest_demand(cases, guided_run).guided
    assert not largest_demand(unguided, guided_run).guided
    assert largest_demand([], config).num_references == 0


def test_the_rank_is_read_from_the_header(world: Path, tmp_path: Path) -> None:
    assert lora_rank(world / "lora.safetensors") == runs.RANK
    save_file({"transformer.x_embedder.lora_A.default.weight": torch.zeros(4, 16)}, tmp_path / "named.safetensors")
    assert lora_rank(tmp_path / "named.safetensors") == 4
    assert lora_rank(None) == 0
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    assert lora_rank(tmp_path / "no.safetensors") == 0


def test_auto_becomes_a_preset(world: Path, config: Config) -> None:
    auto = config.replace(inference=config.inference.replace(memory="auto"))
    cases = load_cases(config.inference.cases, config.data.reference_size)
    resolved, reason = auto_config(auto, cases, world / "lora.safetensors", PartialState(cpu=True))
    assert resolved == config.replace(inference=config.inference.replace(memory="80gb"))
    assert "24 x 16 px and 2 references" in reason


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**27 < free_memory(CPU) < 2**45
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert memory_choice._available_ram(meminfo, cgroup) is None
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:     64 kB\n")
    assert memory_choice._available_ram(meminfo, cgroup) == 65536
    cgroup.mkdir()
    for name, text in (("memory.max", "50000\n"), ("memory.current", "40000\n"), ("memory.stat", "anon 5\ninactive_file 3000\n")):
        (cgroup / name).write_text(text)
    assert memory_choice._available_ram(meminfo, cgroup) == 13000  # a container's limit, and what it can drop
    (cgroup / "memory.max").write_text("max\n")
    assert memory_choice._available_ram(meminfo, cgroup) == 65536
    monkeypatch.setattr(memory_choice, "_available_ram", lambda: 1000)
    assert free_memory(CPU, 4) == 250
    monkeypatch.setattr(memory_choice, "_available_ram", lambda: None)
    with pytest.raises(ValueError, match="cannot read the free memory of cpu here; name one of 80gb, 48gb"):
        free_memory(CPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert free_memory(torch.device("cuda"), 4) == 7


# ---- the table


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANKS", (128,)), ("SIZES", (1024,)), ("REFERENCES", (6,))):
        monkeypatch.setattr(memory_table, name, value)
    memory_table.print_inference_table()
    lines = capsys.readouterr().out.splitlines()
    assert "| rank | px | K | " + " | ".join(PRESETS) + " |" in lines
    rows = [line.split("|") for line in lines if line.startswith("| 128 | 1024 | 6")]
    cells = [float(cell) for cell in rows[0][4:-1]]
    assert cells == sorted(cells, reverse=True)
    predicted = [predict_inference(FLUX_DEV, FLUX_DEV_SHAPE, preset, DEMAND, 128).peak / GIB for preset in PRESETS.values()]
    assert cells == [round(value, 1) for value in predicted]
