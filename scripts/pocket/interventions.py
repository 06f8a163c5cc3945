"""What attention carries between target and references: how much worse the velocity gets when some of its rows are replaced.

Nothing is trained. On real renderings the rows of points are replaced, in all heads and blocks, and L_diff is measured again with the same
noise: of a channel that is not in use nothing is missed. The optimum of a loss on attention is such a replacement, too: what it takes from
L_diff is the most that the loss could give to this adapter, as far as one can get there by attention alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mosaic.config.loading import Config
from mosaic.method.correspondence import Points, batch_points
from mosaic.method.flow import add_noise
from mosaic.method.losses import flow_matching_loss
from mosaic.model.attention import AttentionEdit, AttentionInputs, Layout
from mosaic.model.attention_rows import CaptureRequest
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.training.encoding import encode_batch
from mosaic.training.objective import call_settings, predict
from scripts.pocket import world
from scripts.pocket.evaluation import scene_batch
from scripts.pocket.sampling import time_shift

NOISE_LEVELS = ("low", "middle", "high")  # thirds of the timesteps that training draws, so that their mean is L_diff as in training
PLAIN = "flow_matching"


@dataclass(frozen=True)
class Rows:
    """Rows of attention of one side, the target's tokens or the references', over all keys.

    Attributes:
        scores: float32 [B, H, R, T + N_tgt + K * N_ref], scaled logits; -inf where a query does not see a key.
        target: Columns of the target.
        references: Columns of the references.
        points: float32 [B, R, N] over the columns of the other side: where the points of a row lead, of sum 1; 0 for a row without points.
        num_references: K.
    """

    scores: Tensor
    target: slice
    references: slice
    points: Tensor
    num_references: int

    @property
    def weights(self) -> Tensor:
        """[B, H, R, S], as they are."""
        return self.scores.softmax(dim=-1)


def _without(rows: Rows, columns: slice) -> Tensor:
    """All of the mass on the other columns, in the proportions that it has there."""
    scores = rows.scores.clone()
    scores[..., columns] = -torch.inf
    return scores.softmax(dim=-1)


def _at_points(rows: Rows, columns: slice) -> Tensor:
    """What falls on the columns, at the points among them."""
    weights = rows.weights
    weights[..., columns] = weights[..., columns].sum(dim=-1, keepdim=True) * rows.points[:, None]
    return weights


def _on_own_reference(rows: Rows) -> Tensor:
    """What falls on references, on the reference of the row's points, in the proportions that it has there."""
    weights, scores = rows.weights, rows.scores[..., rows.references]
    on_references = weights[..., rows.references].sum(dim=-1, keepdim=True)
    per_reference = rows.points.unflatten(-1, (rows.num_references, -1))
    is_own = (per_reference.sum(dim=-1, keepdim=True) > 0).expand_as(per_reference).flatten(-2)  # (B, R, K * N_ref)
    own = scores.masked_fill(~is_own[:, None], -torch.inf).softmax(dim=-1)
    weights[..., rows.references] = on_references * own
    return weights


@dataclass(frozen=True)
class Intervention:
    """One replacement.

    Attributes:
        meaning: For tables.
        side: Whose rows are replaced.
        weights: Makes the new ones, [B, H, R, S], of the old ones.
    """

    meaning: str
    side: Literal["target", "reference"]
    weights: Callable[[Rows], Tensor]


INTERVENTIONS = {
    "hide_references": Intervention("target cannot see references", "target", lambda rows: _without(rows, rows.references)),
    "hide_target": Intervention("references cannot see the target", "reference", lambda rows: _without(rows, rows.target)),
    "reference_one_hot": Intervention(
        "what reference rows give to the target, all at v (SCAL's optimum)", "reference", lambda rows: _at_points(rows, rows.target)
    ),
    "target_one_hot": Intervention(
        "what target rows give to references, all at G(u)", "target", lambda rows: _at_points(rows, rows.references)
    ),
    "own_reference": Intervention("what target rows give to references, all to the own one", "target", _on_own_reference),
}


