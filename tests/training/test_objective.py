"""The objective on one batch: noise, dropout, schedules, presets, precision, and what gets a gradient."""

import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from mosaic.config.loading import from_dict, resolved_dict
from mosaic.data import collate
from mosaic.lora.adapter import save_reference_lora
from mosaic.method.correspondence import LEAST_POINTS, batch_points, draw_points
from mosaic.method.flow import add_noise, sample_timesteps
from mosaic.method.losses import MosaicLoss
from mosaic.method.tokens import pack_latents, reference_position_ids
from mosaic.model.attention_rows import CaptureRequest
from mosaic.rendering.start import Start
from mosaic.training import Trainer, objective
from mosaic.training.encoding import EncodedBatch, Grids
from mosaic.training.objective import Draws, call_settings, draw_inputs, loss_weights, sample_generators, train_step
from mosaic.training.validation import batch_attention_accuracy
from tests import runs, tiny

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


# ---- flow


def test_timesteps_are_shifted_by_the_resolution(generator: torch.Generator) -> None:
    for num_tokens, mu, middle in ((256, 0.5, 0.6224593), (4096, 1.15, 0.7595109)):
        t = sample_timesteps(200_000, num_tokens, generator).double()
        assert 0 < float(t.min()) < float(t.max()) < 1
        logit = torch.log(t / (1 - t))  # of t', which is logit(t) + mu: normal around mu
        assert float(logit.mean()) == pytest.approx(mu, abs=0.01)
        assert float(logit.std()) == pytest.approx(1, abs=0.01)
        assert float(t.median()) == pytest.approx(middle, abs=3e-3)  # t = 1/2 goes to e^mu / (e^mu + 1)


def test_timestep_of_one_draw_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.tensor([math.log(0.2 / 0.8)]))  # t = 0.2
    # e^0.5 / (e^0.5 + 1 / 0.2 - 1) = 1.648721 / 5.648721
    torch.testing.assert_close(sample_timesteps(1, 256), torch.tensor([0.2918751]))


