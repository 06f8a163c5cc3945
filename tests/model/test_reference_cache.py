"""The kept keys and values of the references: exact where references are isolated, stale as asked for elsewhere, and gone afterwards."""

import itertools
import json
import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from safetensors.torch import save_file
from torch import Tensor

from mosaic.lora.adapter import save_reference_lora
from mosaic.method.grids import Grid
from mosaic.method.tokens import position_ids, reference_position_ids
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.costs import FLUX_DEV
from mosaic.model.reference_cache import CachedTransformer, reference_cache_bytes, refresh_interval
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from tests import golden, naive, tiny
from tests.tiny import CALL, noise, run
from tests.weights.test_quantization import round_base

STRENGTH = torch.tensor([[0.5, 2.0], [0.0, 1.0]])


@pytest.fixture(scope="module")
def shared() -> MosaicFluxPipeline:
    """One pipeline for the tests that do not change it."""
    return tiny.build_pipeline()


@pytest.fixture
def adapted(transformer: MosaicFluxTransformer2DModel) -> MosaicFluxTransformer2DModel:
    """With a reference LoRA."""
    tiny.attach_random_lora(transformer)
    return transformer


def later(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of another sampling step, without the references."""
    changed = {"hidden_states": inputs["hidden_states"].flip(1), "timestep": inputs["timestep"] * 0.5}
    return tiny.without_references(inputs) | changed


def references_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key.startswith("reference")}


def both_steps(transformer: MosaicFluxTransformer2DModel, inputs: dict[str, Any], interval: float, **references: object) -> list[Tensor]:
    """Velocity and rows of a later step, after one that may have kept the references."""
    called = CachedTransformer(transformer, references_of(inputs) | references, interval)
    with torch.no_grad():
        called(0, **tiny.without_references(inputs))
        output = called(1, **later(inputs))
    return [output.sample, *([] if output.attention_rows is None else [output.attention_rows])]


def assert_cache_is_exact(transformer: MosaicFluxTransformer2DModel, inputs: dict[str, Any], **references: object) -> None:
    references |= {"reference_attention": "isolated"}
    found, want = (both_steps(transformer, inputs, interval, **references) for interval in (math.inf, 1))
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def every_row(batch: tiny.Batch) -> CaptureRequest:
    count = batch.inputs["reference_hidden_states"].shape[1] * batch.num_reference_tokens
    return CaptureRequest(torch.arange(count).expand(2, -1))


# ---- one step


@pytest.mark.parametrize("num_references", [1, 2, 4, 6])
def test_isolated_is_exact(adapted: MosaicFluxTransformer2DModel, num_references: int) -> None:
    batch = tiny.build_batch(num_references)
    assert_cache_is_exact(adapted, batch.inputs)
    assert_cache_is_exact(adapted, batch.inputs, capture=every_row(batch))


def test_isolated_is_exact_with_strengths_and_means_of_some_blocks(adapted: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    assert_cache_is_exact(adapted, batch.inputs, reference_strength=STRENGTH, capture=CaptureRequest(blocks=[1, 2], all_tokens=True))


class StaleTwin(naive.NaiveFlux):
    """Keeps the references' queries, keys and values of its first pass, block by block, and puts them in the place of later ones."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.kept: list[tuple[Tensor, ...]] = []

    def attention(self, query: Tensor, key: Tensor, value: Tensor, maps: list[Tensor]) -> Tensor:
        main = int((self.token_reference < 0).sum())
        states, block = (query, key, value), len(maps)
        if block == len(self.kept):
            self.kept.append(tuple(x[:, main:] for x in states))
        stale = [torch.cat([now[:, :main], then], dim=1) for now, then in zip(states, self.kept[block], strict=True)]
        return super().attention(*stale, maps)


@pytest.mark.parametrize("mode", ["target", "joint"])
def test_stale_references_equal_the_naive_twin(mode: str, adapted: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    lora = dict(tiny.attach_random_lora(tiny.build_transformer()))
    twin = StaleTwin(tiny.build_transformer(stock=True), naive.lora_matrices(lora))
    references = references_of(batch.inputs) | {"reference_attention": mode}
    with torch.no_grad():
        twin(**tiny.without_references(batch.inputs), **references)
        want = twin(**later(batch.inputs), **references)
    velocity, rows = both_steps(adapted, batch.inputs, 2, reference_attention=mode, capture=every_row(batch))
    torch.testing.assert_close(velocity, want.velocity, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(rows.double(), naive.mean_maps(want.maps), atol=1e-6, rtol=1e-5)
    exact = both_steps(adapted, batch.inputs, 1, reference_attention=mode)[0]
    assert not torch.allclose(velocity, exact, atol=1e-3)


def test_the_cache_is_what_is_said_of_it(adapted: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    with torch.no_grad():
        assert adapted(**batch.inputs).kept_references is None
        assert adapted(**tiny.without_references(batch.inputs), keep_references=True).kept_references is None
        plain = adapted(**batch.inputs, keep_references=True)
        with_rows = adapted(**batch.inputs, keep_references=True, capture=every_row(batch)).kept_references
        assert torch.equal(plain.sample, adapted(**batch.inputs).sample)
    sizes = (adapted.config, 2, batch.num_reference_tokens, 2, 4)
    for cache, attention in ((plain.kept_references, False), (with_rows, True)):
        assert cache.num_bytes == reference_cache_bytes(*sizes, with_attention=attention)
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for block in cache.blocks
            for tensor in block
            if tensor is not None
        }
        assert sum(held.values()) == cache.num_bytes  # no tensor holds on to a larger one
        assert (cache.num_references, cache.num_reference_tokens, len(cache.blocks)) == (2, 9, 4)
    assert reference_cache_bytes(FLUX_DEV, 1, 1024) / 2**30 == pytest.approx(0.67, abs=0.005)
    with pytest.raises(ValueError, match="kept_references hold no queries of block 0: they were kept without this capture"):
        adapted(**later(batch.inputs), kept_references=plain.kept_references, capture=every_row(batch))
    with pytest.raises(ValueError, match="give reference_hidden_states or kept_references, not both"):
        adapted(**batch.inputs, kept_references=plain.kept_references)


def test_isolated_is_exact_on_a_quantised_base(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    round_base(transformer)
    tiny.attach_random_lora(transformer)
    assert_cache_is_exact(transformer, batch.inputs, capture=every_row(batch))


def test_bfloat16_stays_near(batch: tiny.Batch) -> None:
    transformer, inputs = tiny.build_transformer().bfloat16(), batch.inputs
    tiny.attach_random_lora(transformer)
    inputs = {key: value if key.endswith("ids") else value.bfloat16() for key, value in inputs.items()}
    found, want = (both_steps(transformer, inputs, interval, reference_attention="isolated")[0].float() for interval in (math.inf, 1))
    assert (found - want).square().mean().sqrt() < 0.02 * want.square().mean().sqrt()


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_kept_references_compile_without_graph_breaks(batch: tiny.Batch) -> None:
    transformer = tiny.build_transformer(num_layers=0, num_single_layers=1)
    tiny.attach_random_lora(transformer)
    arguments = {"reference_attention": "isolated", "reference_strength": STRENGTH, "capture": every_row(batch)}
    want = both_steps(transformer, batch.inputs, math.inf, **arguments)
    torch._dynamo.reset()
    transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    found = both_steps(transformer, batch.inputs, math.inf, **arguments)
    torch._dynamo.reset()
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("offload", ["accelerate", "leaf_level", "block_level"])
def test_offload_hooks_change_nothing(adapted: MosaicFluxTransformer2DModel, batch: tiny.Batch, offload: str) -> None:
    arguments = {"reference_attention": "isolated", "reference_strength": STRENGTH, "capture": every_row(batch)}
    want = both_steps(adapted, batch.inputs, math.inf, **arguments)
    if offload == "accelerate":
        cpu_offload(adapted, execution_device=torch.device("cpu"))
    else:
        levels = {"num_blocks_per_group": 1} if offload == "block_level" else {}
        apply_group_offloading(adapted, torch.device("cpu"), torch.device("cpu"), offload_type=offload, **levels)
    for ours, theirs in zip(both_steps(adapted, batch.inputs, math.inf, **arguments), want, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- the pipeline


@pytest.mark.parametrize("image_guidance", [1.0, 2.5])
def test_sampling_isolated_is_exact(shared: MosaicFluxPipeline, image_guidance: float) -> None:
    common = CALL | {
        "prompt": ["a cat", "two mugs", "a fish", "the beach"],
        "reference_images": [[tiny.picture(1), tiny.picture(2)], [], [tiny.picture(3)], [tiny.picture(4), tiny.picture(5)]],
        "reference_strength": [[1, 0.5], [], [1], [2, 0]],
        "latents": noise(8),
        "num_images_per_prompt": 2,
        "num_inference_steps": 4,
        "reference_attention": "isolated",
        "image_guidance_scale": image_guidance,
        "output_attention": True,
    }
    found, want = shared(**common, reference_cache=True), shared(**common)
    torch.testing.assert_close(found.images, want.images, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found.attention, want.attention, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            for name in ("maps", "entropy"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-5, rtol=1e-5)


STEPS = {
    "cache": ({"reference_attention": "isolated", "reference_cache": True}, [0]),
    "every 2": ({"refresh_references": 2}, [0, 2, 4]),
    "every 3, joint": ({"reference_attention": "joint", "refresh_references": 3}, [0, 3]),
    "every 1": ({"refresh_references": 1}, [0, 1, 2, 3, 4]),
    "off": ({}, [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("image_guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", STEPS)
def test_references_run_in_these_steps_only_and_are_freed(name: str, image_guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny.build_pipeline()
    arguments, expected = STEPS[name]
    lengths, kept = [], []
    pipeline.transformer.transformer_blocks[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    forward = MosaicFluxTransformer2DModel.forward

    def watched(self: MosaicFluxTransformer2DModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("reference_hidden_states") is not None and image_guidance == 1:
            assert all(reference() is None for reference in kept)  # the memory of the last cache is there for the next one
        output = forward(self, *args, **kwargs)
        if output.kept_references is not None:
            kept.extend(weakref.ref(block.key) for block in output.kept_references.blocks)
        return output

    monkeypatch.setattr(MosaicFluxTransformer2DModel, "forward", watched)
    common = {"prompt": "a cat", "reference_images": [tiny.picture(1), tiny.picture(2)], "latents": noise(1), "num_inference_steps": 5}
    run(pipeline, **common, image_guidance_scale=image_guidance, **arguments)
    passes = 1 if image_guidance == 1 else 2
    targets = tiny.GRID.num_tokens
    assert lengths == [targets + 18 * (step in expected) for step in range(5) for _ in range(passes)]
    assert (len(kept) > 0) == (len(expected) < 5)
    assert all(reference() is None for reference in kept)


def test_refreshing(shared: MosaicFluxPipeline) -> None:
    common = {"prompt": "a cat", "reference_images": [tiny.picture(1), tiny.picture(2)], "latents": noise(1), "num_inference_steps": 6}
    exact = run(shared, **common)
    assert torch.equal(run(shared, **common, refresh_references=1), exact)
    errors = [float((run(shared, **common, refresh_references=n) - exact).abs().mean()) for n in (2, 6)]
    assert 0 < errors[0] < errors[1] < float(exact.abs().mean())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference_cache": True}, 'reference_cache needs reference_attention "isolated", got "target"'),
        ({"reference_cache": True, "reference_attention": "joint"}, "an approximation: refresh_references=N."),
        (
            {"refresh_references": 2, "reference_attention": "isolated"},
            "isolated references are the same at every step. Use reference_cache.",
        ),
        ({"refresh_references": 0}, "refresh_references must be a positive integer or None, got 0."),
        ({"refresh_references": 1.5}, "refresh_references must be a positive integer or None, got 1.5."),
        ({"refresh_references": True}, "refresh_references must be a positive integer or None, got True."),
    ],
)
def test_bad_arguments(shared: MosaicFluxPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(shared, prompt="a cat", **arguments)


def test_intervals() -> None:
    assert refresh_interval(False, None, "target") == refresh_interval(False, 1, "joint") == 1
    assert refresh_interval(True, None, "isolated") == math.inf
    assert refresh_interval(False, 7, "target") == 7


# ---- the golden format


def write_golden_case(folder: Path) -> None:
    """A sampling case with cached references, whose recorded output is the naive twin's, without a cache."""
    config, rank, steps = tiny.transformer_config(), 3, 4
    stock = tiny.build_transformer(stock=True)
    ours = tiny.build_transformer()
    lora = tiny.attach_random_lora(ours, rank)
    folder.mkdir()
    save_reference_lora(ours, folder / "lora.safetensors")
    save_file(stock.state_dict(), folder / "transformer.safetensors")
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    grid, reference_grid, start = Grid(4, 6), Grid(3, 3), draw(2, 24, tiny.CHANNELS)
    io = {f"ref.{k}": draw(2, 9, tiny.CHANNELS) for k in range(2)} | {"latents": start}
    io |= {"prompt_embeds": draw(2, 5, tiny.TEXT_WIDTH), "pooled": draw(2, tiny.TEXT_WIDTH)}
    twin, latents = naive.NaiveFlux(stock, naive.lora_matrices(lora)), start
    mu = 0.5 + (1.15 - 0.5) * (24 - 256) / (4096 - 256)
    sigmas = [1 / (1 + math.exp(-mu) * (steps / k - 1)) for k in range(steps, 0, -1)] + [0.0]
    with torch.no_grad():
        for now, then in itertools.pairwise(sigmas):
            velocity = twin(
                hidden_states=latents,
                encoder_hidden_states=io["prompt_embeds"],
                pooled_projections=io["pooled"],
                timestep=torch.full((2,), now),
                guidance=torch.full((2,), 2.5),
                img_ids=position_ids(grid),
                txt_ids=torch.zeros(5, 3),
                reference_hidden_states=torch.stack([io["ref.0"], io["ref.1"]], dim=1),
                reference_ids=reference_position_ids(reference_grid, 2),
                reference_attention="isolated",
            ).velocity
            latents = latents + (then - now) * velocity
    save_file(io | {"final": latents}, folder / "io.safetensors")
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    meta = {"config": config, "K": 2, "target_grid": list(grid), "ref_grid": list(reference_grid), "batch": 2, "rank": rank}
    meta |= {"steps": steps, "guidance_scale": 2.5, "scheduler": scheduler, "reference_kv_cache": True}
    (folder / "meta.json").write_text(json.dumps(meta))


def test_a_golden_case_with_cached_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_golden_case(tmp_path / "case")
    with_references = []
    forward = MosaicFluxTransformer2DModel.forward

    def watched(self: MosaicFluxTransformer2DModel, *args: Any, **kwargs: Any) -> Any:
        with_references.append(kwargs.get("reference_hidden_states") is not None)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MosaicFluxTransformer2DModel, "forward", watched)
    assert golden.main([str(tmp_path / "case")]) == 0, capsys.readouterr().out
    assert with_references == [True, False, False, False]
    meta = json.loads((tmp_path / "case/meta.json").read_text())
    (tmp_path / "case/meta.json").write_text(json.dumps(meta | {"reference_kv_cache": False}))
    assert golden.main([str(tmp_path / "case")]) == 1  # the references see more than themselves
