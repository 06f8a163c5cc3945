"""Reference LoRAs as diffusers and PEFT write them: declared alphas, other keys, float8, all zero. Truth is PEFT's own delta."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import inference
from mosaic.lora.adapter import reference_lora_modules, reference_lora_parameters, save_reference_lora
from mosaic.lora.files import LoraFile
from mosaic.lora.formats import to_diffusers
from mosaic.lora.loading import load_reference_lora, read_reference_lora
from mosaic.lora.zeros import changes_nothing
from mosaic.training import Trainer
from scripts import lora_tools
from scripts.loras.command import describe
from tests import runs, tiny
from tests.lora.foreign import in_style
from tests.pipeline.test_style_lora import run, style_pipeline

RANK = 3
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def small_stock() -> FluxTransformer2DModel:
    """Of one block each, the base of `runs.write_world`."""
    return tiny.build_transformer(False, stock=True, num_layers=1, num_single_layers=1)


def written_by_diffusers(
    folder: Path, transformer: FluxTransformer2DModel | None = None, **settings: Any
) -> tuple[Path, dict[str, Tensor]]:
    """A reference LoRA trained by PEFT and written by diffusers, and the change of each module's weights as PEFT applies it."""
    stock = transformer or small_stock()
    modules = reference_lora_modules(stock)
    stock.add_adapter(LoraConfig(**{"r": RANK, "target_modules": modules} | settings))
    tiny.randomise((parameter for name, parameter in stock.named_parameters() if "lora_" in name), seed=4)
    FluxPipeline.save_lora_weights(folder, get_peft_model_state_dict(stock), **_collate_lora_metadata({"transformer": stock}))
    return folder / "pytorch_lora_weights.safetensors", {
        name: stock.get_submodule(name).get_delta_weight("default").detach() for name in modules if not settings.get("use_dora")
    }


