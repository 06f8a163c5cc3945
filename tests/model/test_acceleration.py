"""Attention kernels, compiled blocks and step caches: what they may change, what they leave out, and what is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, MagCacheConfig
from torch import Tensor

from mosaic.config.sections import InferenceConfig
from mosaic.model import acceleration
from mosaic.model.acceleration import accelerate, flux_mag_ratios, set_attention_backend, set_step_cache
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from tests import tiny

CPU = torch.device("cpu")
STEPS = 6


@pytest.fixture
def pipeline() -> MosaicFluxPipeline:
    """With two blocks of each kind."""
    return with_blocks(2)


def with_blocks(count: int) -> MosaicFluxPipeline:
    """With so many blocks of each kind."""
    pipeline = tiny.build_pipeline()
    transformer = tiny.build_transformer(pipeline.transformer.config.guidance_embeds, num_layers=count, num_single_layers=count)
    tiny.attach_random_lora(transformer)
    pipeline.register_modules(transformer=transformer.requires_grad_(False))
    return pipeline


def sample(pipeline: MosaicFluxPipeline, num_references: int = 2, **options: Any) -> Tensor:
    """Latents of two pictures with as many references."""
    references = [[tiny.picture(3 * p + k) for k in range(num_references)] for p in range(2)]
    call = {**tiny.CALL, "num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(3)} | options
    return pipeline(["a cat", "a mug"], references, **call).images


@contextmanager
def block_calls(transformer: MosaicFluxTransformer2DModel) -> Iterator[list[int]]:
    """Numbers of the blocks that really run, in order."""
    calls: list[int] = []
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    handles = [block.attn.norm_q.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, block in enumerate(blocks)]
    yield calls
    for handle in handles:
        handle.remove()


# ---- step caches


def test_a_first_block_cache_that_never_skips_is_exact(pipeline: MosaicFluxPipeline) -> None:
    plain = sample(pipeline)
    set_step_cache(pipeline.transformer, "first_block", 1e-12, STEPS)
    with block_calls(pipeline.transformer) as calls:
        assert torch.equal(sample(pipeline), plain)
    assert len(calls) == 4 * STEPS
    set_step_cache(pipeline.transformer, "none", None, STEPS)
    assert torch.equal(sample(pipeline), plain)


def test_skipped_steps_run_the_first_block_only(pipeline: MosaicFluxPipeline) -> None:
    """With a threshold that no change reaches, every step after the first is left out."""
    set_step_cache(pipeline.transformer, "first_block", 1e9, STEPS)
    with block_calls(pipeline.transformer) as calls:
        first = sample(pipeline)
        assert calls == [0, 1, 2, 3] + [0] * (STEPS - 1)
        calls.clear()
        assert torch.equal(sample(pipeline), first)  # nothing is left over from the run before
        assert calls == [0, 1, 2, 3] + [0] * (STEPS - 1)
        calls.clear()
        sample(pipeline, image_guidance_scale=2.0)  # each of the two passes has its own memory
        assert calls == [0, 1, 2, 3] * 2 + [0, 0] * (STEPS - 1)


def test_a_run_that_ended_halfway_leaves_nothing_behind(pipeline: MosaicFluxPipeline) -> None:
    """diffusers forgets at the end of a call, which such a run does not reach."""
    set_step_cache(pipeline.transformer, "first_block", 1e9, STEPS)
    first = sample(pipeline)
    with pytest.raises(ZeroDivisionError):
        sample(pipeline, callback_on_step_end=lambda *_: 1 / 0)
    assert torch.equal(sample(pipeline), first)


def test_repeats_the_targets_change_of_the_remaining_blocks(pipeline: MosaicFluxPipeline) -> None:
    """By hand: head block, plus what the other blocks added to text and target one step before."""
    transformer = pipeline.transformer
    batch = tiny.build_batch(2)
    later = batch.inputs | {"hidden_states": batch.inputs["hidden_states"] * 0.9, "timestep": batch.inputs["timestep"] * 0.5}
    seen: list[Tensor] = []
    handles = [
        transformer.transformer_blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0][:, :24])),
        transformer.norm_out.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    with torch.no_grad():
        transformer(**batch.inputs)
        transformer(**later)
        head, tail, later_head, _ = seen
        seen.clear()
        set_step_cache(transformer, "first_block", 1e9, 2)
        for inputs in (batch.inputs, later):
            with transformer.cache_context("pass"):
                transformer(**inputs)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen[-1], later_head + (tail - head), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["target", "joint", "isolated"])
def test_references_have_no_say_in_what_is_skipped(pipeline: MosaicFluxPipeline, mode: str) -> None:
    """The change that is compared is that of the target's tokens."""
    transformer = pipeline.transformer
    set_step_cache(transformer, "first_block", 1e9, STEPS)
    batch, shapes = tiny.build_batch(2), []
    hook = transformer.transformer_blocks[0]._diffusers_hook.get_hook("fbc_leader_block_hook")
    decide = hook._should_compute_remaining_blocks
    hook._should_compute_remaining_blocks = lambda residual: shapes.append(tuple(residual.shape)) or decide(residual)
    with torch.no_grad(), transformer.cache_context("pass"):
        transformer(**batch.inputs, reference_attention=mode)
    assert shapes == [(2, tiny.TARGET_GRID.num_tokens, 32)]
    state = hook.state_manager._state_cache["pass"]
    assert [tuple(x.shape) for x in state.tail_block_residuals] == [(2, 24, 32), (2, batch.inputs["txt_ids"].shape[0], 32)]


