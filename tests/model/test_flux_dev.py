"""FLUX.1-dev's exact configuration on the meta device: LoRA size, position ids, and the FLOPs of a forward pass."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mosaic.lora.adapter import attach_reference_lora, reference_lora_modules, reference_lora_parameters
from mosaic.method.grids import Grid, token_grid
from mosaic.method.tokens import position_ids, reference_position_ids, text_position_ids
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.transformer import MosaicFluxTransformer2DModel

WIDTH, HEADS, DOUBLE, SINGLE = 3072, 24, 19, 38
TEXT, TEXT_WIDTH, CHANNELS, RANK = 512, 4096, 64, 128
REFERENCE_GRID = token_grid(512, 512)
CONFIG = {
    "patch_size": 1,
    "in_channels": CHANNELS,
    "num_layers": DOUBLE,
    "num_single_layers": SINGLE,
    "attention_head_dim": WIDTH // HEADS,
    "num_attention_heads": HEADS,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}


def build(double: int, single: int) -> MosaicFluxTransformer2DModel:
    """FLUX.1-dev with this many blocks, without memory, with a reference LoRA of rank 128."""
    with torch.device("meta"):
        transformer = MosaicFluxTransformer2DModel(**CONFIG | {"num_layers": double, "num_single_layers": single}).to(torch.bfloat16)
        attach_reference_lora(transformer, RANK)
    return transformer


@pytest.fixture(scope="module")
def flux_dev() -> MosaicFluxTransformer2DModel:
    """All 12 billion parameters."""
    return build(DOUBLE, SINGLE)


@pytest.fixture(scope="module")
def shallow() -> MosaicFluxTransformer2DModel:
    """One block of each kind: they are all alike, so that this counts as well, and faster."""
    return build(1, 1)


def expected_flops(num_target: int, num_references: int, double: int = DOUBLE, single: int = SINGLE) -> float:
    """Multiply-adds times two of one forward pass in mode "target", small terms (time embedding, LoRA on AdaLN) left out.

    Every block holds 12 d^2 weights per token: in double-stream blocks q, k, v, out (4) and the MLP (8), in single-stream blocks
    q, k, v, the MLP's entry and the common exit (3 + 4 + 5). A (query, key) pair costs 4 d in each block. LoRA on a reference token: per
    block the sum of (d_in + d_out) of its adapted layers, times the rank. AdaLN acts on one vector per branch.
    """
    tokens = num_references * REFERENCE_GRID.num_tokens
    main = TEXT + num_target
    everything = main + tokens
    linear = 2 * 12 * WIDTH**2 * (double + single) * everything
    # Text and target ask everything; each reference asks text, target and itself.
    pairs = main * everything + tokens * (main + REFERENCE_GRID.num_tokens)
    attention = 4 * WIDTH * (double + single) * pairs
    lora_double = 4 * (WIDTH + WIDTH) + (4 * WIDTH + WIDTH)  # q, k, v, out; the MLP's exit
    lora_single = 3 * (WIDTH + WIDTH) + (WIDTH + 4 * WIDTH) + (5 * WIDTH + WIDTH)  # q, k, v; the MLP's entry; the exit
    lora = 2 * RANK * (CHANNELS + WIDTH + double * lora_double + single * lora_single) * tokens  # the first two: x_embedder
    adaln_main = 2 * WIDTH**2 * (double * (6 + 6) + single * 3)
    adaln_reference = 2 * WIDTH**2 * (double * 6 + single * 3)
    embeddings = 2 * WIDTH * (TEXT * TEXT_WIDTH + (num_target + tokens) * CHANNELS + num_target * CHANNELS)
    return linear + attention + lora + adaln_main + adaln_reference * bool(num_references) + embeddings


def inputs(size: int, num_references: int) -> dict[str, object]:
    """Meta tensors of a forward pass, batch 1; the ids are real."""
    grid = token_grid(size, size)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    return {
        "hidden_states": empty(1, grid.num_tokens, CHANNELS),
        "encoder_hidden_states": empty(1, TEXT, TEXT_WIDTH),
        "pooled_projections": empty(1, 768),
        "timestep": empty(1),
        "guidance": empty(1),
        "img_ids": position_ids(grid, device="meta"),
        "txt_ids": text_position_ids(TEXT, device="meta"),
        "reference_hidden_states": empty(1, num_references, REFERENCE_GRID.num_tokens, CHANNELS),
        "reference_ids": reference_position_ids(REFERENCE_GRID, num_references, device="meta"),
    }


def test_lora_size(flux_dev: MosaicFluxTransformer2DModel) -> None:
    assert len(reference_lora_modules(flux_dev)) == 343
    parameters = reference_lora_parameters(flux_dev)
    assert len(parameters) == 2 * 343
    assert sum(parameter.numel() for parameter in parameters.values()) == 463_609_856
    base = sum(parameter.numel() for parameter in flux_dev.parameters() if not parameter.requires_grad)
    assert base == 11_901_408_320
    shapes = {
        "x_embedder": ((128, 64), (3072, 128)),
        "transformer_blocks.18.norm1.linear": ((128, 3072), (18432, 128)),
        "transformer_blocks.0.ff.net.2": ((128, 12288), (3072, 128)),
        "single_transformer_blocks.37.norm.linear": ((128, 3072), (9216, 128)),
        "single_transformer_blocks.0.proj_mlp": ((128, 3072), (12288, 128)),
        "single_transformer_blocks.0.proj_out": ((128, 15360), (3072, 128)),
    }
    for name, (down, up) in shapes.items():
        assert parameters[f"transformer.{name}.lora_A.weight"].shape == down
        assert parameters[f"transformer.{name}.lora_B.weight"].shape == up


def count(transformer: MosaicFluxTransformer2DModel, size: int, num_references: int) -> int:
    """FLOPs of a forward pass; the plain attention backend is counted as its two matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        output = transformer(**inputs(size, num_references))
    assert output.sample.shape == (1, (size // 16) ** 2, CHANNELS)
    assert output.sample.dtype == torch.bfloat16
    return counter.get_total_flops()


@pytest.mark.parametrize("size", [512, 1024])
@pytest.mark.parametrize("num_references", [1, 2, 3, 4, 5, 6])
def test_flops_of_one_block_of_each_kind(shallow: MosaicFluxTransformer2DModel, size: int, num_references: int) -> None:
    expected = expected_flops((size // 16) ** 2, num_references, double=1, single=1)
    assert count(shallow, size, num_references) == pytest.approx(expected, rel=1e-3)


def test_flops_of_the_rows(shallow: MosaicFluxTransformer2DModel) -> None:
    index = torch.zeros(1, 1024, dtype=torch.long, device="meta")
    # PyTorch's own formula does not take the product's number format.
    products = {torch.ops.aten.bmm: lambda first, second, *_, **__: 2 * math.prod(first) * second[-1]}
    counter = FlopCounterMode(display=False, custom_mapping=products)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        output = shallow(**inputs(1024, 2), capture=CaptureRequest(index))
    assert output.attention_rows.shape == (1, 1024, 4096)
    assert output.attention_rows.dtype == torch.float32
    rows = 2 * WIDTH * 1024 * 4096 * (1 + 1)  # one product with the target keys in each block
    assert counter.get_total_flops() == pytest.approx(expected_flops(4096, 2, 1, 1) + rows, rel=1e-3)


@pytest.mark.parametrize(("size", "columns"), [(512, 32), (1024, 64)])
def test_position_ids(size: int, columns: int) -> None:
    target, references = position_ids(token_grid(size, size)), reference_position_ids(Grid(32, 32), 6)
    assert target.dtype == references.dtype == torch.float32
    assert target.shape == (columns * columns, 3)
    assert target[columns + 2].tolist() == [0, 1, 2]
    assert references.shape == (6 * 1024, 3)
    for k in range(6):
        own = references[k * 1024 : (k + 1) * 1024]
        assert own[0].tolist() == [0, 0, -32 * (k + 1)]  # also for a target of 1024 px: the shift is the reference's own width
        assert own[-1].tolist() == [0, 31, -32 * (k + 1) + 31]
        assert own[33].tolist() == [0, 1, -32 * (k + 1) + 1]
    assert len(torch.cat([target, references]).unique(dim=0)) == columns**2 + 6 * 1024