def test_noise_at_the_ends(generator: torch.Generator) -> None:
    latents, noise = torch.randn(3, 4, 5, generator=generator), torch.randn(3, 4, 5, generator=generator)
    mixed = add_noise(latents, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(mixed[0], latents[0])
    assert torch.equal(mixed[1], noise[1])
    torch.testing.assert_close(mixed[2], 0.75 * latents[2] + 0.25 * noise[2])


# ---- schedules and seeds


def test_disentanglement_schedule() -> None:
    paper, release = (from_dict({"loss": {"preset": name}}).loss for name in ("paper", "release"))
    assert [loss_weights(paper, step) for step in (0, 1, 99_999)] == [{"correspondence": 0.4, "disentanglement": 0.6}] * 3
    found = [loss_weights(release, step)["disentanglement"] for step in (0, 9_999, 10_000, 10_250, 10_500, 11_000, 50_000)]
    assert found == pytest.approx([0, 0, 0, 0.25, 0.5, 1, 1])
    late = from_dict({"loss": {"disentanglement_start_step": 5, "disentanglement_weight": 2.0}}).loss
    assert [loss_weights(late, step)["disentanglement"] for step in (4, 5)] == [0, 2.0]


def test_generators_depend_on_seed_and_index_only() -> None:
    def draw(seed: int, index: int) -> tuple[float, ...]:
        return tuple(torch.randn(4, generator=sample_generators(seed, index, 1)[0]).tolist())

    variants = [(42, 3), (42, 4), (43, 3), (42 + 2**32, 3), (42, 3 + 2**32), (3, 42)]
    assert len({draw(*numbers) for numbers in variants}) == len(variants)
    row = [tuple(torch.randn(4, generator=generator).tolist()) for generator in sample_generators(42, 3, 2)]
    assert row == [draw(42, 3), draw(42, 4)]


def test_a_generator_gives_dropout_points_latents_timestep_and_noise_in_this_order(world: Path, tmp_path: Path) -> None:
    trainer = Trainer(runs.make_config(world, tmp_path, loss__max_points=5, data__image_dropout=0.0))
    batch, encoders = runs.samples_of(trainer, num_references=2, count=1), trainer.pipeline.encoders
    encoded, points, draws = draw_inputs(encoders, batch, trainer.config, sample_generators(7, 3, 1), torch.device("cpu"))
    (generator,) = sample_generators(7, 3, 1)
    torch.rand(1, generator=generator)
    pairs = draw_points(batch.points, 5, generator)
    latents = pack_latents(encoders.encode_images(batch.targets, [generator]))
    assert torch.equal(points.target_index, batch_points(pairs, 9, 24).target_index)
    assert torch.equal(encoded.latents, latents)
    assert torch.equal(draws.timesteps, sample_timesteps(1, 24, generator))
    assert torch.equal(draws.noise, torch.randn(latents.shape, generator=generator))


def test_a_sample_is_the_same_in_any_batch(world: Path, tmp_path: Path) -> None:
    """Everything random: dropout, points, latents, timestep and noise; the mean over equal slices is the mean over all."""
    trainer = Trainer(runs.make_config(world, tmp_path, data__image_dropout=0.3, data__text_dropout=0.3, loss__max_points=5))
    calls, prompts, encode = runs.captured_inputs(trainer), [], trainer.pipeline.encoders.encode_prompts
    trainer.pipeline.encoders.encode_prompts = lambda given, length: prompts.extend(given) or encode(given, length)
    samples = [trainer.dataset[i] for i, k in enumerate(trainer.dataset.num_references) if k == 2]

    def losses(size: int) -> list[MosaicLoss]:
        found = []
        for start in range(0, 6, size):
            found.append(runs.step_loss(trainer, collate(samples[start : start + size]), 7, 100 + start))
        return found

    (whole,), parts, single = losses(6), losses(3), losses(1)
    assert prompts[:6] == prompts[6:12] == prompts[12:]
    assert 0 < prompts[:6].count("") < 6
    for name in ("hidden_states", "timestep", "reference_hidden_states"):
        expected = calls[0][name]
        torch.testing.assert_close(torch.cat([call[name] for call in calls[1:3]]), expected)
        torch.testing.assert_close(torch.cat([call[name] for call in calls[3:]]), expected)
    for found in (parts, single):
        mean = MosaicLoss(*(torch.stack(terms).mean() for terms in zip(*found, strict=True)))
        torch.testing.assert_close(mean, whole)
    assert len({round(float(loss.flow_matching.detach()), 4) for loss in single}) == 6


# ---- the step


def test_terms_of_a_batch_and_only_the_adapter_learns(trainer: Trainer) -> None:
    batch = runs.samples_of(trainer, num_references=2, count=3)
    loss = runs.step_loss(trainer, batch)
    assert loss.flow_matching > 0
    assert loss.correspondence > 0
    assert loss.disentanglement < 0
    torch.testing.assert_close(loss.total, loss.flow_matching + 0.4 * loss.correspondence + 0.6 * loss.disentanglement)
    loss.total.backward()
    modules = {name: module for name, module in trainer.pipeline.components.items() if isinstance(module, nn.Module)}
    found = {id(p) for module in modules.values() for p in module.parameters() if p.grad is not None}
    assert found == {id(p) for p in trainer.parameters.values()}
    assert found == {id(p) for module in modules.values() for p in module.parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trainer.parameters.values())


def test_one_reference_has_no_disentanglement(trainer: Trainer) -> None:
    loss = runs.step_loss(trainer, runs.samples_of(trainer, num_references=1, count=2))
    assert loss.disentanglement == 0
    assert loss.correspondence > 0


def test_gradient_checkpointing_changes_nothing(trainer: Trainer) -> None:
    batch, found = runs.samples_of(trainer, num_references=2, count=2), []
    for switch in (trainer.pipeline.transformer.disable_gradient_checkpointing, trainer.pipeline.transformer.enable_gradient_checkpointing):
        switch()
        trainer.optimizer.zero_grad()
        loss = runs.step_loss(trainer, batch)
        loss.total.backward()
        found.append((loss, runs.gradients(trainer)))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("dropout", "image_dropped", "text_dropped"),
    [("image_dropout", True, False), ("text_dropout", False, True), ("both_dropout", True, True)],
)
@pytest.mark.parametrize("preset", ["paper", "release"])
def test_condition_dropout(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: str, image_dropped: bool, text_dropped: bool, preset: str
) -> None:
    config = runs.make_config(world, tmp_path, **{f"data__{dropout}": 1.0, "loss__preset": preset, "loss__disentanglement_start_step": 0})
    trainer = Trainer(config)
    calls, prompts, encode = runs.captured_inputs(trainer), [], trainer.pipeline.encoders.encode_prompts
    monkeypatch.setattr(
        trainer.pipeline.encoders, "encode_prompts", lambda given, length: prompts.append(list(given)) or encode(given, length)
    )
    batch = runs.samples_of(trainer, num_references=2, count=2)
    loss = runs.step_loss(trainer, batch)
    references = calls[0]["reference_hidden_states"]
    assert references.shape[:3] == (2, 2, 9)  # dropped or not, they stay in the sequence
    assert bool((references == 0).all()) == image_dropped
    index = calls[0]["capture"].global_index
    assert (index.shape[1] == LEAST_POINTS and bool((index == 0).all())) == image_dropped  # nothing but padding
    assert bool(loss.correspondence == 0) == image_dropped
    assert bool(loss.disentanglement == 0) == image_dropped
    assert prompts == [["", ""] if text_dropped else batch.prompts]
    loss.total.backward()  # a batch without any point has a gradient nevertheless
    assert runs.total_norm(runs.gradients(trainer)) > 0