def test_with_kept_references(pipeline: MosaicFluxPipeline) -> None:
    isolated = {"reference_attention": "isolated"}
    plain = sample(pipeline, **isolated)
    for threshold in (1e-12, 1e9):
        set_step_cache(pipeline.transformer, "first_block", threshold, STEPS)
        skipping = sample(pipeline, **isolated)
        torch.testing.assert_close(sample(pipeline, **isolated, reference_cache=True), skipping, atol=1e-5, rtol=1e-5)
        assert torch.equal(skipping, plain) == (threshold < 1)
        sample(pipeline, refresh_references=2)


def test_a_skipped_step_refreshes_nothing(pipeline: MosaicFluxPipeline) -> None:
    """Where the references' turn is left out, they come into the next step that runs; nothing is lost on the way."""
    transformer = pipeline.transformer
    lengths: list[tuple[int, bool]] = []
    forward = transformer.forward

    def spy(**inputs: Any) -> Any:
        output = forward(**inputs)
        lengths.append((int(inputs.get("kept_references") is None), output.kept_references is not None))
        return output

    transformer.forward = spy
    set_step_cache(transformer, "first_block", 1e9, STEPS)
    sample(pipeline, refresh_references=3)
    assert lengths == [(1, True), (0, False), (0, False), (1, False), (1, False), (1, False)]


def test_magnitudes_decide_and_skip_every_block(pipeline: MosaicFluxPipeline) -> None:
    plain = sample(pipeline)
    pipeline.transformer.enable_cache(
        MagCacheConfig(threshold=0.06, num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS), max_skip_steps=2)
    )
    with block_calls(pipeline.transformer) as calls:
        skipping = sample(pipeline)
        assert calls == [0, 1, 2, 3] * 2  # steps 0 and 3: at most two in a row, and the first is always run
    assert not torch.equal(skipping, plain)
    assert torch.equal(sample(pipeline), skipping)


def test_the_table_of_magnitudes_is_flux_devs(pipeline: MosaicFluxPipeline) -> None:
    with pytest.raises(ValueError, match=r"a model of 19 \+ 38 blocks; here are 2 \+ 2. Use \"first_block\""):
        set_step_cache(pipeline.transformer, "mag", None, STEPS)
    assert not pipeline.transformer.is_cache_enabled
    large = MosaicFluxTransformer2DModel(**tiny.transformer_config(num_layers=19, num_single_layers=38))
    assert len(flux_mag_ratios(large)) == 28
    set_step_cache(large, "mag", 0.1, 20)
    assert (large._cache_config.threshold, len(large._cache_config.mag_ratios)) == (0.1, 20)
    config = large._cache_config
    set_step_cache(large, "mag", 0.1, 20)
    assert large._cache_config is config  # the same hooks: compiled blocks stay as they are
    set_step_cache(large, "mag", 0.1, 28)
    assert large._cache_config is not config


