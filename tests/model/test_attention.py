"""Attention in its three modes against a dense mask, and captured rows against full maps, on raw tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mosaic.model import attention_rows
from mosaic.model.attention import Layout, branch_attention
from mosaic.model.attention_rows import CaptureRequest, capture_rows, resolve_capture_blocks
from tests import naive

TEXT, TARGET, REFERENCE, HEADS, WIDTH = 3, 8, 5, 2, 4
MODES = ["target", "joint", "isolated"]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def draw(num_references: int, generator: torch.Generator, batch: int = 2) -> list[Tensor]:
    length = TEXT + TARGET + num_references * REFERENCE
    return [torch.randn(batch, length, HEADS, WIDTH, generator=generator, requires_grad=True) for _ in range(3)]


def dense(query: Tensor, key: Tensor, value: Tensor, num_references: int, mode: str) -> Tensor:
    owner = torch.tensor([-1] * (TEXT + TARGET) + [k for k in range(num_references) for _ in range(REFERENCE)])
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * WIDTH**-0.5
    weights = logits.masked_fill(~naive.attention_mask(owner, mode), -torch.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def attended(inputs: list[Tensor], layout: Layout) -> Tensor:
    """Main and reference output in one tensor."""
    output = branch_attention(*inputs, layout, attend)
    return torch.cat([output.main, output.references], dim=1)


def parts(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """What rows are read from: the references' queries and the target's keys."""
    return query[:, TEXT + TARGET :], key[:, TEXT : TEXT + TARGET]


def full_map(query: Tensor, key: Tensor) -> Tensor:
    """[B, K * N_ref, N_tgt]."""
    rows, columns = parts(query, key)
    return (torch.einsum("bqhd,bkhd->bhqk", rows, columns) * WIDTH**-0.5).softmax(dim=-1).mean(dim=1)


@pytest.mark.parametrize("num_references", [1, 2, 3, 6])
@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_the_dense_mask_with_gradients(generator: torch.Generator, mode: str, num_references: int) -> None:
    inputs = draw(num_references, generator)
    weight = torch.randn(inputs[0].shape, generator=generator)
    ours = attended(inputs, Layout(num_references, REFERENCE, mode))
    want = dense(*inputs, num_references, mode)
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((ours * weight).sum(), inputs)
    for found, expected in zip(gradients, torch.autograd.grad((want * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_what_references_see(generator: torch.Generator) -> None:
    query, key, value = (x.detach() for x in draw(2, generator))
    first, second = slice(TEXT + TARGET, TEXT + TARGET + REFERENCE), slice(TEXT + TARGET + REFERENCE, None)
    changes = {}
    for name, part in {"main": slice(0, TEXT + TARGET), "other": second}.items():
        moved = value.clone()
        moved[:, part] += 1
        for mode in MODES:
            layout = Layout(2, REFERENCE, mode)
            change = attended([query, key, moved], layout) - attended([query, key, value], layout)
            changes[mode, name] = bool(change[:, first].abs().max() > 1e-3)
            assert change[:, : TEXT + TARGET].abs().min() > 1e-3  # text and target always see everything
    assert changes == {
        ("target", "main"): True,
        ("target", "other"): False,
        ("joint", "main"): True,
        ("joint", "other"): True,
        ("isolated", "main"): False,
        ("isolated", "other"): False,
    }


def test_no_references_is_plain_attention(generator: torch.Generator) -> None:
    inputs = draw(0, generator)
    output = branch_attention(*inputs, Layout(), attend)
    assert torch.equal(output.main, attend(*inputs))
    assert output.references is None


@pytest.mark.parametrize("batch", [1, 3])
def test_captured_rows_equal_the_full_map_with_gradients(generator: torch.Generator, batch: int) -> None:
    query, key, _ = draw(3, generator, batch)
    index = torch.stack([torch.randperm(15, generator=generator)[:7] for _ in range(batch)])
    rows = capture_rows(*parts(query, key), 3, CaptureRequest(index))
    want = torch.stack([m[i] for m, i in zip(full_map(query, key), index, strict=True)])
    assert rows.reference_rows is None
    torch.testing.assert_close(rows.attention_rows, want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rows.attention_rows.sum(-1), torch.ones(batch, 7))
    weight = torch.randn(want.shape, generator=generator)
    found = torch.autograd.grad((rows.attention_rows * weight).sum(), (query, key))
    for ours, expected in zip(found, torch.autograd.grad((want * weight).sum(), (query, key)), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("chunk", [2, 5, 256])
def test_reference_rows_equal_the_full_map_for_any_chunk(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(attention_rows, "ROWS_PER_CHUNK", chunk)
    query, key, _ = draw(3, generator)
    rows = capture_rows(*parts(query, key), 3, CaptureRequest(all_tokens=True))
    want = full_map(query, key).unflatten(1, (3, REFERENCE)).mean(dim=2)
    assert rows.attention_rows is None
    torch.testing.assert_close(rows.reference_rows, want, atol=1e-6, rtol=1e-5)
    weight = torch.randn(want.shape, generator=generator)
    found = torch.autograd.grad((rows.reference_rows * weight).sum(), (query, key))
    for ours, expected in zip(found, torch.autograd.grad((want * weight).sum(), (query, key)), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


def test_no_points_give_no_rows(generator: torch.Generator) -> None:
    query, key, _ = draw(2, generator)
    rows = capture_rows(*parts(query, key), 2, CaptureRequest(torch.zeros(2, 0, dtype=torch.long)))
    assert rows.attention_rows.shape == (2, 0, TARGET)


def test_rows_are_computed_in_float32_from_bfloat16(generator: torch.Generator) -> None:
    query, key, _ = (x.detach().bfloat16() for x in draw(2, generator))
    index = torch.arange(10).expand(2, -1)
    rows = capture_rows(*parts(query, key), 2, CaptureRequest(index)).attention_rows
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, full_map(query.float(), key.float()), atol=1e-6, rtol=1e-5)


def test_rows_and_gradients_of_bfloat16_against_float64(generator: torch.Generator) -> None:
    """The products take bfloat16: what that costs beyond the rounding of the gradients themselves, 0.17 %, is less than half of it."""
    query = (3**0.5 * torch.randn(1, 256, 24, 128, generator=generator)).bfloat16()
    key = (3**0.5 * torch.randn(1, 512, 24, 128, generator=generator)).bfloat16()
    index, given = torch.randint(0, 256, (1, 32), generator=generator), torch.randn(1, 32, 512, generator=generator)
    exact_query, exact_key = (x.double().requires_grad_() for x in (query, key))
    scores = torch.einsum("bphd,bnhd->bhpn", exact_query[:, index[0]], exact_key) * 128**-0.5
    exact = torch.softmax(scores, dim=-1).mean(dim=1)
    (exact * given).sum().backward()
    query, key = query.requires_grad_(), key.requires_grad_()
    rows = capture_rows(query, key, 1, CaptureRequest(index)).attention_rows
    assert rows is not None
    (rows * given).sum().backward()
    for found, expected, most in ((rows, exact, 2e-6), (query.grad, exact_query.grad, 3e-3), (key.grad, exact_key.grad, 3e-3)):
        assert (found.double() - expected).norm() < most * expected.norm()


@pytest.mark.parametrize("saved", [0, 2**30])  # with the rows computed anew, and with saved ones
def test_a_gpu_makes_no_float32_copies_of_bfloat16_inputs(monkeypatch: pytest.MonkeyPatch, saved: int) -> None:
    """On the meta device, which stands for one: products of bfloat16 to float32, and nothing else becomes float32."""
    monkeypatch.setattr(attention_rows, "SAVED_BYTES", saved)
    calls: list[str] = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.bmm.dtype, torch.ops.aten.baddbmm.default):
                calls.append(str(args[0].dtype))
            assert func is not torch.ops.aten._to_copy.default or result.dtype == torch.bfloat16
            return result

    with torch.device("meta"):
        query, key = (torch.empty(2, length, 3, 16, dtype=torch.bfloat16, requires_grad=True) for length in (12, 20))
        index = torch.zeros(2, 5, dtype=torch.long)
    with Operations():
        rows = capture_rows(query, key, 2, CaptureRequest(index)).attention_rows
        rows.sum().backward()
        with torch.no_grad():
            capture_rows(query, key, 2, CaptureRequest(all_tokens=True))
    assert rows.dtype == torch.float32
    assert calls == ["torch.bfloat16"] * (4 if saved else 5)


def test_blocks_are_counted_double_stream_first() -> None:
    assert resolve_capture_blocks("all", 19, 38) == frozenset(range(57))
    assert resolve_capture_blocks("double", 19, 38) == frozenset(range(19))
    assert resolve_capture_blocks([0, 19, 56], 19, 38) == {0, 19, 56}
    with pytest.raises(ValueError, match=r"blocks of 0\.\.56 \(19 double-stream, then 38 single-stream\), got \[57\]"):
        resolve_capture_blocks([57], 19, 38)
    with pytest.raises(ValueError, match='must be "all", "double" or a list of block numbers, got \'single\''):
        resolve_capture_blocks("single", 19, 38)