def test_a_sample_loses_references_and_points_together(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(runs.make_config(world, tmp_path, data__image_dropout=0.3, data__text_dropout=0.3, data__both_dropout=0.3))
    calls, masks, batch_points = runs.captured_inputs(trainer), [], objective.batch_points
    monkeypatch.setattr(objective, "batch_points", lambda *a: masks.append(batch_points(*a)) or masks[-1])
    batch, kinds = runs.samples_of(trainer, num_references=2, count=6), set()
    for seed in range(4):
        runs.step_loss(trainer, batch, seed)
        dropped = (calls[-1]["reference_hidden_states"] == 0).flatten(1).all(dim=1)
        kept = (calls[-1]["reference_hidden_states"] != 0).flatten(2).any(dim=2).all(dim=1)
        assert torch.equal(dropped, ~kept)  # all references of a sample, or none
        assert torch.equal(dropped, ~masks[-1].mask.any(dim=1))
        kinds.update(dropped.tolist())
    assert kinds == {True, False}


def test_max_points_limits_the_supervised_points(world: Path, tmp_path: Path) -> None:
    trainer = Trainer(runs.make_config(world, tmp_path, loss__max_points=5))
    calls = runs.captured_inputs(trainer)
    for seed in range(2):
        runs.step_loss(trainer, runs.samples_of(trainer, num_references=2, count=2), seed)
    first, second = (call["capture"].global_index for call in calls)
    assert first.shape == second.shape == (2, 5)
    assert not torch.equal(first, second)  # drawn anew


def test_attention_mode_and_positions_reach_the_transformer(world: Path, tmp_path: Path) -> None:
    trainer = Trainer(runs.make_config(world, tmp_path, model__reference_attention="joint", model__reference_position="index"))
    calls = runs.captured_inputs(trainer)
    trainer.optimizer_step([runs.samples_of(trainer, num_references=2, count=2)])
    batch_attention_accuracy(trainer.pipeline, runs.samples_of(trainer, 2, 2), trainer.config, torch.Generator())
    assert [call["reference_attention"] for call in calls] == ["joint", "joint"]
    for call in calls:
        assert torch.equal(call["reference_ids"], reference_position_ids(tiny.REFERENCE_GRID, 2, reference_position="index"))
    save_reference_lora(trainer.pipeline.transformer, tmp_path / "lora.safetensors", resolved_dict(trainer.config))
    with pytest.raises(ValueError, match=r'model.reference_position must be "index", with which .* was trained, got "width"'):
        Start.check(runs.make_config(world, tmp_path, inference__lora=str(tmp_path / "lora.safetensors")), torch.device("cpu"))


def test_attention_losses_count_at_supervised_timesteps_only(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.2, 0.7] * 3)
    monkeypatch.setattr(objective, "sample_timesteps", lambda *_: torch.tensor([next(times)]))
    losses = []
    for index, supervised in enumerate(([0.0, 1.0], [0.0, 0.2], [0.7, 1.0])):  # both ends count
        trainer = Trainer(runs.make_config(world, tmp_path / str(index), loss__supervised_timesteps=supervised))
        losses.append(runs.step_loss(trainer, runs.samples_of(trainer, num_references=2, count=2)))
    every, low, high = losses
    assert every.flow_matching == low.flow_matching == high.flow_matching
    for name in ("correspondence", "disentanglement"):  # one of the two samples each; the other gives 0 and counts in the mean
        first, second, both = (getattr(loss, name) for loss in (low, high, every))
        assert first != 0
        assert second != 0
        torch.testing.assert_close(first + second, both)


