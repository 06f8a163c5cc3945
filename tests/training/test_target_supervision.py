"""Supervision of the target's queries, and of single heads: rows, losses and gradients against the naive twin in float64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mosaic.config.loading import from_dict
from mosaic.config.schema import FieldError
from mosaic.config.sections import LossConfig
from mosaic.method.correspondence import batch_points
from mosaic.method.losses import MosaicLoss, cross_entropy, own_reference_loss, target_correspondence_loss
from mosaic.model import attention_rows
from mosaic.model.attention import Layout, branch_attention
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.recomputation import set_gradient_checkpointing
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.training import Trainer
from mosaic.training.encoding import EncodedBatch, Grids
from mosaic.training.objective import CallSettings, Draws, logged_terms, loss_weights, scheduled_weights, train_step
from tests import naive, runs, tiny
from tests.model.test_attention import HEADS, REFERENCE, TARGET, TEXT, WIDTH, attend, draw

KEYS = ["all", "references"]
WEIGHTS = {"correspondence_weight": 0.3, "disentanglement_weight": 0.5, "own_reference_weight": 0.2}


def step_of(transformer: Any, batch: tiny.Batch, loss: LossConfig, mode: str = "target", step: int = 0) -> MosaicLoss:
    """`train_step` on a tiny batch, whose samples all have references."""
    tensors = (batch.inputs[name] for name in ("reference_hidden_states", "encoder_hidden_states", "pooled_projections"))
    encoded = EncodedBatch(batch.latents, *tensors, Grids(tiny.TARGET_GRID, tiny.REFERENCE_GRID))
    draws = Draws(torch.ones(len(batch.latents), dtype=torch.bool), batch.inputs["timestep"], batch.noise)
    return train_step(transformer, encoded, batch.points, draws, loss, step, CallSettings(mode, True))


def naive_loss(stock: Any, tensors: dict[str, Tensor], batch: tiny.Batch, loss: LossConfig, mode: str) -> dict[str, Tensor]:
    """The terms and their weighted sum by the twin, float64."""
    inputs = {name: value.double() for name, value in batch.inputs.items()} | {"guidance": torch.ones(len(batch.latents)).double()}
    output = naive.NaiveFlux(stock, naive.lora_matrices(tensors))(**inputs, reference_attention=mode)
    samples, length, reduction = batch.samples, batch.num_reference_tokens, loss.correspondence_reduction
    of_target = naive.target_maps(output.target_scores, batch.points.num_references * length, loss.target_keys)

    def scal(maps: Tensor) -> list[Tensor]:
        return naive.correspondence(maps, samples, length, reduction)

    def target(maps: Tensor) -> list[Tensor]:
        return naive.target_correspondence(maps, samples, length, False, reduction)

    def own(maps: Tensor) -> list[Tensor]:
        return naive.target_correspondence(maps, samples, length, True, reduction)

    def taken(loss_of: Any, maps: list[Tensor]) -> list[Tensor]:
        return naive.mean_of_heads(loss_of, maps) if loss.heads == "each" else loss_of(naive.mean_maps(maps))

    terms = {
        "flow_matching": naive.flow_matching(output.velocity, batch.noise, batch.latents),
        "correspondence": taken(scal, output.maps),
        "disentanglement": naive.disentanglement(naive.mean_maps(output.maps), samples, length),
        "target_correspondence": taken(target, of_target),
        "own_reference": taken(own, of_target),
    }
    means = {name: torch.stack(values).mean() for name, values in terms.items()}
    sides = loss.supervised_queries
    total = means["flow_matching"] + 0.5 * means["disentanglement"] + 0.2 * means["own_reference"]
    total = total + 0.3 * ((sides != "target") * means["correspondence"] + (sides != "reference") * means["target_correspondence"])
    return {"total": total, **means}


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("target", {"supervised_queries": "target"}),
        ("target", {"supervised_queries": "both", "target_keys": "references", "correspondence_reduction": "point"}),
        ("joint", {"supervised_queries": "both"}),
        ("isolated", {"supervised_queries": "target", "target_keys": "references"}),
        ("isolated", {"supervised_queries": "reference", "heads": "each"}),
        ("target", {"supervised_queries": "both", "heads": "each"}),
        ("joint", {"supervised_queries": "target", "target_keys": "references", "heads": "each", "correspondence_reduction": "point"}),
    ],
)
def test_terms_and_gradients_equal_the_twin(mode: str, settings: dict[str, Any]) -> None:
    transformer, batch = tiny.build_transformer(), tiny.build_batch(3)
    parameters, loss = tiny.attach_random_lora(transformer), LossConfig(**WEIGHTS | settings)
    found = step_of(transformer, batch, loss, mode)
    tensors = {key: parameter.detach().double().requires_grad_() for key, parameter in parameters.items()}
    expected = naive_loss(tiny.build_transformer(stock=True).double(), tensors, batch, loss, mode)
    assert len({len(pairs) for pairs in batch.samples[1]}) > 1  # else the two means over points would be equal
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(found, name).double(), value, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    gradients = torch.autograd.grad(found.total, list(parameters.values()), allow_unused=True)
    wanted = torch.autograd.grad(expected["total"], list(tensors.values()), allow_unused=True)
    for key, gradient, want in zip(parameters, gradients, wanted, strict=True):
        zero = torch.zeros_like(tensors[key])
        ours, theirs = (zero if g is None else g.double() for g in (gradient, want))
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # of norms, which are float32 inside
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_gradients_under_bfloat16_autocast_are_near_those_of_float64(base: torch.dtype) -> None:
    """Of the whole objective, with the paper's terms and those of the target. What is left is rounding: 8 bits in every layer."""
    transformer, batch = tiny.build_transformer().to(base), tiny.build_batch(3)
    parameters, loss = tiny.attach_random_lora(transformer), LossConfig(**WEIGHTS, supervised_queries="both")
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step_of(transformer, batch, loss)
    tensors = {key: parameter.detach().double().requires_grad_() for key, parameter in parameters.items()}
    stock = tiny.build_transformer(stock=True).to(base).double()
    expected = naive_loss(stock, tensors, batch, loss, "target")
    gradients = torch.autograd.grad(found.total, list(parameters.values()), allow_unused=True)
    wanted = torch.autograd.grad(expected["total"], list(tensors.values()), allow_unused=True)
    differences = [(g.double() - w, w) for g, w in zip(gradients, wanted, strict=True) if w is not None]
    assert all(g is not None or w is None or not w.any() for g, w in zip(gradients, wanted, strict=True))
    error, norm = (torch.stack([pair[i].norm() for pair in differences]).norm() for i in range(2))
    assert abs(found.total.double() - expected["total"]) < 0.01 * expected["total"].abs()
    assert error < 0.03 * norm


