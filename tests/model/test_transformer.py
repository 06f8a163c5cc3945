"""The transformer against the naive twin, against stock diffusers, and under checkpointing, compilation, bf16 and offloading."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FluxTransformer2DModel
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from mosaic.lora.adapter import attach_reference_lora
from mosaic.method.losses import correspondence_loss, disentanglement_loss, flow_matching_loss, mosaic_loss, reference_distributions
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from tests import naive, tiny

MODES = ["target", "joint", "isolated"]


def our_step(
    transformer: MosaicFluxTransformer2DModel, parameters: dict[str, nn.Parameter], batch: tiny.Batch, mode: str = "target"
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Velocity, rows, per-sample paper objective and the gradient of its mean."""
    capture = CaptureRequest(batch.points.global_index)
    output = transformer(**batch.inputs, reference_attention=mode, capture=capture)
    distributions = reference_distributions(output.attention_rows, batch.points)
    terms = {
        "flow_matching": flow_matching_loss(output.sample, batch.noise, batch.latents),
        "correspondence": correspondence_loss(output.attention_rows, batch.points),
        "disentanglement": disentanglement_loss(distributions, batch.points.reference_mask),
    }
    total = mosaic_loss(terms, {"correspondence": 0.4, "disentanglement": 0.6}).total
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    found = {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(parameters.items(), gradients, strict=True)}
    return output.sample, output.attention_rows, total, found