def test_release_preset(world: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        runs.make_config(world, tmp_path, loss__preset="release", loss__disentanglement_start_step=0, loss__disentanglement_warmup_steps=2)
    )
    calls = runs.captured_inputs(trainer)
    trainer.step = 1
    loss = runs.step_loss(trainer, runs.samples_of(trainer, num_references=2, count=2))
    request = calls[0]["capture"]
    assert (request.all_tokens, request.blocks) == (True, "double")
    assert -math.log(2) <= loss.disentanglement < 0
    torch.testing.assert_close(loss.total, loss.flow_matching + 0.1 * loss.correspondence + 0.5 * loss.disentanglement)
    trainer.optimizer_step([runs.samples_of(trainer, num_references=2, count=2)])


@torch.no_grad()
def test_every_setting_reaches_the_step() -> None:
    """Against the transformer called by hand: guidance 1 on a model that embeds it, isolated references, the release losses, a cap that
    bites, a target grid that is no reference grid.
    """
    transformer, batch = tiny.build_pipeline(guidance_embeds=True).transformer, tiny.build_batch(guidance_embeds=True)
    settings = {"preset": "release", "disentanglement_start_step": 0, "disentanglement_warmup_steps": 0, "disentanglement_cap": 0.01}
    config = from_dict({"model": {"reference_attention": "isolated"}, "loss": settings})
    inputs, points = batch.inputs, batch.points
    tensors = (inputs[name] for name in ("reference_hidden_states", "encoder_hidden_states", "pooled_projections"))
    encoded = EncodedBatch(batch.latents, *tensors, Grids(tiny.TARGET_GRID, tiny.REFERENCE_GRID))
    draws = Draws(torch.tensor([True, True]), inputs["timestep"], batch.noise)
    found = train_step(transformer, encoded, points, draws, config.loss, 0, call_settings(config, transformer))

    asked = CaptureRequest(points.global_index, all_tokens=True, blocks="double")
    output = transformer(**inputs | {"guidance": torch.ones(2), "reference_attention": "isolated"}, capture=asked)
    correspondence, disentanglement = [], []
    for rows, targets, mask, (p, q) in zip(output.attention_rows, points.target_index, points.mask, output.reference_rows, strict=True):
        correspondence.append(torch.stack([-rows[i, v].log() for i, v in enumerate(targets) if mask[i]]).mean())
        middle = (p + q) / 2
        apart = float((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
        disentanglement.append(-min(apart, 0.01))
    assert disentanglement == [-0.01, -0.01]
    assert len({len(pairs) for pairs in batch.samples[0]}) == 2  # else the two means of SCAL would be equal
    torch.testing.assert_close(found.flow_matching, (output.sample - (batch.noise - batch.latents)).square().mean())
    torch.testing.assert_close(found.correspondence, torch.stack(correspondence).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.disentanglement, torch.tensor(disentanglement).mean())
    torch.testing.assert_close(found.total, found.flow_matching + 0.1 * found.correspondence + 1.0 * found.disentanglement)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # RMSNorm under autocast: only not fused
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.03), ("bfloat16", 0.3)])  # bfloat16 rounds t to 8 bits, as in diffusers
def test_mixed_precision(world: Path, tmp_path: Path, dtype: str, tolerance: float) -> None:
    exact = Trainer(runs.make_config(world, tmp_path))
    expected = exact.optimizer_step([runs.samples_of(exact, num_references=2, count=2)])
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(runs.make_config(world, tmp_path, model__dtype=dtype, training__mixed_precision="bf16"))
    runs.assert_same_tensors(runs.values(trainer), load_file(world / "lora.safetensors"))  # a warm start keeps the file's float32
    loss = trainer.optimizer_step([runs.samples_of(trainer, num_references=2, count=2)])
    assert all(p.dtype == torch.float32 for p in trainer.parameters.values())
    assert all(term.dtype == torch.float32 for term in loss)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance / 3)