@pytest.mark.parametrize("blocks", ["double", [1, 3]])
def test_rows_are_the_mean_over_the_wanted_blocks(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch, blocks: Any) -> None:
    parameters, points = tiny.attach_random_lora(transformer), batch.points
    chosen = [0, 1] if blocks == "double" else blocks
    request = CaptureRequest(blocks=blocks, target_index=points.target_index, target_keys="all")
    each = CaptureRequest(points.global_index, blocks=blocks, target_index=points.target_index, target_keys="all", each_head=True)
    twin = naive.NaiveFlux(tiny.build_transformer(stock=True), naive.lora_matrices(parameters))
    with torch.no_grad():
        plain, output, of_heads = transformer(**batch.inputs), *(transformer(**batch.inputs, capture=c) for c in (request, each))
        maps = naive.target_maps(twin(**batch.inputs).target_scores, 2 * batch.num_reference_tokens, "all")
    rows = torch.stack([naive.mean_maps(maps, chosen)[b, index] for b, index in enumerate(points.target_index)])
    torch.testing.assert_close(output.target_rows.double(), rows, atol=1e-6, rtol=1e-5)
    assert (output.target_rows.sum(dim=-1) < 1).all()  # the rest is on text and target
    at_points = torch.cat([maps[block] for block in chosen], dim=1)  # [B, heads, N_tgt, K * N_ref]
    weights = torch.stack([of_sample[:, v, g] for of_sample, v, g in zip(at_points, points.target_index, points.global_index, strict=True)])
    torch.testing.assert_close(of_heads.head_weights.target_correspondence, weights, atol=1e-6, rtol=1e-5)
    assert (output.attention_rows, output.head_weights, of_heads.target_rows, plain.target_rows) == (None, None, None, None)
    assert torch.equal(output.sample, plain.sample)
    assert output.target_rows.dtype == torch.float32