def deltas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A by module."""
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {n.removeprefix("transformer."): tensors[f"{n}.lora_B.weight"].float() @ tensors[f"{n}.lora_A.weight"].float() for n in names}


def assert_same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, delta in want.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)


def adapter_deltas(transformer: FluxTransformer2DModel) -> dict[str, Tensor]:
    scaling = {layer.scaling["reference"] for layer in transformer.modules() if "reference" in getattr(layer, "scaling", {})}
    assert scaling == {1.0}
    return deltas({key: parameter.detach() for key, parameter in reference_lora_parameters(transformer).items()})


# ---- alphas in the metadata, as diffusers writes them

DECLARED: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 2 * RANK},  # as 64 at rank 32
    "default alpha": {},  # PEFT's, 8
    "rslora": {"lora_alpha": 4, "use_rslora": True},
    "pattern": {"lora_alpha": 6, "alpha_pattern": {"attn.to_q": 1, "^x_embedder": 9}},
    "pattern of rslora": {"lora_alpha": 6, "alpha_pattern": {"attn.to_q": 1}, "use_rslora": True},
    "orthogonal": {"lora_alpha": 6, "init_lora_weights": "gaussian", "lora_dropout": 0.1},
}


@pytest.mark.parametrize("case", list(DECLARED))
def test_alphas_that_diffusers_declares_are_honoured(case: str, tmp_path: Path) -> None:
    path, want = written_by_diffusers(tmp_path, **DECLARED[case])
    raw = deltas(load_file(path))
    assert not any(torch.allclose(raw[name], delta, rtol=0.1) for name, delta in want.items())  # a scale of 1 would be wrong everywhere
    ours = tiny.build_transformer(False, num_layers=1, num_single_layers=1)
    tensors, rank = read_reference_lora(path, ours)
    assert rank == RANK
    assert_same(deltas(tensors), want)
    load_reference_lora(ours, path)
    assert_same(adapter_deltas(ours), want)
    assert_same(deltas(to_diffusers(LoraFile(path))), want)  # as a style LoRA


def test_every_command_honours_a_declared_alpha(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch: tiny.Batch) -> None:
    path, want = written_by_diffusers(tmp_path / "two", tiny.build_transformer(stock=True), lora_alpha=6)
    assert lora_tools.main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scales"] == {"2": len(want)}
    for command in (["import"], ["reduce", "--rank", "2"]):
        assert lora_tools.main([command[0], str(path), *command[1:], "--output", str(tmp_path / f"{command[0]}.safetensors")]) == 0
    outputs = []
    for file in (path, tmp_path / "import.safetensors"):
        pipeline = style_pipeline()
        pipeline.load_reference_lora(file)
        outputs.append(run(pipeline.transformer, batch))
    torch.testing.assert_close(*outputs)
    reduced = deltas(load_file(tmp_path / "reduce.safetensors"))
    for name, delta in want.items():
        u, values, v = torch.linalg.svd(delta)
        torch.testing.assert_close(reduced[name], u[:, :2] * values[:2] @ v[:2], rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("rank", [RANK, RANK + 2])
def test_training_starts_from_the_declared_alpha(rank: int, world: Path, tmp_path: Path) -> None:
    path, want = written_by_diffusers(tmp_path / "lora", lora_alpha=6)
    trainer = Trainer(runs.make_config(world, tmp_path / "run", lora__pretrained=str(path), lora__rank=rank, lora__resize=True))
    assert_same(adapter_deltas(trainer.pipeline.transformer), want)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, r"use_dora \(DoRA"),
    "biases": ({"lora_bias": True}, r"lora_bias \(biases"),
    "base biases": ({"bias": "all"}, r"bias 'all' \(trained biases of the base\)"),
    "pissa": ({"init_lora_weights": "pissa"}, r"init_lora_weights 'pissa' \(a base whose weights were changed\)"),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'.* have invalid shape:UserWarning")  # PEFT, of the biases that it writes
@pytest.mark.parametrize("case", list(REFUSED))
def test_more_than_a_plain_lora_is_refused_by_name(case: str, tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    path, _ = written_by_diffusers(tmp_path, **settings)
    ours = tiny.build_transformer(False, num_layers=1, num_single_layers=1)
    readers: list[Callable[[], object]] = [lambda: load_reference_lora(ours, path), lambda: to_diffusers(LoraFile(path))]
    for read in readers:
        with pytest.raises(ValueError, match=rf"weights\.safetensors: by its metadata it asks for .*{message}.*Only plain LoRA"):
            read()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"r": 4, "lora_alpha": 4}, "contradicts itself about x_embedder: rank 4 in its metadata, 3 in its matrices"),
        ({"r": RANK, "lora_alpha": 3, "rank_pattern": {"x_embedder": 2}}, "contradicts itself about x_embedder: rank 2"),
        ({"r": RANK}, "alphas of modules cannot be read"),
        ({"r": RANK, "lora_alpha": 6, "peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"r": RANK, "lora_alpha": 0}, "between 1e-06 and 1e\\+06 times the rank 3, got 0"),
        ({"r": RANK, "lora_alpha": -1, "use_rslora": True}, "times the square root of the rank 3, got -1"),
    ],
)
def test_metadata_that_make_no_sense(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(runs.lora_tensors(), tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    with pytest.raises(ValueError, match=message):
        read_reference_lora(tmp_path / "x.safetensors", small_stock())


def test_metadata_of_a_text_encoder_say_nothing_of_the_transformer(tmp_path: Path) -> None:
    tensors = runs.lora_tensors()
    save_file(
        tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps({"text_encoder.r": 4, "text_encoder.lora_alpha": 9})}
    )
    runs.assert_same_tensors(read_reference_lora(tmp_path / "x.safetensors", small_stock())[0], tensors)


# ---- keys and alpha tensors


def test_keys_of_a_state_dict_and_alphas_in_tensors(tmp_path: Path) -> None:
    tensors = runs.lora_tensors()
    named = {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}
    bare = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    alphas = {key.replace(".lora_A.weight", ".alpha"): torch.tensor(6.0) for key in tensors if ".lora_A." in key}
    for number, (given, factor) in enumerate(((named, 1), (bare, 1), (tensors | alphas, 2), (named | alphas, 2))):
        save_file(given, tmp_path / f"{number}.safetensors")
        found, rank = read_reference_lora(tmp_path / f"{number}.safetensors", small_stock())
        assert (rank, found.keys()) == (RANK, tensors.keys())
        assert_same(deltas(found), {name: factor * delta for name, delta in deltas(tensors).items()})
    twice = tensors | {"transformer.x_embedder.lora_A.default.weight": tensors["transformer.x_embedder.lora_A.weight"].clone()}
    save_file(twice, tmp_path / "twice.safetensors")
    with pytest.raises(ValueError, match=r"are of one module\. A file must give each matrix once"):
        read_reference_lora(tmp_path / "twice.safetensors", small_stock())
    save_file(tensors | alphas, tmp_path / "both.safetensors", {"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": 3})})
    with pytest.raises(ValueError, match=r"contradicts itself about \S+: scale 1 by its metadata, 2 by transformer\..*\.alpha"):
        read_reference_lora(tmp_path / "both.safetensors", small_stock())


def test_diffusers_adapter_files_without_prefix(tmp_path: Path) -> None:
    stock = small_stock()
    _, want = written_by_diffusers(tmp_path, stock, lora_alpha=6)
    stock.save_lora_adapter(tmp_path / "alone")
    assert_same(deltas(read_reference_lora(tmp_path / "alone" / "pytorch_lora_weights.safetensors", small_stock())[0]), want)


def test_the_cure_for_other_keys_is_named(tmp_path: Path) -> None:
    tensors, stem = runs.lora_tensors(), tmp_path / "x.safetensors"
    peft = {key.replace("transformer.", "base_model.model.", 1): value for key, value in tensors.items()}
    encoder = {"lora_te1_x.lora_up.weight": torch.ones(1, 1)}
    for given, message in (
        (in_style(tensors, "kohya"), r"`python scripts/lora_tools\.py import` makes its keys ours"),
        (in_style(tensors, "fal"), r"`python scripts/lora_tools\.py import` makes its keys ours"),
        (in_style(tensors, "kohya") | encoder, "import --transformer-only` makes its keys ours"),
        (tensors | encoder, "Unexpected 1: .*import --transformer-only` makes its keys ours"),
        (peft, r"its alpha in adapter_config\.json: load it with PEFT, and save it by FluxPipeline\.save_lora_weights"),
    ):
        save_file(given, stem)
        with pytest.raises(ValueError, match=message):
            read_reference_lora(stem, small_stock())
    with pytest.raises(ValueError, match=r"its alpha in adapter_config\.json"):
        to_diffusers(LoraFile(stem))
    save_file({"transformer.proj_out.lora_A.weight": torch.ones(3, 32)}, stem)
    with pytest.raises(ValueError, match=r"Unexpected 1: transformer\.proj_out\.lora_A\.weight\.$"):
        read_reference_lora(stem, small_stock())


def test_our_own_files_load_as_they_are(tmp_path: Path) -> None:
    ours = tiny.build_transformer()
    parameters = tiny.attach_random_lora(ours)
    path = save_reference_lora(ours, tmp_path / "lora.safetensors")
    runs.assert_same_tensors(read_reference_lora(path, ours)[0], {key: p.detach() for key, p in parameters.items()})
    with safe_open(path, framework="pt") as file:
        assert "lora_adapter_metadata" not in file.metadata()


# ---- float8


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_files_load_wherever_the_others_do(
    dtype: torch.dtype, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    want = {key: value.to(dtype) for key, value in runs.lora_tensors().items()}
    save_file(want, path)
    exact = {key: value.float() for key, value in want.items()}
    ours = tiny.build_transformer(False, num_layers=1, num_single_layers=1)
    load_reference_lora(ours, path)
    runs.assert_same_tensors({key: p.detach() for key, p in reference_lora_parameters(ours).items()}, exact)
    trainer = Trainer(runs.make_config(world, tmp_path / "run", lora__pretrained=str(path)))
    runs.assert_same_tensors(runs.values(trainer), exact)
    assert lora_tools.main(["info", str(path)]) == 0
    assert f"{'F8_E4M3' if dtype == FLOAT8[0] else 'F8_E5M2'} (26)" in capsys.readouterr().out
    for command in (["import"], ["reduce", "--rank", "2"]):
        out = tmp_path / f"{command[0]}.safetensors"
        assert lora_tools.main([command[0], str(path), *command[1:], "--output", str(out)]) == 0
        assert {value.dtype for value in load_file(out).values()} == {torch.bfloat16}
    runs.assert_same_tensors({key: value.float() for key, value in load_file(tmp_path / "import.safetensors").items()}, exact)


def test_float8_as_a_style(tmp_path: Path) -> None:
    shapes = tiny.linear_shapes(tiny.build_transformer(stock=True), ["x_embedder", "context_embedder"])
    tensors = {key: value.to(FLOAT8[0]) for key, value in tiny.random_lora_file(shapes, 2, 5).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    pipeline = style_pipeline()
    pipeline.load_style_lora(tmp_path / "x.safetensors")
    layer = pipeline.transformer.context_embedder
    assert torch.equal(layer.lora_A["style"].weight, tensors["transformer.context_embedder.lora_A.weight"].float())


def test_numbers_too_large_for_the_model_are_refused(tmp_path: Path) -> None:
    tensors = {key: value.double() for key, value in runs.lora_tensors().items()}
    tensors["transformer.x_embedder.lora_B.weight"] *= 1e60
    save_file(tensors, tmp_path / "x.safetensors")
    ours = tiny.build_transformer(False, num_layers=1, num_single_layers=1)
    with pytest.raises(
        ValueError, match=r"x\.safetensors as torch\.float32: transformer\.x_embedder\.lora_B\.weight holds values that are not"
    ):
        load_reference_lora(ours, tmp_path / "x.safetensors")


@pytest.mark.parametrize("alpha", [16.0, 1e-5])
def test_a_scale_that_float16_does_not_hold_keeps_float32(alpha: float, tmp_path: Path) -> None:
    """60000 * 4 is beyond float16, and 2e-5 * sqrt(5e-6) is zero in it."""
    stem, value = "transformer.x_embedder", 6e4 if alpha > 1 else 2e-5
    save_file(
        {
            f"{stem}.lora_A.weight": torch.full((2, 4), value).half(),
            f"{stem}.lora_B.weight": torch.full((3, 2), value).half(),
            f"{stem}.alpha": torch.tensor(alpha),
        },
        tmp_path / "x.safetensors",
    )
    found = to_diffusers(LoraFile(tmp_path / "x.safetensors"))
    raw = torch.tensor(value).half().double()
    product = found[f"{stem}.lora_B.weight"].double() @ found[f"{stem}.lora_A.weight"].double()
    torch.testing.assert_close(product, (2 * raw * raw * alpha / 2).expand(3, 4), rtol=1e-2, atol=0)


# ---- all zero


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("dtype", [torch.float16, FLOAT8[0]])
def test_an_adapter_of_zeros_loads_and_is_named(
    dtype: torch.dtype, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({key: (value * 0).to(dtype) for key, value in runs.lora_tensors().items()}, path)
    words = "all its values are zero"
    assert lora_tools.main(["info", str(path)]) == 0
    assert words in capsys.readouterr().out
    assert lora_tools.main(["import", str(path), "--output", str(tmp_path / "out.safetensors")]) == 0
    assert words in capsys.readouterr().err
    assert load_file(tmp_path / "out.safetensors").keys() == runs.lora_tensors().keys()
    load_reference_lora(tiny.build_transformer(False, num_layers=1, num_single_layers=1), path)
    assert words in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        Trainer(runs.make_config(world, tmp_path / "run", lora__pretrained=str(path)))
    assert f"lora.pretrained: {path}: {words}" in caplog.text
    config = tmp_path / "config.json"
    config.write_text(json.dumps(runs.settings(world, tmp_path / "out")))
    assert inference.main(["--config", str(config), "--lora", str(path), "--check"]) == 0
    assert f"note: inference.lora: {path}: {words}" in capsys.readouterr().err


def test_zeros_of_any_style_are_imported_whole(tmp_path: Path) -> None:
    tensors = runs.lora_tensors()
    for style in ("diffusers", "kohya", "comfyui", "fal"):
        zeros = {key: value if key.endswith("alpha") else value * 0 for key, value in in_style(tensors, style).items()}
        save_file(zeros, tmp_path / "x.safetensors")
        assert to_diffusers(LoraFile(tmp_path / "x.safetensors")).keys() == tensors.keys()
    one = {key: value if ".x_embedder." in key else value * 0 for key, value in tensors.items()}
    save_file(one, tmp_path / "x.safetensors")
    assert describe(LoraFile(tmp_path / "x.safetensors"))["all_zero"] is False
    for number, dtype in ((-0.0, torch.float16), (2.0**-24, torch.float16), (2.0**-9, FLOAT8[0]), (1e-300, torch.float64)):
        factors = {
            "a.lora_A.weight": torch.ones(1, 3).to(dtype),
            "a.lora_B.weight": torch.full((2, 1), number, dtype=torch.float64).to(dtype),
        }
        save_file(factors, tmp_path / "x.safetensors")
        assert changes_nothing(tmp_path / "x.safetensors") == (number == 0)
