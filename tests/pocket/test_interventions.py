"""Interventions: against the naive twin with loops over points, with nothing changed where nothing is asked, and by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mosaic.config.loading import Config, load_config
from mosaic.method.flow import sample_timesteps
from mosaic.model.attention_rows import CaptureRequest
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from scripts.evaluate import main
from scripts.pocket import intervention_report, interventions, world
from scripts.pocket.evaluation import held_out_scenes
from scripts.pocket.interventions import (
    INTERVENTIONS,
    PLAIN,
    Intervention,
    changes,
    edit_of,
    measure_interventions,
    stratified_timesteps,
)
from tests import naive, tiny

T = tiny.TEXT_LENGTH


class TwinWithReplacedRows(naive.NaiveFlux):
    """Replaces rows of its full maps, one point after the other, by `replace(row, own columns, columns of the points)`."""

    replace: Callable[[Tensor, "TwinWithReplacedRows", int, list[int]], Tensor]
    side: str
    samples: list[list[Tensor]]

    def attention(self, query: Tensor, key: Tensor, value: Tensor, maps: list[Tensor]) -> Tensor:
        attended = super().attention(query, key, value, maps).unflatten(2, (self.heads, -1))
        axes = self.transformer.config.axes_dims_rope
        query, key = naive.rotate(query, self.ids, axes), naive.rotate(key, self.ids, axes)
        target, first = self.target.start, self.target.stop
        per_reference = len(self.token_reference[self.token_reference == 0])
        for b, references in enumerate(self.samples):
            leads: dict[int, list[int]] = {}  # row to the columns of its points
            for k, pairs in enumerate(references):
                for u, v in pairs.tolist():
                    places = (target + v, first + k * per_reference + u)
                    row, column = places if self.side == "target" else places[::-1]
                    leads.setdefault(row, []).append(column)
            for row, columns in leads.items():
                for h in range(self.heads):
                    scores = key[b, :, h] @ query[b, row, h] / math.sqrt(query.shape[-1])
                    weights = torch.softmax(scores.masked_fill(~self.mask[row], -torch.inf), dim=0)
                    attended[b, row, h] = self.replace(weights, self, row, columns) @ value[b, :, h]
        return attended.flatten(2)


def hide(weights: Tensor, hidden: Tensor) -> Tensor:
    kept = weights * ~hidden
    return kept / kept.sum()


def on_references(weights: Tensor, twin: TwinWithReplacedRows) -> Tensor:
    return weights[twin.token_reference >= 0].sum()


def hide_references(weights: Tensor, twin: TwinWithReplacedRows, row: int, columns: list[int]) -> Tensor:
    return hide(weights, twin.token_reference >= 0)


def hide_target(weights: Tensor, twin: TwinWithReplacedRows, row: int, columns: list[int]) -> Tensor:
    is_target = torch.zeros(len(weights), dtype=torch.bool)
    is_target[twin.target] = True
    return hide(weights, is_target)


def reference_one_hot(weights: Tensor, twin: TwinWithReplacedRows, row: int, columns: list[int]) -> Tensor:
    (column,) = columns
    mass, new = weights[twin.target].sum(), weights.clone()
    new[twin.target] = 0
    new[column] = mass
    return new


def target_one_hot(weights: Tensor, twin: TwinWithReplacedRows, row: int, columns: list[int]) -> Tensor:
    new = weights * (twin.token_reference < 0)
    for column in columns:
        new[column] += on_references(weights, twin) / len(columns)
    return new


def own_reference(weights: Tensor, twin: TwinWithReplacedRows, row: int, columns: list[int]) -> Tensor:
    (k,) = {int(twin.token_reference[column]) for column in columns}
    own = weights * (twin.token_reference == k)
    return weights * (twin.token_reference < 0) + own / own.sum() * on_references(weights, twin)


NAIVE = {f.__name__: f for f in (hide_references, hide_target, reference_one_hot, target_one_hot, own_reference)}


@pytest.mark.parametrize("mode", ["target", "joint", "isolated"])
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_each_is_that_of_a_loop_over_points(name: str, mode: str) -> None:
    batch, transformer, stock = tiny.build_batch(3), tiny.build_transformer(), tiny.build_transformer(stock=True)
    parameters = tiny.attach_random_lora(transformer)
    twin = TwinWithReplacedRows(stock, naive.lora_matrices({key: parameter.detach() for key, parameter in parameters.items()}))
    twin.replace, twin.side, twin.samples = NAIVE[name], INTERVENTIONS[name].side, batch.samples
    with torch.no_grad():
        expected = twin(**batch.inputs, reference_attention=mode).velocity
        plain = transformer(**batch.inputs, reference_attention=mode).sample
        found = transformer(**batch.inputs, reference_attention=mode, attention_edit=edit_of(INTERVENTIONS[name], batch.points)).sample
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    if mode != "isolated" or INTERVENTIONS[name].side == "target":  # isolated references give nothing to the target
        assert (found - plain).abs().max() > 1e-3
    else:
        torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["target", "reference"])
@pytest.mark.parametrize("mode", ["target", "joint", "isolated"])
def test_rows_as_they_are_change_nothing(mode: str, side: str) -> None:
    batch, transformer = tiny.build_batch(3), tiny.build_transformer()
    tiny.attach_random_lora(transformer)
    same = edit_of(Intervention("nothing", side, lambda rows: rows.weights), batch.points)
    inputs = {**batch.inputs, "reference_attention": mode, "capture": CaptureRequest(batch.points.global_index)}
    with torch.no_grad():
        plain, edited = transformer(**inputs), transformer(**inputs, attention_edit=same)
    torch.testing.assert_close(edited.sample, plain.sample, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(edited.attention_rows, plain.attention_rows, atol=1e-5, rtol=1e-4)


def test_other_rows_stay_bit_for_bit() -> None:
    """Without points there is nothing to replace."""
    batch, transformer = tiny.build_batch(2), tiny.build_transformer()
    tiny.attach_random_lora(transformer)
    batch.points.mask.zero_()
    with torch.no_grad():
        plain = transformer(**batch.inputs).sample
        for intervention in INTERVENTIONS.values():
            assert torch.equal(transformer(**batch.inputs, attention_edit=edit_of(intervention, batch.points)).sample, plain)


def test_an_edit_needs_references() -> None:
    batch = tiny.build_batch(2)
    bare = {**batch.inputs, "reference_hidden_states": None}
    with pytest.raises(ValueError, match="attention_edit needs reference_hidden_states"):
        tiny.build_transformer()(**bare, attention_edit=lambda inputs, main, references: (main, references))


def test_noise_levels_are_thirds_of_those_of_training() -> None:
    drawn = sample_timesteps(30_000, 64, torch.Generator().manual_seed(0)).sort().values
    found = stratified_timesteps(10_000, 64, torch.Generator().manual_seed(1))
    for level, third in zip(found.T, drawn.split(10_000), strict=True):
        assert level.mean().item() == pytest.approx(third.mean().item(), abs=0.005)
        assert (level.median().item(), level.std().item()) == pytest.approx((third.median().item(), third.std().item()), abs=0.01)


def test_losses_are_those_of_a_loop_over_scenes_and_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone or in a batch, in the order of the scenes; what is added is relative to the same noise."""
    config = load_config("configs/pocket.json")
    pipeline = MosaicFluxPipeline.from_pretrained(config.model.pretrained, dtype=torch.float32)
    pipeline.load_reference_lora(config.inference.lora)
    scenes = held_out_scenes(2, 2)
    few = {name: INTERVENTIONS[name] for name in ("hide_references", "hide_target")}  # the others go the same way
    monkeypatch.setattr(interventions, "INTERVENTIONS", few)
    together, alone = (measure_interventions(pipeline, scenes, config, batch_size, 7) for batch_size in (2, 1))
    assert list(together) == [PLAIN, *few]
    for name, losses in together.items():
        assert losses.shape == (2, 3)
        torch.testing.assert_close(losses, alone[name], rtol=1e-4, atol=1e-6)
    other = measure_interventions(pipeline, scenes[:1], config, 1, 8)[PLAIN]
    assert not torch.equal(other, together[PLAIN][:1])
    found = changes(together)
    assert found[PLAIN].tolist() == pytest.approx(together[PLAIN].mean(dim=1).tolist())
    added = together["hide_target"] - together[PLAIN]
    assert found["hide_target"].tolist() == pytest.approx(added.mean(dim=1).tolist())
    assert found["hide_target_high"].tolist() == pytest.approx(added[:, 2].tolist())
    assert found["hide_references"].mean() > 0.003


