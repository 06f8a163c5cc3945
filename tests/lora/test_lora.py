"""The reference LoRA: attaching, files, refusals, and style LoRAs beside it."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mosaic.lora.adapter import (
    DOUBLE_STREAM_TARGETS,
    SINGLE_STREAM_TARGETS,
    attach_reference_lora,
    detach_reference_lora,
    has_reference_lora,
    reference_lora_modules,
    reference_lora_parameters,
    save_reference_lora,
)
from mosaic.lora.loading import load_reference_lora, read_reference_lora
from mosaic.model.branch import branch_linear
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from tests import tiny


def lora_layers(transformer: nn.Module) -> list[str]:
    return [name for name, module in transformer.named_modules() if isinstance(module, LoraLayer)]


def module_types(transformer: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in transformer.named_modules()}


def run(transformer: nn.Module, batch: tiny.Batch) -> Tensor:
    with torch.no_grad():
        return transformer(**batch.inputs).sample


def close(found: Tensor, want: Tensor) -> bool:
    return torch.allclose(found, want, atol=3e-5, rtol=1e-4)


# ---- attach and detach


def test_the_modules_are_those_of_the_published_file(transformer: MosaicFluxTransformer2DModel) -> None:
    names = reference_lora_modules(transformer)
    assert len(names) == len(set(names)) == 1 + 2 * 6 + 2 * 6
    assert {
        "x_embedder",
        "transformer_blocks.1.norm1.linear",
        "transformer_blocks.0.ff.net.2",
        "single_transformer_blocks.1.proj_out",
    } <= set(names)
    assert all(isinstance(transformer.get_submodule(name), nn.Linear) for name in names)
    assert DOUBLE_STREAM_TARGETS == ("norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2")
    assert SINGLE_STREAM_TARGETS == ("norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v")


def test_only_the_lora_learns(transformer: MosaicFluxTransformer2DModel) -> None:
    transformer.requires_grad_(True)
    attach_reference_lora(transformer, 4)
    trainable = {id(p) for p in transformer.parameters() if p.requires_grad}
    parameters = reference_lora_parameters(transformer)
    assert trainable == {id(p) for p in parameters.values()}
    assert len(parameters) == 2 * len(reference_lora_modules(transformer))
    assert set(lora_layers(transformer)) == set(reference_lora_modules(transformer))
    for key, parameter in parameters.items():
        layer = transformer.get_submodule(key.removeprefix("transformer.").split(".lora_")[0])
        if ".lora_A." in key:
            assert parameter.shape == (4, layer.in_features)
            assert 0.5 < parameter.std() * 4 < 1.5  # gaussian, standard deviation 1 / rank
        else:
            assert parameter.shape == (layer.out_features, 4)
            assert not parameter.any()
        assert layer.scaling["reference"] == 1
        assert isinstance(layer.lora_dropout["reference"], nn.Identity)


def test_detach_leaves_bit_equal_weights_and_stock_modules(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    weights = {key: value.clone() for key, value in transformer.state_dict().items()}
    types, before = module_types(transformer), run(transformer, batch)
    parameters = tiny.attach_random_lora(transformer)
    transformer(**batch.inputs).sample.square().sum().backward()
    with torch.no_grad():
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter -= parameter.grad
    assert not torch.equal(run(transformer, batch), before)
    detach_reference_lora(transformer)
    assert module_types(transformer) == types
    assert transformer.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in transformer.state_dict().items())
    assert torch.equal(run(transformer, batch), before)
    assert not has_reference_lora(transformer)
    detach_reference_lora(transformer)  # a second time does nothing
    attach_reference_lora(transformer, 2)  # and it can be attached again
    assert reference_lora_parameters(transformer)["transformer.x_embedder.lora_A.weight"].shape == (2, tiny.CHANNELS)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "8"])
def test_the_rank_must_be_a_positive_integer(transformer: MosaicFluxTransformer2DModel, rank: object) -> None:
    with pytest.raises(ValueError, match=r"lora\.rank must be a positive integer, got"):
        attach_reference_lora(transformer, rank)
    assert not lora_layers(transformer)


def test_attaching_twice_is_refused(transformer: MosaicFluxTransformer2DModel) -> None:
    attach_reference_lora(transformer, 4)
    with pytest.raises(ValueError, match="a reference LoRA is attached already; detach_reference_lora"):
        attach_reference_lora(transformer, 4)
    with pytest.raises(ValueError, match="no reference LoRA is attached; call attach_reference_lora"):
        reference_lora_parameters(tiny.build_transformer())


# ---- where it acts


def test_branch_linear(generator: torch.Generator, transformer: MosaicFluxTransformer2DModel) -> None:
    parameters = tiny.attach_random_lora(transformer)
    layer = transformer.x_embedder
    down, up = (parameters[f"transformer.x_embedder.lora_{side}.weight"] for side in "AB")
    x = torch.randn(2, 7, tiny.CHANNELS, generator=generator)
    base = layer.base_layer(x)
    torch.testing.assert_close(branch_linear(layer, x, 3)[:, 3:], base[:, 3:] + x[:, 3:] @ down.T @ up.T)
    assert torch.equal(branch_linear(layer, x, 3)[:, :3], base[:, :3])
    assert torch.equal(branch_linear(layer, x, 7), base)
    plain = transformer.context_embedder
    x = torch.randn(2, 7, tiny.TEXT_WIDTH, generator=generator)
    assert torch.equal(branch_linear(plain, x, 3), plain(x))


def test_the_lora_is_never_computed_for_text_or_target(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    tiny.attach_random_lora(transformer)
    seen: dict[str, int] = {}
    for name in reference_lora_modules(transformer):
        matrix = transformer.get_submodule(name).lora_A["reference"]
        matrix.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0].shape[:-1].numel()}))
    run(transformer, batch)
    size, num_references = batch.inputs["reference_hidden_states"].shape[:2]
    tokens = num_references * batch.num_reference_tokens
    assert seen == {name: size * (1 if name.endswith(".linear") else tokens) for name in reference_lora_modules(transformer)}
    seen.clear()
    with torch.no_grad():
        transformer(**tiny.without_references(batch.inputs))
    assert not any("blocks" in name and not name.endswith(".linear") for name in seen)


def test_text_and_target_projections_do_not_see_the_lora(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    # In block 0 nothing has been mixed yet: all projections of text and target are bit-equal for any LoRA.
    first, captured = transformer.transformer_blocks[0], []
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        getattr(first.attn, name).register_forward_hook(
            lambda module, args, output: captured.append(
                output.unflatten(0, (2, -1))[:, :24].clone() if output.ndim == 2 else output[:, :24].clone()
            )
        )
    run(transformer, batch)
    bare = list(captured)
    for seed in (1, 2):
        detach_reference_lora(transformer)
        tiny.attach_random_lora(transformer, seed=seed)
        captured.clear()
        run(transformer, batch)
        assert len(captured) == 6
        assert all(torch.equal(a, b) for a, b in zip(captured, bare, strict=True))


# ---- files


def test_save_then_load(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch, tmp_path: Path) -> None:
    parameters = tiny.attach_random_lora(transformer, rank=3)
    path = save_reference_lora(transformer, tmp_path / "deep" / "lora.safetensors", {"lora": {"rank": 3}})
    assert [p.name for p in path.parent.iterdir()] == ["lora.safetensors"]  # nothing left aside
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["mosaic"])["config"] == {"lora": {"rank": 3}}
    tensors = load_file(path)
    assert tensors.keys() == parameters.keys()
    assert all(torch.equal(tensors[key], parameter) for key, parameter in parameters.items())
    fresh = tiny.build_transformer()
    assert load_reference_lora(fresh, path) == 3
    assert close(run(fresh, batch), run(transformer, batch))
    assert not any(p.requires_grad for p in fresh.parameters())


def test_a_file_without_metadata_loads_and_its_rank_is_read(transformer: MosaicFluxTransformer2DModel, tmp_path: Path) -> None:
    # As published: the keys only, bfloat16, no alpha, no metadata.
    shapes = tiny.linear_shapes(transformer, reference_lora_modules(transformer))
    tensors = {key: value.bfloat16() for key, value in tiny.random_lora_file(shapes, rank=5, seed=1).items()}
    save_file(tensors, tmp_path / "subject_512.safetensors")
    assert load_reference_lora(transformer, tmp_path / "subject_512.safetensors") == 5
    for key, parameter in reference_lora_parameters(transformer).items():
        assert torch.equal(parameter, tensors[key].float())
    assert {layer.scaling["reference"] for layer in transformer.modules() if isinstance(layer, LoraLayer)} == {1.0}


def test_loading_replaces_whatever_its_rank(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch, tmp_path: Path) -> None:
    tiny.attach_random_lora(transformer, rank=2, seed=7)
    save_reference_lora(transformer, tmp_path / "two.safetensors")
    want = run(transformer, batch)
    detach_reference_lora(transformer)
    tiny.attach_random_lora(transformer, rank=4, seed=8)
    assert load_reference_lora(transformer, tmp_path / "two.safetensors") == 2
    assert close(run(transformer, batch), want)


def broken_files(transformer: FluxTransformer2DModel) -> dict[str, tuple[dict[str, Tensor], str]]:
    shapes = tiny.linear_shapes(transformer, reference_lora_modules(transformer))
    good = tiny.random_lora_file(shapes, rank=3, seed=1)
    query = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    without = {key: value for key, value in good.items() if key != query}
    other_rank = {k: v[:2] if ".lora_A." in k else v[:, :2].contiguous() for k, v in good.items() if "x_embedder" in k}
    return {
        "missing": (without, rf"25 modules.*Missing 1: {query}\. Unexpected 0: none\."),
        "unexpected": (
            good | {"transformer.proj_out.lora_A.weight": torch.ones(3, 32)},
            r"Missing 0: none\. Unexpected 1: transformer\.proj_out\.lora_A\.weight\.",
        ),
        "prefix": (
            {f"unet.{key}": value for key, value in good.items()},
            r"Missing 50: .* \(44 more\)\. Unexpected 50: unet\..* \(44 more\)",
        ),
        "empty": ({"nothing": torch.ones(1)}, r"Missing 50:.*Unexpected 1: nothing\."),
        "ranks": (good | other_rank, r"all modules must have one rank, got ranks \[2, 3\]"),
        "shape A": (good | {query: torch.ones(3, 33)}, rf"{query} must have shape \(3, 32\), got \(3, 33\)"),
        "shape B": (good | {query.replace("_A", "_B"): torch.ones(32, 4)}, r"lora_B\.weight must have shape \(32, 3\), got \(32, 4\)"),
        "scalars": ({key: torch.ones(()) for key in good}, r"must be a matrix of .*, got F32 of shape \(\)"),
        "vectors": ({key: torch.ones(3) for key in good}, r"must be a matrix of .*, got F32 of shape \(3,\)"),
        "rank 0": ({k: v[:0] if ".lora_A." in k else v[:, :0] for k, v in good.items()}, "the rank must be positive"),
        "NaN": (good | {query: torch.full((3, 32), float("nan"))}, rf"{query} holds values that are not finite\."),
        "infinite": (good | {query: good[query] / 0}, rf"{query} holds values that are not finite\."),
        "integers": (
            {key: torch.ones_like(value, dtype=torch.int32) for key, value in good.items()},
            r"must be a matrix of float64, float32, .*float8_e5m2, got I32",
        ),
    }


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("case", list(broken_files(tiny.build_transformer(stock=True))))
def test_files_that_do_not_fit_are_refused_and_nothing_changes(case: str, attached: bool, batch: tiny.Batch, tmp_path: Path) -> None:
    transformer = tiny.build_transformer()
    if attached:
        tiny.attach_random_lora(transformer)
    before, types = run(transformer, batch), module_types(transformer)
    tensors, message = broken_files(tiny.build_transformer(stock=True))[case]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"x\.safetensors: .*{message}"):
        load_reference_lora(transformer, tmp_path / "x.safetensors")
    assert module_types(transformer) == types
    assert has_reference_lora(transformer) == attached
    assert torch.equal(run(transformer, batch), before)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 100])
def test_other_file_kinds_are_refused(transformer: MosaicFluxTransformer2DModel, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"lora\.safetensors: not a safetensors file"):
        read_reference_lora(path, transformer)
    torch.save({"x": torch.ones(1)}, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match=r"lora\.bin: not a safetensors file.*read from \.safetensors only"):
        load_reference_lora(transformer, tmp_path / "lora.bin")
    assert not lora_layers(transformer)


def test_a_missing_file_is_named(transformer: MosaicFluxTransformer2DModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"reference LoRA not found: .*nowhere\.safetensors"):
        load_reference_lora(transformer, tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="reference LoRA not found"):
        load_reference_lora(transformer, tmp_path)  # a folder