def naive_step(
    stock: FluxTransformer2DModel, parameters: dict[str, nn.Parameter], batch: tiny.Batch, mode: str
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """The same by the twin, with copies of the parameters; rows are the whole mean map [B, K * N_ref, N_tgt]."""
    tensors = {key: parameter.detach().clone().requires_grad_() for key, parameter in parameters.items()}
    output = naive.NaiveFlux(stock, naive.lora_matrices(tensors))(**batch.inputs, reference_attention=mode)
    maps = naive.mean_maps(output.maps)
    arguments = (maps, batch.samples, batch.num_reference_tokens)
    flow = naive.flow_matching(output.velocity, batch.noise, batch.latents)
    scal, mdl = naive.correspondence(*arguments), naive.disentanglement(*arguments)
    total = sum(f + 0.4 * s + 0.6 * m for f, s, m in zip(flow, scal, mdl, strict=True)) / len(flow)
    gradients = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
    found = {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(tensors.items(), gradients, strict=True)}
    return output.velocity, maps, total, found


def test_the_unused_gradients_are_those_after_the_last_reference_key(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    # In the last block nothing reads a reference token's output any more, so only what feeds its keys, values and rows learns.
    parameters = tiny.attach_random_lora(transformer)
    gradients = our_step(transformer, parameters, batch)[3]
    still = {key.split(".lora_")[0] for key, gradient in gradients.items() if not gradient.any()}
    assert still == {"transformer.single_transformer_blocks.1.proj_mlp", "transformer.single_transformer_blocks.1.proj_out"}


@pytest.mark.parametrize("num_references", [1, 2, 4, 6])
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_naive_twin(mode: str, num_references: int, guidance_embeds: bool) -> None:
    transformer = tiny.build_transformer(guidance_embeds)
    parameters = tiny.attach_random_lora(transformer)
    stock = tiny.build_transformer(guidance_embeds, stock=True)
    batch = tiny.build_batch(num_references, guidance_embeds=guidance_embeds)
    velocity, rows, total, gradients = our_step(transformer, parameters, batch, mode)
    naive_velocity, maps, naive_total, naive_gradients = naive_step(stock, parameters, batch, mode)
    torch.testing.assert_close(velocity, naive_velocity, atol=2e-5, rtol=2e-5)
    for b, references in enumerate(batch.samples):
        index = [k * batch.num_reference_tokens + u for k, pairs in enumerate(references) for u, _ in pairs.tolist()]
        torch.testing.assert_close(rows[b, : len(index)].double(), maps[b, index], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(total.double(), naive_total, atol=1e-5, rtol=1e-5)
    for key, gradient in naive_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, atol=2e-5, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("blocks", "expected"), [("all", [0, 1, 2, 3]), ("double", [0, 1]), ([3], [3]), ([0, 2], [0, 2])])
def test_rows_come_from_the_wanted_blocks(
    transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch, blocks: object, expected: list
) -> None:
    parameters = tiny.attach_random_lora(transformer)
    capture = CaptureRequest(batch.points.global_index, all_tokens=True, blocks=blocks)
    twin = naive.NaiveFlux(tiny.build_transformer(stock=True), naive.lora_matrices(parameters))
    with torch.no_grad():
        output, maps = transformer(**batch.inputs, capture=capture), naive.mean_maps(twin(**batch.inputs).maps, expected)
    rows = torch.stack([maps[b, index] for b, index in enumerate(batch.points.global_index)])
    torch.testing.assert_close(output.attention_rows.double(), rows, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.reference_rows.double(), maps.unflatten(1, (2, -1)).mean(dim=2), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.attention_rows.sum(-1), torch.ones(output.attention_rows.shape[:2]))


def test_capture_does_not_change_the_velocity_and_is_absent_unless_asked_for(
    transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch
) -> None:
    tiny.attach_random_lora(transformer)
    with torch.no_grad():
        plain, captured = transformer(**batch.inputs), transformer(**batch.inputs, capture=CaptureRequest(batch.points.global_index))
    assert plain.attention_rows is None
    assert plain.reference_rows is None
    assert captured.reference_rows is None
    assert torch.equal(plain.sample, captured.sample)


def test_without_references_equals_stock(guidance_embeds: bool) -> None:
    ours, stock = tiny.build_transformer(guidance_embeds), tiny.build_transformer(guidance_embeds, stock=True)
    inputs = tiny.without_references(tiny.build_batch(guidance_embeds=guidance_embeds).inputs)
    want = stock(**inputs).sample
    assert torch.equal(ours(**inputs).sample, want)
    empty = {"reference_hidden_states": torch.zeros(2, 0, 9, tiny.CHANNELS), "reference_ids": torch.zeros(0, 3)}
    assert torch.equal(ours(**inputs, **empty).sample, want)
    tiny.attach_random_lora(ours)  # acts on reference tokens only, and there are none
    assert torch.equal(ours(**inputs).sample, want)


def test_zero_lora_is_the_base_weights_in_the_reference_branch(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    with torch.no_grad():
        bare = transformer(**batch.inputs).sample
        attach_reference_lora(transformer, 4)
        assert torch.equal(transformer(**batch.inputs).sample, bare)
    twin = naive.NaiveFlux(tiny.build_transformer(stock=True), {})
    torch.testing.assert_close(bare, twin(**batch.inputs).velocity, atol=2e-5, rtol=2e-5)


def test_references_do_not_see_the_timestep_or_the_guidance(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    # Isolated references see nothing but themselves: their keys, so the difference they make, hold still when t and g move.
    tiny.attach_random_lora(transformer)
    block_inputs: list[Tensor] = []
    transformer.single_transformer_blocks[1].register_forward_pre_hook(lambda module, args: block_inputs.append(args[0][:, 24:]))
    with torch.no_grad():
        transformer(**batch.inputs, reference_attention="isolated")
        transformer(
            **batch.inputs | {"timestep": torch.tensor([0.9, 0.1]), "guidance": torch.tensor([2.0, 5.0])}, reference_attention="isolated"
        )
    torch.testing.assert_close(block_inputs[0], block_inputs[1], atol=1e-6, rtol=1e-6)
    assert block_inputs[0].abs().max() > 0.1


def test_order_of_the_batch_does_not_matter(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    tiny.attach_random_lora(transformer)
    flipped = {k: v if k.endswith("ids") else v.flip(0) for k, v in batch.inputs.items()}
    with torch.no_grad():
        first = transformer(**batch.inputs, capture=CaptureRequest(batch.points.global_index))
        second = transformer(**flipped, capture=CaptureRequest(batch.points.global_index.flip(0)))
    torch.testing.assert_close(first.sample, second.sample.flip(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first.attention_rows, second.attention_rows.flip(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_order_of_the_references_does_not_matter_if_their_ids_move_along(transformer: MosaicFluxTransformer2DModel, mode: str) -> None:
    tiny.attach_random_lora(transformer)
    batch = tiny.build_batch(3)
    order = [2, 0, 1]
    moved = batch.inputs | {
        "reference_hidden_states": batch.inputs["reference_hidden_states"][:, order],
        "reference_ids": batch.inputs["reference_ids"].unflatten(0, (3, -1))[order].flatten(0, 1),
    }
    every = torch.arange(27).expand(2, -1)
    with torch.no_grad():
        first = transformer(**batch.inputs, reference_attention=mode, capture=CaptureRequest(every))
        second = transformer(**moved, reference_attention=mode, capture=CaptureRequest(every))
    torch.testing.assert_close(first.sample, second.sample, atol=1e-5, rtol=1e-5)
    maps = first.attention_rows.unflatten(1, (3, -1))[:, order].flatten(1, 2)
    torch.testing.assert_close(maps, second.attention_rows, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_changes_nothing(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch, mode: str) -> None:
    parameters = tiny.attach_random_lora(transformer)
    plain = our_step(transformer, parameters, batch, mode)
    transformer.train()
    transformer.enable_gradient_checkpointing()
    checkpointed = our_step(transformer, parameters, batch, mode)
    for ours, theirs in zip(plain[:3], checkpointed[:3], strict=True):
        assert torch.equal(ours, theirs)
    for key, gradient in plain[3].items():
        torch.testing.assert_close(checkpointed[3][key], gradient, atol=1e-7, rtol=1e-5)


def test_bfloat16_stays_near_and_rows_stay_float32() -> None:
    # Times that bfloat16 holds exactly: the sinusoid of a rounded 1000 t is another one, in stock FLUX too.
    transformer, batch = tiny.build_transformer(guidance_embeds=False), tiny.build_batch(guidance_embeds=False)
    batch.inputs["timestep"] = torch.tensor([0.5, 0.25])
    del batch.inputs["guidance"]
    tiny.attach_random_lora(transformer)
    request = CaptureRequest(batch.points.global_index, all_tokens=True)
    with torch.no_grad():
        exact = transformer(**batch.inputs, capture=request)
        transformer.to(torch.bfloat16)
        inputs = {k: v if k.endswith("ids") else v.bfloat16() for k, v in batch.inputs.items()}
        output = transformer(**inputs, capture=request)
    assert output.sample.dtype == torch.bfloat16
    assert output.attention_rows.dtype == output.reference_rows.dtype == torch.float32
    torch.testing.assert_close(output.attention_rows.sum(-1), torch.ones_like(output.attention_rows[..., 0]), atol=1e-5, rtol=0)
    error = (output.sample.float() - exact.sample).square().mean().sqrt()
    assert error < 0.05 * exact.sample.square().mean().sqrt()
    torch.testing.assert_close(output.attention_rows, exact.attention_rows, atol=0.03, rtol=0.2)


# Autocast keeps the norms' float32 weights: PyTorch then takes its plain RMSNorm and says so.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_rows_are_float32_under_autocast(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    parameters = tiny.attach_random_lora(transformer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, rows, total, gradients = our_step(transformer, parameters, batch)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]), atol=1e-5, rtol=0)
    assert torch.isfinite(total)
    assert all(torch.isfinite(g).all() and g.dtype == torch.float32 for g in gradients.values())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_norms_stand_outside_of_autocast(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    """Of a norm's inputs in bfloat16 autocast would keep float32 copies for the backward pass."""
    states: dict[str, bool] = {}
    for name, module in transformer.named_modules():
        if name.endswith((".norm1.norm", ".norm2", ".norm.norm", ".norm_q", ".norm_k", ".norm_added_q", ".norm_added_k", ".to_q")):
            module.register_forward_pre_hook(lambda *_, name=name: states.update({name: torch.is_autocast_enabled("cpu")}))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        transformer(**batch.inputs)
    assert len(states) == 2 * (6 + 1) + 2 * (3 + 1)
    assert {name for name, enabled in states.items() if enabled} == {name for name in states if name.endswith(".to_q")}


def test_float16_is_clipped_where_stock_flux_clips_it() -> None:
    """6e4 + 1 * 6e4 is infinite in float16. Gates are 1, since each block's modulation is 1 in every element."""
    transformer = tiny.build_transformer(num_layers=1, num_single_layers=1)
    double, single = transformer.transformer_blocks[0], transformer.single_transformer_blocks[0]
    for norm in (double.norm1, double.norm1_context, single.norm):
        nn.init.zeros_(norm.linear.weight)
        nn.init.ones_(norm.linear.bias)
    for layer in (double.ff_context.net[2], single.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, 6e4)
    transformer.half()
    rotary = torch.ones(9, 16), torch.zeros(9, 16)
    image, text, temb = torch.zeros(1, 4, 32).half(), torch.full((1, 5, 32), 6e4).half(), torch.zeros(1, 1, 32).half()
    with torch.no_grad():
        assert double(image, text, temb, rotary).encoder_hidden_states.unique().tolist() == [65504.0]
        output = single(image + 6e4, text, temb, rotary)
    assert {float(tensor.max()) for tensor in output[:2]} == {65504.0}
    assert bool(output.hidden_states.isfinite().all())


def test_position_ids_stay_float32_in_a_bfloat16_model(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    seen: list[torch.dtype] = []
    transformer.pos_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    transformer.to(torch.bfloat16)
    with torch.no_grad():
        transformer(**{k: v if k.endswith("ids") else v.bfloat16() for k, v in batch.inputs.items()})
    assert seen == [torch.float32]


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_sampling_compiles_without_graph_breaks(batch: tiny.Batch) -> None:
    """In the mode "joint"; "isolated" is compiled where references are kept (test_reference_cache.py), "target" in training."""
    transformer = tiny.build_transformer(num_layers=1, num_single_layers=1)
    tiny.attach_random_lora(transformer)
    request = CaptureRequest(batch.points.global_index, all_tokens=True)
    with torch.no_grad():
        want = transformer(**batch.inputs, reference_attention="joint", capture=request)
        torch._dynamo.reset()
        transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        found = transformer(**batch.inputs, reference_attention="joint", capture=request)
        torch._dynamo.reset()
    torch.testing.assert_close(found.sample, want.sample, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.attention_rows, want.attention_rows, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("offload", ["accelerate", "leaf_level", "block_level"])
def test_offload_hooks_change_nothing(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch, offload: str) -> None:
    tiny.attach_random_lora(transformer)
    request = CaptureRequest(batch.points.global_index)
    with torch.no_grad():
        want = transformer(**batch.inputs, capture=request)
        if offload == "accelerate":
            cpu_offload(transformer, execution_device=torch.device("cpu"))
            assert next(transformer.parameters()).device.type == "meta"  # the weights really are away
        else:
            levels = {"num_blocks_per_group": 1} if offload == "block_level" else {}
            apply_group_offloading(transformer, torch.device("cpu"), torch.device("cpu"), offload_type=offload, **levels)
        output = transformer(**batch.inputs, capture=request)
    torch.testing.assert_close(output.sample, want.sample)
    torch.testing.assert_close(output.attention_rows, want.attention_rows)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_cuda_equals_cpu(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch, mode: str) -> None:
    parameters = tiny.attach_random_lora(transformer)
    want = our_step(transformer, parameters, batch, mode)
    moved = copy.deepcopy(batch)
    moved.inputs = {key: value.cuda() for key, value in batch.inputs.items()}
    moved.noise, moved.latents, moved.points = batch.noise.cuda(), batch.latents.cuda(), batch.points.to("cuda")
    transformer.cuda()
    found = our_step(transformer, parameters, moved, mode)
    for ours, theirs in zip(want[:3], found[:3], strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, atol=2e-3, rtol=2e-3)
    for key, gradient in want[3].items():
        torch.testing.assert_close(found[3][key].cpu(), gradient, atol=5e-3, rtol=5e-3)