def test_the_command_writes_tables_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By regime, K and intervention, with intervals over scenes."""

    def measured(pipeline: object, scenes: list[world.Scene], config: Config, batch_size: int, seed: int) -> dict[str, Tensor]:
        losses = {PLAIN: torch.full((len(scenes), 3), 0.25, dtype=torch.float64)}
        asked.append((len(scenes), len(scenes[0].placements), {p.identity.class_name for p in scenes[0].placements}))
        step = torch.tensor([0.0, 0.001, 0.002], dtype=torch.float64) + 0.003 * torch.arange(len(scenes))[:, None]
        return losses | {name: losses[PLAIN] + number * step for number, name in enumerate(INTERVENTIONS)}

    asked: list[tuple[int, int, set[str]]] = []
    monkeypatch.setattr(intervention_report, "measure_interventions", measured)
    file = tmp_path / "found.json"
    assert main(["--interventions", "--num-cases", "2", "--output", str(file)]) == 0
    assert [(count, k, len(classes)) for count, k, classes in asked] == [(2, 2, 2), (2, 4, 4), (2, 2, 1), (2, 4, 1)]
    found = json.loads(file.read_text())
    entry = found["interventions"]["twins"]["4"]["hide_target"]  # 0.001 and 0.004, a half interval of t * 0.0015
    assert entry == pytest.approx({"mean": 0.0025, "low": 0.0025 - 12.7062 * 0.0015, "high": 0.0025 + 12.7062 * 0.0015})
    assert found["interventions"]["distinct"]["2"][PLAIN] == {"mean": 0.25, "low": None, "high": None}
    assert found["lora"]["digest"]
    printed = capsys.readouterr().out
    assert "| L_diff | 250.0 | 250.0 | 250.0 | 250.0 |" in printed
    assert "| references cannot see the target | +2.5 [-16.6, 21.6] |" in printed
    assert "| references cannot see the target | +1.5 / +2.5 / +3.5 |" in printed
