"""Key styles of other programs: against an independent twin and diffusers' own converters, and files that are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from mosaic.lora.adapter import reference_module_names
from mosaic.lora.files import LoraFile
from mosaic.lora.formats import to_diffusers
from mosaic.lora.keys import find_modules, is_reference_lora
from tests import tiny
from tests.lora import foreign

WIDTH = 3072  # of FLUX.1-dev: diffusers' converter splits linear1 at multiples of it
BLOCKS = (0, 18), (0, 37)
OTHER_ROWS = {"norm1.linear": 18, "norm1_context.linear": 18, "norm.linear": 9, "norm_out.linear": 6, "ff.net.0.proj": 12}


def all_modules() -> list[str]:
    """Every linear layer of FLUX outside of blocks, and in the first and last block of each kind."""
    names = [part for parts in foreign.OUTSIDE.values() for part in parts]
    for head, numbers, table in zip(("", "single_"), BLOCKS, (foreign.DOUBLE_STREAM, foreign.SINGLE_STREAM), strict=True):
        names += [f"{head}transformer_blocks.{index}.{part}" for index in numbers for parts in table.values() for part in parts]
    return names


def random_lora(names: list[str], ranks: Callable[[str], int] = lambda name: 2, seed: int = 0, width: int = WIDTH) -> dict[str, Tensor]:
    """Random factors; rows and columns are FLUX.1-dev's where a stack needs them, else few."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        _, parts = foreign.place(name)
        stacked = len(parts) > 1
        wide = width if name.startswith("single") else 16
        fan_in = wide if stacked else 5
        fan_out = (
            fan_in * (4 if name.endswith("proj_mlp") else 1) if stacked else next((r for k, r in OTHER_ROWS.items() if name.endswith(k)), 7)
        )
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(ranks(name), fan_in, generator=generator)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(fan_out, ranks(name), generator=generator)
    return tensors


def product_on(tensors: dict[str, Tensor], name: str) -> Tensor:
    """B A applied to four random vectors, which tells any two matrices apart."""
    a, b = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
    return b @ (a @ torch.randn(a.shape[1], 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64))