def test_what_a_step_cache_cannot_do_is_refused(pipeline: MosaicFluxPipeline) -> None:
    transformer, batch = pipeline.transformer, tiny.build_batch(2)
    with pytest.raises(ValueError, match="FirstBlockCacheConfig or MagCacheConfig with a reference branch, got FasterCacheConfig"):
        transformer.enable_cache(FasterCacheConfig())
    with pytest.raises(ValueError, match="step_cache must be one of none, first_block, mag, got 'second_block'"):
        set_step_cache(transformer, "second_block", None, STEPS)
    transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"some of which a step cache leaves out: disable_cache\(\) first"):
        transformer(**batch.inputs, capture=CaptureRequest(batch.points.global_index))


# ---- attention kernels


def test_a_kernel_changes_pictures_by_rounding_only(pipeline: MosaicFluxPipeline) -> None:
    plain = sample(pipeline)
    set_attention_backend(pipeline.transformer, "_native_math", CPU)
    torch.testing.assert_close(sample(pipeline), plain, atol=1e-4, rtol=1e-4)
    pipeline.transformer.reset_attention_backend()
    assert torch.equal(sample(pipeline), plain)


def test_a_kernel_for_training_is_tried_backwards_too(pipeline: MosaicFluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor) -> Tensor:
            return query.clone()

    monkeypatch.setattr(acceleration, "dispatch_attention_fn", lambda query, *_, **__: OneWay.apply(query))
    set_attention_backend(pipeline.transformer, "_native_math", CPU)
    with pytest.raises(
        ValueError, match=r"model.attention_backend=_native_math does not run here \(cpu, torch.bfloat16\)\. NotImplementedError"
    ):
        set_attention_backend(pipeline.transformer, "_native_math", CPU, "model.attention_backend", torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flsh", "inference.attention_backend must be one of flash, .*_native_math.*, got 'flsh'"),
        ("xformers", r"inference.attention_backend=xformers does not run here \(cpu, torch.float32\).*native, .*_native_math; null"),
        ("_native_cudnn", "inference.attention_backend=_native_cudnn does not run here"),
    ],
)
def test_kernels_that_do_not_run_here_are_refused_at_once(pipeline: MosaicFluxPipeline, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accelerate(pipeline.transformer, InferenceConfig(attention_backend=name), CPU)
    sample(pipeline)  # the usual kernel is back


def test_a_kernel_for_some_head_sizes_only_is_refused(pipeline: MosaicFluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels are that know heads of 64, 96 and 128 only: reference strengths run with wider ones."""
    head_dim, tried = pipeline.transformer.config.attention_head_dim, []
    dispatch = acceleration.dispatch_attention_fn

    def limited(query: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        tried.append((query.shape[-1], options.get("scale")))
        if query.shape[-1] != head_dim:
            raise RuntimeError("head_dim must be 64, 96 or 128")
        return dispatch(query, *rest, **options)

    monkeypatch.setattr(acceleration, "dispatch_attention_fn", limited)
    heads = f"heads of {head_dim}, but reference strengths need another kernel: theirs are of {head_dim + 8}"
    with pytest.raises(ValueError, match=f"attention_backend=_native_math does not run here .*RuntimeError: head_dim must be .*{heads}"):
        set_attention_backend(pipeline.transformer, "_native_math", CPU)
    assert tried[:2] == [(head_dim, None), (head_dim + 8, head_dim**-0.5)]


# ---- compiled blocks


def test_compiled_blocks_change_pictures_by_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a step cache, whose hooks are around the blocks."""
    pipeline = with_blocks(1)
    compile_repeated_blocks = pipeline.transformer.compile_repeated_blocks
    monkeypatch.setattr(pipeline.transformer, "compile_repeated_blocks", lambda: compile_repeated_blocks(backend="eager"))
    set_step_cache(pipeline.transformer, "first_block", 1e9, 2)
    plain = sample(pipeline, num_inference_steps=2)
    accelerate(pipeline.transformer, InferenceConfig(compile=True), CPU)
    torch.testing.assert_close(sample(pipeline, num_inference_steps=2), plain, atol=1e-5, rtol=1e-5)
    assert all(block._compiled_call_impl is not None for block in pipeline.transformer.transformer_blocks)
    torch._dynamo.reset()