def edit_of(intervention: Intervention, points: Points) -> AttentionEdit:
    """The replacement as the transformer takes it, of the rows of these points; all other rows stay as they are, bit for bit."""

    def edit(inputs: AttentionInputs, main: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        assert inputs.layout.log_strength is None  # these logits are without it
        text, end = inputs.text_length, main.shape[1]
        spans = {"target": slice(text, end), "reference": slice(end, None)}
        is_target = intervention.side == "target"
        led = point_matrix(points, end - text, inputs.layout.length)
        led = led if is_target else led.transpose(1, 2)
        total = led.sum(dim=-1, keepdim=True)
        query = inputs.query[:, spans[intervention.side]]
        scores = torch.einsum("brhd,bshd->bhrs", query.float(), inputs.key.float()) * query.shape[-1] ** -0.5
        if not is_target:
            scores = scores.masked_fill(~visible_keys(inputs.layout, end).to(scores.device), -torch.inf)
        rows = Rows(scores, spans["target"], spans["reference"], led / total.clamp(min=1), inputs.layout.num_references)
        replaced = torch.einsum("bhrs,bshd->brhd", intervention.weights(rows), inputs.value.float()).to(main.dtype)
        before = main[:, text:] if is_target else references
        after = torch.where((total > 0)[..., None], replaced, before)
        return (torch.cat([main[:, :text], after], dim=1), references) if is_target else (main, after)

    return edit


def point_matrix(points: Points, num_target_tokens: int, num_reference_tokens: int) -> Tensor:
    """float32 [B, N_tgt, K * N_ref]: the number of points between each target token v and each reference token G(u)."""
    matrix = torch.zeros(len(points.mask), num_target_tokens, num_reference_tokens, device=points.mask.device)
    sample = torch.arange(len(points.mask), device=points.mask.device)[:, None].expand_as(points.mask)
    return matrix.index_put((sample, points.target_index, points.global_index), points.mask.float(), accumulate=True)


def visible_keys(layout: Layout, main_length: int) -> Tensor:
    """bool [K * N_ref, S]: which keys a reference token sees in the layout's mode."""
    own = torch.block_diag(*[torch.ones(layout.num_reference_tokens, layout.num_reference_tokens)] * layout.num_references).bool()
    if layout.reference_attention == "joint":
        own = torch.ones_like(own)
    main = torch.full((layout.length, main_length), layout.reference_attention != "isolated")
    return torch.cat([main, own], dim=1)


def stratified_timesteps(samples: int, num_target_tokens: int, generator: torch.Generator) -> Tensor:
    """[samples, 3] timesteps, one of each third of those that training draws (`mosaic.method.flow.sample_timesteps`)."""
    share = (torch.arange(len(NOISE_LEVELS)) + torch.rand(samples, len(NOISE_LEVELS), generator=generator)) / len(NOISE_LEVELS)
    return time_shift(torch.sigmoid(torch.special.ndtri(share)), num_target_tokens)


@torch.no_grad()
def measure_interventions(
    pipeline: MosaicFluxPipeline, scenes: Sequence[world.Scene], config: Config, batch_size: int, seed: int
) -> dict[str, Tensor]:
    """L_diff as it is and with each intervention, on real renderings of the scenes.

    Args:
        pipeline: With the adapter.
        scenes: Of one K.
        config: Sizes and mode of the run.
        batch_size: Scenes per forward pass, each at three noise levels.
        seed: Of the noise, which is the same for all interventions and depends on the scene's place alone.

    Returns:
        By name, `PLAIN` and those of `INTERVENTIONS`: float64 [scenes, 3], L_diff of each scene at each noise level of `NOISE_LEVELS`.
    """
    transformer, found = pipeline.transformer, []
    for start in range(0, len(scenes), batch_size):
        batch = scene_batch(scenes[start : start + batch_size], pipeline, config)
        encoded = encode_batch(pipeline.encoders, batch, batch.prompts, config.model.text_length, None, transformer.device)
        grids, call = encoded.grids, call_settings(config, transformer)
        points = batch_points(batch.points, grids.reference.num_tokens, grids.target.num_tokens, transformer.device)
        generators = [torch.Generator().manual_seed(seed + start + place) for place in range(len(batch.prompts))]
        timesteps = torch.cat([stratified_timesteps(1, grids.target.num_tokens, own) for own in generators])
        noise = torch.stack([torch.randn(len(NOISE_LEVELS), *encoded.latents.shape[1:], generator=own) for own in generators], dim=1)
        edits = {PLAIN: None, **{name: edit_of(intervention, points) for name, intervention in INTERVENTIONS.items()}}
        losses: dict[str, list[Tensor]] = {name: [] for name in edits}
        for drawn, times in zip(noise.to(encoded.latents), timesteps.T.to(encoded.latents), strict=True):
            noisy = add_noise(encoded.latents, drawn, times)
            for name, edit in edits.items():
                output = predict(partial(transformer, attention_edit=edit), encoded, noisy, times, CaptureRequest(), call)
                losses[name].append(flow_matching_loss(output.sample, drawn, encoded.latents).double())
        found.append({name: torch.stack(values, dim=1).cpu() for name, values in losses.items()})
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def changes(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How much each intervention adds to L_diff.

    Args:
        losses: Of `measure_interventions`.

    Returns:
        float64 [scenes] each: L_diff under `PLAIN`, and what each intervention adds to it under its name, both over all noise; what it adds
        at a third of the noise under `<name>_<level>`.
    """
    plain, found = losses[PLAIN], {PLAIN: losses[PLAIN].mean(dim=1)}
    for name in INTERVENTIONS:
        change = losses[name] - plain
        found[name] = change.mean(dim=1)
        found |= {f"{name}_{level}": values for level, values in zip(NOISE_LEVELS, change.T, strict=True)}
    return found