def assert_same_products(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    names = {key.removesuffix(".lora_A.weight") for key in expected if key.endswith(".lora_A.weight")}
    assert names == {key.removesuffix(".lora_A.weight") for key in found if key.endswith(".lora_A.weight")}
    assert len(found) == 2 * len(names)
    for name in names:
        torch.testing.assert_close(product_on(found, name), product_on(expected, name), rtol=1e-5, atol=1e-4)


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> LoraFile:
    save_file(tensors, path, metadata=metadata)
    return LoraFile(path)


def by_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Through diffusers' converter, which leaves the prefix off modules outside of blocks."""
    converted = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    return {key if key.startswith("transformer.") else f"transformer.{key}": value for key, value in converted.items()}


# ---- names


def test_every_linear_layer_of_flux_is_found_by_each_program_s_name() -> None:
    transformer = FluxTransformer2DModel(**tiny.transformer_config())
    linear = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    for head, is_flat in (("lora_unet_", True), ("diffusion_model.", False), ("diffusion_model.", True), ("base_model.model.", False)):
        found = set()
        for name in linear:
            original, parts = foreign.place(name)
            stem = head + (original.replace(".", "_") if is_flat else original)
            (keys,) = find_modules([f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"], "x").values()
            assert keys.parts == parts
            found |= set(parts)
        assert found == linear
    for name in linear:
        for stem in (f"transformer.{name}", f"lora_transformer_{name.replace('.', '_')}"):
            (keys,) = find_modules([f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"], "x").values()
            assert keys.parts == (name,)


@pytest.mark.parametrize(
    "name",
    [
        *("transformer.transformer_blocks.0.attn.to_qq", "transformer.double_blocks.0.img_attn.qkv", "transformer.blocks", "transformer."),
        *("transformer.transformer_blocks.x.attn.to_q", "lora_unet_transformer_blocks_0_attn_to_q", "lora_unet_double_blocks_19_img_mlp_0"),
        *("lora_unet_single_blocks_38_linear2", "lora_transformer_transformer_blocks_0_ff", "double_blocks.0.img_attn.qkv"),
        *("diffusion_model.double_blocks.0.img_attn.norm.query_norm", "base_model.model.img_in_", "lora_unet_text_projection"),
        *("lora_unet_text_model_embeddings_position_embedding", "diffusion_model.text_encoders.t5xxl.transformer.x"),
    ],
)
def test_unknown_modules_are_unexpected(name: str) -> None:
    with pytest.raises(ValueError, match=f"Missing 0: none\\. Unexpected 2: {re.escape(name)}.lora_A"):
        find_modules([f"{name}.lora_{side}.weight" for side in "AB"], "x")


@pytest.mark.parametrize("num_blocks", [(2, 3), (19, 38), (0, 0)])
def test_a_reference_lora_is_known_by_its_modules(num_blocks: tuple[int, int]) -> None:
    modules = reference_module_names(*num_blocks)
    assert is_reference_lora(modules)
    assert not is_reference_lora(modules[1:])
    assert not is_reference_lora([*modules, "context_embedder"])


# ---- stacks


@pytest.mark.parametrize("style", ["kohya", "comfyui", "fal"])
@pytest.mark.parametrize("width", [16, WIDTH])
def test_stacks_come_apart(style: str, width: int, tmp_path: Path) -> None:
    tensors = random_lora(all_modules(), width=width)
    found = to_diffusers(write(tmp_path / "x.safetensors", foreign.in_style(tensors, style)))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())  # equal ranks: the factors themselves


def test_a_stack_by_hand(tmp_path: Path) -> None:
    """to_q and to_v of ranks 1 and 2, to_k without a LoRA, width 2: the ranks become the stack's, the products stay."""
    name, block = "lora_unet_double_blocks_4_img_attn_qkv", "transformer.transformer_blocks.4.attn"
    stack = {
        f"{name}.lora_down.weight": torch.tensor([[1.0, 2.0], [5.0, 6.0], [7.0, 8.0], [0.0, 0.0]]),
        f"{name}.lora_up.weight": torch.tensor(
            [[3, 0, 0, 0], [4, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 9, 10, 0], [0, 11, 12, 0]]
        ).float(),
    }
    found = to_diffusers(write(tmp_path / "x.safetensors", stack))
    products = {part: found[f"{block}.{part}.lora_B.weight"] @ found[f"{block}.{part}.lora_A.weight"] for part in ("to_q", "to_k", "to_v")}
    assert products["to_q"].tolist() == [[3, 6], [4, 8]]
    assert products["to_k"].tolist() == [[0, 0], [0, 0]]
    assert products["to_v"].tolist() == [[115, 134], [139, 162]]
    assert len(found) == 6


def test_the_last_layer_swaps_scale_and_shift(tmp_path: Path) -> None:
    tensors = random_lora(["norm_out.linear"])
    stem = "lora_unet_final_layer_adaLN_modulation_1"
    a, b = (
        tensors["transformer.norm_out.linear.lora_A.weight"],
        torch.cat(tensors["transformer.norm_out.linear.lora_B.weight"].chunk(2)[::-1]),
    )
    found = to_diffusers(write(tmp_path / "x.safetensors", {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}))
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


def test_the_last_layer_s_alpha_is_not_lost(tmp_path: Path) -> None:
    """diffusers' converter drops it."""
    tensors = random_lora(["norm_out.linear", "proj_out"])
    halved = {key: value / 2 if key.endswith("alpha") else value for key, value in foreign.in_style(tensors, "kohya").items()}
    found = to_diffusers(write(tmp_path / "x.safetensors", halved))
    for name in ("transformer.norm_out.linear", "transformer.proj_out"):
        torch.testing.assert_close(product_on(found, name), product_on(tensors, name) / 2)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs(prefix: str, tmp_path: Path) -> None:
    names = {
        "double_blocks.3.processor.qkv_lora1": 48,
        "double_blocks.3.processor.proj_lora1": 16,
        "double_blocks.3.processor.proj_lora2": 16,
    }
    names |= {
        "double_blocks.3.processor.qkv_lora2": 48,
        "single_blocks.9.processor.qkv_lora": 48,
        "single_blocks.9.processor.proj_lora": 16,
    }
    tensors = {}
    for name, rows in names.items():
        tensors |= {f"{prefix}{name}.down.weight": torch.randn(2, 16), f"{prefix}{name}.up.weight": torch.randn(rows, 2)}
    found = to_diffusers(write(tmp_path / "x.safetensors", tensors))
    assert_same_products(found, FluxPipeline.lora_state_dict(dict(tensors)))
    query = "transformer.transformer_blocks.3.attn.to_q.lora_B.weight"
    assert torch.equal(found[query], tensors[f"{prefix}double_blocks.3.processor.qkv_lora1.up.weight"][:16])
    assert len(found) == 2 * (3 + 3 + 3 + 3)


# ---- in, against diffusers


def dense_kohya(alpha: float | None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """As sd-scripts trains them: one dense LoRA per matrix of the original code."""
    generator = torch.Generator().manual_seed(3)
    rows = {"double_blocks_3_img_attn_qkv": (16, 48), "double_blocks_3_txt_mlp_0": (16, 64), "single_blocks_9_linear1": (WIDTH, 7 * WIDTH)}
    rows |= {"single_blocks_9_modulation_lin": (16, 48), "img_in": (4, 16), "vector_in_in_layer": (5, 16)}
    tensors = {}
    for name, (fan_in, fan_out) in rows.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(3, fan_in, generator=generator).to(dtype)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(fan_out, 3, generator=generator).to(dtype)
        if alpha is not None:
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize("alpha", [None, 3.0, 1.5, 1.0, 16.0])
def test_imports_are_what_diffusers_makes_of_them(alpha: float | None, tmp_path: Path) -> None:
    tensors = dense_kohya(alpha)
    found = to_diffusers(write(tmp_path / "x.safetensors", tensors))
    assert_same_products(found, by_diffusers(tensors))
    assert all(len(value) == 3 for key, value in found.items() if ".lora_A." in key)
    save_file(found, tmp_path / "y.safetensors")  # no two share memory


def test_comfyui_keys_and_diffusers_names_with_underscores(tmp_path: Path) -> None:
    tensors = dense_kohya(None)
    dotted = {
        "double_blocks_3_img_attn_qkv": "double_blocks.3.img_attn.qkv",
        "img_in": "img_in",
        "single_blocks_9_linear1": "single_blocks.9.linear1",
    }
    comfyui = {}
    for flat, name in dotted.items():
        comfyui[f"diffusion_model.{name}.lora_A.weight"] = tensors[f"lora_unet_{flat}.lora_down.weight"]
        comfyui[f"diffusion_model.{name}.lora_B.weight"] = tensors[f"lora_unet_{flat}.lora_up.weight"]
    found = to_diffusers(write(tmp_path / "x.safetensors", comfyui))
    expected = to_diffusers(write(tmp_path / "y.safetensors", tensors))
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert len(found) == 16
    plain = random_lora(["transformer_blocks.2.attn.to_out.0", "x_embedder", "single_transformer_blocks.1.proj_mlp"], width=8)
    mixture = {}
    for key, value in plain.items():
        name, side = key.removeprefix("transformer.").removesuffix(".weight").rsplit(".", 1)
        mixture[f"lora_transformer_{name.replace('.', '_')}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = value
    found = to_diffusers(write(tmp_path / "z.safetensors", mixture))
    assert found.keys() == plain.keys()
    assert all(torch.equal(value, plain[key]) for key, value in found.items())


def test_bfloat16_stays(tmp_path: Path) -> None:
    found = to_diffusers(write(tmp_path / "x.safetensors", dense_kohya(0.75, torch.bfloat16)))
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    wide = {key: value.float() for key, value in dense_kohya(0.75, torch.bfloat16).items()}
    assert_same_products(found, to_diffusers(write(tmp_path / "y.safetensors", wide)))  # 0.75 / 3 is a power of two: nothing is rounded


@pytest.mark.parametrize("pattern", [{}, {"attn.to_q": 6}, {"^x_embedder": 1, "attn.to_q": 6}])
def test_alphas_in_the_metadata_of_diffusers(pattern: dict[str, int], tmp_path: Path) -> None:
    """A file that diffusers saves without alphas has them in its metadata; as PEFT applies them."""
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0", "x_embedder"]
    stock = tiny.build_transformer(stock=True)
    tensors = tiny.random_lora_file(tiny.linear_shapes(stock, names), 2, 4)
    config = {"r": 2, "lora_alpha": 3, "alpha_pattern": pattern, "target_modules": names}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    file = write(tmp_path / "x.safetensors", tensors, metadata)
    components = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(scheduler=tiny.build_components()["scheduler"], transformer=stock, **components)
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors", adapter_name="style")
    found = to_diffusers(file)
    for name in names:
        layer = stock.get_submodule(name)
        want = layer.get_delta_weight("style")
        torch.testing.assert_close(found[f"transformer.{name}.lora_B.weight"] @ found[f"transformer.{name}.lora_A.weight"], want)


# ---- text encoders


def test_text_encoders_are_refused_or_left_out(tmp_path: Path) -> None:
    tensors = dense_kohya(None)
    te = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    file = write(tmp_path / "x.safetensors", tensors | {te: torch.ones(1, 2)})
    with pytest.raises(ValueError, match=rf"Unexpected 1: {te}\. It also adapts a text encoder: .* import --transformer-only"):
        to_diffusers(file)
    found = to_diffusers(file, transformer_only=True)
    assert found.keys() == to_diffusers(write(tmp_path / "y.safetensors", tensors)).keys()


# ---- files that are refused

DOWN, UP, ALPHA = (f"lora_unet_double_blocks_0_img_attn_qkv.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha"))
GOOD = {DOWN: torch.ones(2, 8), UP: torch.ones(24, 2)}
PLAIN = {f"transformer.x_embedder.lora_{side}.weight": torch.ones(*shape) for side, shape in (("A", (2, 4)), ("B", (4, 2)))}
LAST = "diffusion_model.final_layer.adaLN_modulation.1"
BROKEN = {
    "nothing": ({}, r"Missing 0: none\. Unexpected 0: none\."),
    "no up": ({DOWN: GOOD[DOWN]}, r"Missing 1: up matrix of double_blocks_0_img_attn_qkv\. Unexpected 0"),
    "no down": ({UP: GOOD[UP]}, r"Missing 1: down matrix of double_blocks_0_img_attn_qkv"),
    "alpha alone": ({ALPHA: torch.tensor(1.0)}, r"Missing 2: down matrix of .*, up matrix of"),
    "unknown module": (
        GOOD | {"lora_unet_middle_block.lora_down.weight": torch.ones(1, 1)},
        r"Unexpected 1: lora_unet_middle_block\.lora_down",
    ),
    "stable diffusion": ({"lora_unet_down_blocks_0_attn.lora_down.weight": torch.ones(1, 1)}, "keys do not match a FLUX LoRA"),
    "dora": (GOOD | {DOWN.replace("lora_down.weight", "dora_scale"): torch.ones(1)}, "Unexpected 1: .*dora_scale"),
    "bias": (PLAIN | {"transformer.x_embedder.lora_B.bias": torch.ones(4)}, r"Unexpected 1: transformer\.x_embedder\.lora_B\.bias"),
    "lokr": ({"lora_unet_img_in.lokr_w1": torch.ones(1)}, "Unexpected 1: .*lokr_w1"),
    "block number": ({DOWN.replace("blocks_0", "blocks_99999999"): GOOD[DOWN]}, "Unexpected 1"),
    "twice": (PLAIN | {"transformer.x_embedder.lora_down.weight": torch.ones(2, 4)}, "are of one module"),
    "both styles": (
        PLAIN | {f"lora_unet_img_in.lora_{n}.weight": torch.ones(2, 2) for n in ("up", "down")},
        "more than one LoRA for x_embedder",
    ),
    "four dimensions": (
        GOOD | {DOWN: torch.ones(2, 8, 1, 1)},
        r"must be a matrix of .*, got torch\.float32 of shape \(2, 8, 1, 1\)",
    ),
    "integers": (GOOD | {UP: torch.ones(24, 2, dtype=torch.int64)}, "must be a matrix of float64, .*float8_e5m2, got torch.int64"),
    "float8 of powers": (GOOD | {UP: torch.ones(24, 2).to(torch.float8_e8m0fnu)}, "must be a matrix of .*, got torch.float8_e8m0fnu"),
    "not a number": (GOOD | {UP: torch.full((24, 2), torch.nan)}, "holds values that are not finite"),
    "infinite": (GOOD | {DOWN: torch.full((2, 8), torch.inf)}, "holds values that are not finite"),
    "ranks differ": (GOOD | {UP: torch.ones(24, 3)}, "must have a column for each row of .*, got 3 and 2"),
    "rank 0": ({DOWN: torch.ones(0, 8), UP: torch.ones(24, 0)}, "one or more, got 0 and 0"),
    "rows": (GOOD | {UP: torch.ones(25, 2)}, r"must have 24 rows \(3 parts\), got 25"),
    "odd rows": (
        {f"{LAST}.lora_down.weight": torch.ones(1, 4), f"{LAST}.lora_up.weight": torch.ones(3, 1)},
        r"must have 4 rows \(1 parts\), got 3",
    ),
    "alpha 0": (GOOD | {ALPHA: torch.tensor(0.0)}, r"alpha must be one number between 1e-06 and 1e\+06 times the rank 2, got 0"),
    "alpha nan": (GOOD | {ALPHA: torch.tensor(torch.nan)}, "times the rank 2, got nan"),
    "alpha large": (GOOD | {ALPHA: torch.tensor(1e30)}, r"times the rank 2, got 1e\+30"),
    "alpha vector": (GOOD | {ALPHA: torch.ones(2)}, "times the rank 2, got nan"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_files_are_refused(case: str, tmp_path: Path) -> None:
    tensors, message = BROKEN[case]
    with pytest.raises(ValueError, match=rf"x\.safetensors: .*{message}"):
        to_diffusers(write(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"transformer.use_dora": true}', "DoRA"),
        ('{"lora_alpha": "many"}', "alphas of modules cannot be read"),
        ('{"lora_alpha": null}', "alphas of modules cannot be read"),
        ('{"lora_alpha": -1}', "lora_alpha in its metadata must be one number"),
        ('{"alpha_pattern": 3}', "alphas of modules cannot be read"),
        ('{"alpha_pattern": {"(a+)+$": 3}}', "is more than a name"),
    ],
)
def test_broken_metadata_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        to_diffusers(write(tmp_path / "x.safetensors", PLAIN, {"lora_adapter_metadata": text}))


def test_many_keys_are_named_briefly(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unexpected 5000: k0, .* \(4994 more\)"):
        find_modules([f"k{index}" for index in range(5000)], "x")