def rows_and_gradients(inputs: list[Tensor], keys: str, mode: str, strength: Tensor | None) -> list[Tensor]:
    index = torch.tensor([[0, 7, 7, 3], [2, 5, 0, 0]])
    layout = Layout(3, REFERENCE, mode, strength)
    rows = branch_attention(*inputs, layout, attend_scaled, TEXT, CaptureRequest(target_index=index, target_keys=keys)).rows.target_rows
    weight = torch.randn(rows.shape, generator=torch.Generator().manual_seed(5))
    return [rows, *torch.autograd.grad((rows * weight).sum(), inputs[:2])]


def attend_scaled(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    return attend(query * (1 if scale is None else scale * query.shape[-1] ** 0.5), key, value)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("mode", ["target", "joint", "isolated"])
@pytest.mark.parametrize("absent", [False, True])
def test_rows_know_strengths_and_are_those_of_every_mode(generator: torch.Generator, keys: str, mode: str, absent: bool) -> None:
    """By hand, with and without a strength, and one head at a time as all at once."""
    inputs = draw(3, generator)
    strength = torch.tensor([[2.0, 1.0, 0.5], [1.0, 0.0 if absent else 3.0, 1.0]]).log().clamp(min=-1000)
    query, key, _ = inputs
    logits = torch.einsum("bqhd,bkhd->bhqk", query[:, TEXT : TEXT + TARGET], key) * WIDTH**-0.5
    bias = torch.cat([torch.zeros(2, TEXT + TARGET), strength.repeat_interleave(REFERENCE, dim=1)], dim=1)
    for given, added in ((None, 0), (strength, bias[:, None, None])):
        scores = logits + added
        kept = scores[..., TEXT + TARGET :].softmax(-1) if keys == "references" else scores.softmax(-1)[..., TEXT + TARGET :]
        want = torch.stack([rows[index] for rows, index in zip(kept.mean(dim=1), ([0, 7, 7, 3], [2, 5, 0, 0]), strict=True)])
        weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(5))
        expected = [want, *torch.autograd.grad((want * weight).sum(), inputs[:2], retain_graph=True)]
        for found, wanted in zip(rows_and_gradients(inputs, keys, mode, given), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
    if absent:
        assert not rows_and_gradients(inputs, keys, mode, strength)[0][1, :, REFERENCE : 2 * REFERENCE].any()


def test_no_more_heads_at_once_than_memory_allows(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, products = draw(3, generator), []
    expected = rows_and_gradients(inputs, "all", "target", None)
    softmax = attention_rows._softmax_rows
    monkeypatch.setattr(attention_rows, "_softmax_rows", lambda *given: products.append(given[0].shape[2]) or softmax(*given))
    monkeypatch.setattr(attention_rows, "SAVED_BYTES", 0)
    monkeypatch.setattr(attention_rows, "MAP_BYTES", 1)
    for found, want in zip(rows_and_gradients(inputs, "all", "target", None), expected, strict=True):
        torch.testing.assert_close(found, want, atol=1e-7, rtol=1e-6)
    index = torch.zeros(2, 1, dtype=torch.long)
    branch_attention(*inputs, Layout(3, REFERENCE), attend, TEXT, CaptureRequest(index, False, "all", index, "all", each_head=True))
    assert products == [1] * HEADS * 2 + [1] * HEADS + [1] * HEADS * 2  # forward, backward; attention_rows; both sides of every head


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_checkpointing_changes_no_bit(heads: str) -> None:
    loss, batch = LossConfig(supervised_queries="both", heads=heads, **WEIGHTS), tiny.build_batch()

    def gradients(mode: str) -> list[Tensor]:
        transformer = tiny.build_transformer(num_layers=1, num_single_layers=1)
        parameters = list(tiny.attach_random_lora(transformer).values())
        set_gradient_checkpointing(transformer, mode)
        terms = step_of(transformer, batch, loss)
        found = torch.autograd.grad(terms.total, parameters, allow_unused=True)
        return [*(term.detach() for term in terms), *(torch.zeros(1) if g is None else g for g in found)]

    expected = gradients("none")
    for mode in ("block", "keep_attention"):
        assert all(map(torch.equal, gradients(mode), expected)), mode


# Dynamo makes an instance of every autograd function.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_rows_compile_without_graph_breaks(generator: torch.Generator) -> None:
    inputs, index = draw(3, generator), torch.tensor([[0, 7, 3], [2, 5, 0]])
    request, layout = CaptureRequest(index, False, "all", index, "all"), Layout(3, REFERENCE, "joint", torch.ones(2, 3))

    def rows(*inputs: Tensor) -> list[Tensor]:
        return [branch_attention(*inputs, layout, attend_scaled, TEXT, request).rows.target_rows]

    torch._dynamo.reset()
    found, expected = torch.compile(rows, backend="aot_eager", fullgraph=True)(*inputs), rows(*inputs)
    torch._dynamo.reset()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        wanted = torch.autograd.grad(theirs.square().sum(), inputs[:2], retain_graph=True)
        for gradient, want in zip(torch.autograd.grad(ours.square().sum(), inputs[:2], retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(gradient, want, atol=1e-6, rtol=1e-4)


def test_kept_references_have_no_target_rows(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    request = CaptureRequest(target_index=batch.points.target_index, target_keys="all")
    with torch.no_grad():
        kept = transformer(**batch.inputs, keep_references=True).kept_references
        for arguments in ({**batch.inputs, "keep_references": True}, {**tiny.without_references(batch.inputs), "kept_references": kept}):
            with pytest.raises(ValueError, match="rows of target tokens are read in passes that neither keep references nor take kept"):
                transformer(**arguments, capture=request)


# ---- losses by hand


def test_losses_by_hand() -> None:
    """Two references of two tokens; point (1, 0) of the first, (0, 2) and (1, 1) of the second."""
    points = batch_points([[torch.tensor([[1, 0]]), torch.tensor([[0, 2], [1, 1]])]], 2, 3)
    rows = torch.tensor([[[0.1, 0.5, 0.2, 0.1], [0.3, 0.2, 0.25, 0.0], [0.05, 0.15, 0.3, 0.125]]])
    at_points, own = [0.5, 0.25, 0.125], [0.6, 0.25, 0.425]
    for loss, values in ((target_correspondence_loss, at_points), (own_reference_loss, own)):
        first, second, third = (-math.log(value) for value in values)
        assert loss(rows, points).item() == pytest.approx((first + (second + third) / 2) / 2, rel=1e-5)
        assert loss(rows, points, "point").item() == pytest.approx((first + second + third) / 3, rel=1e-5)
    heads = torch.tensor([[[0.5, 0.25, 0.125], [0.125, 0.25, 0.5]]])  # the mean of logarithms, not the logarithm of the mean
    assert cross_entropy(heads, points, "point").item() == pytest.approx(2 * math.log(2), rel=1e-5)


# ---- settings


def test_weights_by_side_and_step() -> None:
    given = {"correspondence_weight": 0.4, "disentanglement_weight": 0.6, "own_reference_weight": 0.1}
    both = LossConfig(supervised_queries="both", **given)
    assert loss_weights(both, 0) == {"correspondence": 0.4, "disentanglement": 0.6, "target_correspondence": 0.4, "own_reference": 0.1}
    assert loss_weights(LossConfig(), 0) == {"correspondence": 0.4, "disentanglement": 0.6}
    target = loss_weights(both.replace(supervised_queries="target"), 0)
    assert (target["correspondence"], target["target_correspondence"]) == (0, 0.4)
    own = loss_weights(both.replace(supervised_queries="reference"), 0)
    assert (own["correspondence"], own["target_correspondence"], own["own_reference"]) == (0.4, 0, 0.1)
    assert logged_terms(LossConfig()) == ["total", "flow_matching", "correspondence", "disentanglement"]

    falling = both.replace(decay_start_step=10, until_step=30)
    shares = [1, 1, 0.75, 0, 0]
    for step, share in zip((0, 10, 15, 30, 31), shares, strict=True):
        assert list(loss_weights(falling, step).values()) == pytest.approx([0.4 * share, 0.6 * share, 0.4 * share, 0.1 * share])
    assert [loss_weights(both.replace(until_step=4), step)["correspondence"] for step in (0, 1, 4)] == pytest.approx([0.4, 0.3, 0])
    sudden = both.replace(decay_start_step=7, until_step=7)
    assert [loss_weights(sudden, step)["own_reference"] for step in (6, 7)] == [0.1, 0]
    warming = falling.replace(disentanglement_start_step=10, disentanglement_warmup_steps=10)
    assert loss_weights(warming, 15)["disentanglement"] == pytest.approx(0.6 * 0.5 * 0.75)
    assert scheduled_weights(both, 0) == {"disentanglement_weight": 0.6}
    assert scheduled_weights(falling, 20) == pytest.approx({name: weight / 2 for name, weight in given.items()} | {"region_weight": 0})


def test_decay_settings_that_contradict_each_other() -> None:
    with pytest.raises(FieldError, match=r"loss\.decay_start_step must be at most loss\.until_step, 5, got 6"):
        LossConfig(decay_start_step=6, until_step=5)
    with pytest.raises(FieldError, match=r"loss\.decay_start_step must be 0 where loss\.until_step is null, got 6"):
        LossConfig(decay_start_step=6)


def test_target_terms_count_at_supervised_timesteps_only(batch: tiny.Batch) -> None:
    transformer = tiny.build_transformer()
    loss = LossConfig(supervised_queries="both", heads="each")
    with torch.no_grad():
        batch.inputs["timestep"] = torch.tensor([0.2, 0.7])
        every, low, high = (step_of(transformer, batch, loss.replace(supervised_timesteps=t)) for t in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0)))
    for name in ("correspondence", "target_correspondence", "own_reference"):
        assert min(getattr(low, name), getattr(high, name)) > 0
        torch.testing.assert_close(getattr(low, name) + getattr(high, name), getattr(every, name))


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_logs_the_terms_it_asks_for_and_learns_from_them(world: Path, tmp_path: Path) -> None:
    settings = {"supervised_queries": "target", "own_reference_weight": 0.1, "until_step": 1}
    trainer = Trainer(runs.make_config(world, tmp_path, **{f"loss__{name}": value for name, value in settings.items()}))
    batch = runs.samples_of(trainer, num_references=2, count=2)
    loss = runs.step_loss(trainer, batch)
    assert loss.target_correspondence > 0
    assert loss.own_reference > 0
    expected = loss.flow_matching + 0.6 * loss.disentanglement + 0.4 * loss.target_correspondence + 0.1 * loss.own_reference
    torch.testing.assert_close(loss.total, expected)
    trainer.step = 1
    after = runs.step_loss(trainer, batch)
    assert after.total == after.flow_matching
    assert from_dict({}).loss.supervises_target is False
