"""What the backward pass computes anew: equal numbers in every mode, attention that runs once, and what is held between the passes."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mosaic.method.grids import Grid
from mosaic.model import attention_rows
from mosaic.model.attention import Layout, branch_attention
from mosaic.model.attention_rows import CaptureRequest, capture_rows
from mosaic.model.recomputation import ATTENTION_KERNELS, set_gradient_checkpointing
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from tests import forks, tiny
from tests.model.test_attention import attend, draw, parts
from tests.model.test_transformer import our_step

MODES = ["none", "block", "keep_attention"]


class Operations(TorchDispatchMode):
    """Counts operations, and the bytes of all memory that was asked for since and is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()
        self.held: dict[Any, int] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function] += 1
        output = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.held[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return output

    def bytes_held(self) -> int:
        return sum(size for storage, size in self.held.items() if not storage.expired())

    def attention_calls(self) -> int:
        return sum(self.counts[kernel] for kernel in ATTENTION_KERNELS)


def step_in_mode(mode: str, reference_attention: str, autocast: bool, dtype: torch.dtype = torch.float32) -> tuple:
    transformer, batch = tiny.build_transformer(), tiny.build_batch()
    parameters = tiny.attach_random_lora(transformer)
    if dtype != torch.float32:
        for parameter in transformer.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(dtype)
    set_gradient_checkpointing(transformer, mode)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return our_step(transformer, parameters, batch, reference_attention)


def assert_bit_equal(found: tuple, expected: tuple) -> None:
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(ours, theirs)
    for key, gradient in expected[3].items():
        assert torch.equal(found[3][key], gradient), key


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("precision", ["float32", "autocast", "autocast, bfloat16 base"])
@pytest.mark.parametrize("reference_attention", ["target", "joint", "isolated"])
def test_all_modes_give_the_same_bits(reference_attention: str, precision: str) -> None:
    options = (reference_attention, precision != "float32", torch.bfloat16 if "base" in precision else torch.float32)
    expected = step_in_mode("none", *options)
    assert any(bool(gradient.any()) for gradient in expected[3].values())
    for mode in MODES[1:]:
        assert_bit_equal(step_in_mode(mode, *options), expected)


def test_an_unknown_mode_is_refused(transformer: MosaicFluxTransformer2DModel) -> None:
    with pytest.raises(ValueError, match=r"must be one of \('none', 'block', 'keep_attention'\), got True"):
        set_gradient_checkpointing(transformer, True)


def forward_and_backward(mode: str, reference_attention: str = "target") -> tuple[int, int, int]:
    """Attention calls of the forward pass and of both, and bytes held between them."""
    transformer, batch = tiny.build_transformer(), tiny.build_batch(4, 1, Grid(16, 16), Grid(8, 8))
    tiny.attach_random_lora(transformer)
    set_gradient_checkpointing(transformer, mode)
    with Operations() as operations:
        output = transformer(**batch.inputs, reference_attention=reference_attention, capture=CaptureRequest(batch.points.global_index))
        forward, held = operations.attention_calls(), operations.bytes_held()
        (output.sample.sum() + output.attention_rows[..., 0].sum()).backward()
    return forward, operations.attention_calls(), held


def test_attention_runs_twice_under_block_checkpointing_only() -> None:
    found = {mode: forward_and_backward(mode) for mode in MODES}
    assert {mode: counts[:2] for mode, counts in found.items()} == {"none": (8, 8), "block": (8, 16), "keep_attention": (8, 8)}
    held = {mode: counts[2] for mode, counts in found.items()}
    tokens, width, heads, blocks = 5 + 256 + 4 * 64, 32, 2, 4
    # Beyond a block's input: the attention's output for every token, and one float32 log-sum-exp per token and head.
    assert held["keep_attention"] - held["block"] == pytest.approx(blocks * tokens * (4 * width + 4 * heads), rel=0.05)
    assert held["none"] > 5 * held["keep_attention"]


def test_copies_of_keys_and_values_are_not_held(generator: torch.Generator) -> None:
    text, target, reference, num_references, heads, width = 8, 64, 16, 6, 2, 16
    main, length = text + target, text + target + num_references * reference
    inputs = [torch.randn(1, length, heads, width, generator=generator, requires_grad=True) for _ in range(3)]
    with Operations() as operations:
        output = branch_attention(*inputs, Layout(num_references, reference), attend, text)
        held = operations.bytes_held()
    # Outputs and log-sum-exps only: the copies would be 2 * num_references * (main + reference) tokens more.
    assert held == 4 * heads * length * (width + 1)
    assert output.main.shape[1] == main
    torch.autograd.grad(output.main.sum() + output.references.sum(), inputs)


def gradients_of_two_processes(folder: str) -> None:
    """Each process takes another batch; DDP joins the gradients, which rank 0 writes for every mode."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for mode in MODES:
        transformer, batch = tiny.build_transformer(num_layers=1, num_single_layers=1), tiny.build_batch(seed=rank)
        parameters = tiny.attach_random_lora(transformer)
        set_gradient_checkpointing(transformer, mode)
        wrapped = torch.nn.parallel.DistributedDataParallel(transformer)
        output = wrapped(**batch.inputs, capture=CaptureRequest(batch.points.global_index))
        (output.sample.square().mean() + output.attention_rows.square().sum()).backward()
        if rank == 0:
            torch.save({key: p.grad for key, p in parameters.items()}, f"{folder}/{mode}.pt")
    del wrapped, output  # before the group: what frees the last of the two joins gloo's threads, and only the group does so without the GIL
    torch.distributed.destroy_process_group()


def test_two_processes_join_the_same_gradients_in_every_mode(tmp_path: Path) -> None:
    ranks = forks.start_ranks(gradients_of_two_processes, str(tmp_path), output=tmp_path / "log", processes=2)
    assert forks.wait(ranks) == [0, 0], (tmp_path / "log").read_text()
    expected, *others = (torch.load(tmp_path / f"{mode}.pt", weights_only=True) for mode in MODES)
    sums = None
    for seed in (0, 1):
        transformer, batch = tiny.build_transformer(num_layers=1, num_single_layers=1), tiny.build_batch(seed=seed)
        parameters = tiny.attach_random_lora(transformer)
        output = transformer(**batch.inputs, capture=CaptureRequest(batch.points.global_index))
        loss = output.sample.square().mean() + output.attention_rows.square().sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), found, strict=True)]
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
    for (key, gradient), total in zip(expected.items(), sums, strict=True):
        torch.testing.assert_close(gradient, total / 2, atol=1e-6, rtol=1e-5)
        for other in others:
            assert torch.equal(other[key], gradient), key


# ---- captured rows


def rows_and_gradients(generator: torch.Generator) -> list[Tensor]:
    query, key, _ = draw(3, generator.manual_seed(0))
    index = torch.stack([torch.randperm(15, generator=generator)[:7] for _ in range(2)])
    rows = capture_rows(*parts(query, key), 3, CaptureRequest(index)).attention_rows
    return [rows, *torch.autograd.grad((rows * torch.randn(rows.shape, generator=generator)).sum(), (query, key))]


def test_rows_of_one_head_at_a_time(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = rows_and_gradients(generator)
    monkeypatch.setattr(attention_rows, "SAVED_BYTES", 0)
    expected = rows_and_gradients(generator)
    assert all(map(torch.equal, kept, expected))
    monkeypatch.setattr(attention_rows, "MAP_BYTES", 1)
    for found, want in zip(rows_and_gradients(generator), expected, strict=True):
        torch.testing.assert_close(found, want, atol=1e-7, rtol=1e-6)


class Peak(Operations):
    """The largest number of bytes held after any operation."""

    peak = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(function, types, args, kwargs)
        self.peak = max(self.peak, self.bytes_held())
        return output


def test_bytes_of_the_rows(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Held between the passes: the rows alone. In either pass: two maps of MAP_BYTES, float32 copies of the rows' queries and of the
    keys, the gradients, a few sets of rows.
    """
    heads, width, points, target = 24, 16, 64, 256
    one_map, rows_size, tokens = 4 * heads * points * target, 4 * points * target, 4 * heads * width * (points + target)
    monkeypatch.setattr(attention_rows, "MAP_BYTES", one_map // heads)
    monkeypatch.setattr(attention_rows, "SAVED_BYTES", one_map - 1)
    query, key = (torch.randn(1, n, heads, width, generator=generator, requires_grad=True) for n in (96, target))
    index = torch.randperm(96, generator=generator)[None, :points]
    with Peak() as operations:
        rows = capture_rows(query, key, 6, CaptureRequest(index)).attention_rows
        assert operations.bytes_held() == rows_size
        assert operations.peak <= 2 * one_map // heads + 3 * rows_size + 2 * tokens
        operations.peak = 0
        torch.autograd.grad((rows * rows.detach()).sum(), (query, key))
        assert operations.peak <= 2 * one_map // heads + 6 * rows_size + 4 * tokens
        assert operations.peak < one_map


def test_rows_of_many_blocks_hold_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every captured block adds to one float32 sum: what is held does not grow with their number, where maps are not tiny."""
    monkeypatch.setattr(attention_rows, "SAVED_BYTES", 0)
    held = []
    for blocks in ("all", [0], None):
        transformer, batch = tiny.build_transformer(), tiny.build_batch(2, 1, Grid(16, 16), Grid(8, 8))
        tiny.attach_random_lora(transformer)
        index = torch.arange(100)[None]
        with Operations() as operations:
            output = transformer(**batch.inputs, capture=None if blocks is None else CaptureRequest(index, blocks=blocks))
            held.append(operations.bytes_held())
        assert output.sample.requires_grad
    rows_size = 4 * 100 * 256
    # The rows and, in each captured block, what the queries' cut adds if anything: far less than the rows of another block.
    assert rows_size <= held[1] - held[2] < 1.2 * rows_size
    assert abs(held[0] - held[1]) < 0.2 * rows_size


# ---- compilation


# Dynamo itself looks at `.grad` of the block's inputs, and makes an instance of every autograd function.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("mode", "calls"), [("block", 4), ("keep_attention", 2)])  # what "none" compiles is in each
def test_compiled_blocks_in_every_mode(mode: str, calls: int, batch: tiny.Batch) -> None:
    """On one block, of the single-stream kind, which is recomputed as the other is."""
    transformer = tiny.build_transformer(num_layers=0, num_single_layers=1)
    parameters = tiny.attach_random_lora(transformer)
    expected = our_step(transformer, parameters, batch)
    set_gradient_checkpointing(transformer, mode)
    torch._dynamo.reset()
    transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)  # a graph break would be an error
    with Operations() as operations:
        found = our_step(transformer, parameters, batch)
    torch._dynamo.reset()
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    for key, gradient in expected[3].items():
        torch.testing.assert_close(found[3][key], gradient, atol=1e-6, rtol=1e-4)
    assert operations.attention_calls() == calls
