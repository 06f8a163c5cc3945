"""The limit to the attention losses' pull: what is measured, what it takes off, and that a run goes on with it."""

import json
import math
from pathlib import Path

import pytest
import torch

from mosaic.config.sections import LossConfig
from mosaic.training import Trainer, train
from mosaic.training.objective import draw_inputs, train_step
from mosaic.training.starting import check_settings
from tests import runs

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def norms(trainer: Trainer, batch: object) -> tuple[float, float]:
    """Of the gradients by flow matching and by the weighted attention losses, on the samples of the trainer's next step."""
    found = []
    for attention in (False, True):
        inputs = draw_inputs(trainer.pipeline.encoders, batch, trainer.config, trainer._generators(batch, 0), torch.device("cpu"))
        loss = train_step(trainer.pipeline.transformer, *inputs, trainer.config.loss, trainer.step, trainer.call)
        term = 0.4 * loss.correspondence + 0.6 * loss.disentanglement if attention else loss.flow_matching
        gradients = torch.autograd.grad(term, list(trainer.parameters.values()), allow_unused=True)
        found.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None)))
    return found[0], found[1]


def test_the_gradient_of_a_step_is_held_to_the_share(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = Trainer(runs.make_config(world, tmp_path / "a", loss__max_pull=0.01, optimizer__max_grad_norm=None))
    batch = runs.samples_of(limited, num_references=2, count=2)
    flow_matching, attention = norms(limited, batch)
    assert attention > 0.01 * flow_matching
    gradients = runs.captured_gradients(limited, monkeypatch)
    limited.optimizer_step([batch])
    assert limited.pull_limit.pull == pytest.approx(attention / flow_matching, rel=1e-4)
    scale = 0.01 * flow_matching / attention
    assert limited.pull_limit.scale == pytest.approx(scale, rel=1e-4)
    weights = {"loss__correspondence_weight": 0.4 * scale, "loss__disentanglement_weight": 0.6 * scale}
    free = Trainer(runs.make_config(world, tmp_path / "b", optimizer__max_grad_norm=None, **weights))
    expected = runs.captured_gradients(free, monkeypatch)
    free.optimizer_step([batch])
    for key, gradient in expected[0].items():
        torch.testing.assert_close(gradients[0][key], gradient, atol=1e-6, rtol=1e-3)


def test_a_generous_limit_and_none_change_no_bit(world: Path, tmp_path: Path) -> None:
    found = []
    for index, changes in enumerate(({}, {"loss__max_pull": 1e6})):
        trainer = Trainer(runs.make_config(world, tmp_path / str(index), **changes))
        batch = runs.samples_of(trainer, num_references=2, count=2)
        for _ in range(2):
            trainer.optimizer_step([batch, batch])
        found.append(runs.values(trainer))
        assert (trainer.pull_limit.scale, trainer.pull_limit.squares is None) == (1, not changes)
    runs.assert_same_tensors(*found)


def test_it_is_measured_every_so_often_and_remembered(world: Path, tmp_path: Path) -> None:
    trainer = Trainer(runs.make_config(world, tmp_path, loss__max_pull=0.01, loss__pull_every=2))
    batch, squares = runs.samples_of(trainer, num_references=2, count=2), []
    before = norms(trainer, batch)
    for _ in range(3):
        if len(squares) == 2:
            now = norms(trainer, batch)
        trainer.optimizer_step([batch])
        squares.append(trainer.pull_limit.squares)
    assert squares[0] == squares[1] == pytest.approx([norm**2 for norm in before], rel=1e-4)
    assert squares[2] == pytest.approx([0.9 * old**2 + 0.1 * new**2 for old, new in zip(before, now, strict=True)], rel=1e-4)


def test_a_run_goes_on_with_it(world: Path, tmp_path: Path) -> None:
    changes = {"loss__max_pull": 0.01, "loss__pull_every": 3, "training__checkpoint_every": 2}
    train(runs.make_config(world, tmp_path / "whole", training__max_steps=4, **changes))
    train(runs.make_config(world, tmp_path / "parts", training__max_steps=2, **changes))
    train(runs.make_config(world, tmp_path / "parts", training__max_steps=4, **changes), resume="auto")
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "parts")
    )
    assert whole == parts
    assert whole[1]["optimizer/attention_scale"] == pytest.approx(0.01 / whole[1]["optimizer/pull"])
    assert whole[0]["optimizer/pull"] == whole[2]["optimizer/pull"] != whole[3]["optimizer/pull"]


def test_deepspeed_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic.training.starting.uses_deepspeed", lambda: True)
    check_settings(runs.make_config(world, tmp_path))
    with pytest.raises(ValueError, match="loss.max_pull must be null with DeepSpeed"):
        check_settings(runs.make_config(world, tmp_path, loss__max_pull=1.0))
    assert LossConfig().max_pull is None
