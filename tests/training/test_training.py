"""Training on a tiny FLUX folder and a tiny data set: the optimizer step, the loop, what a run writes, and resuming it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from mosaic.config.loading import resolved_dict
from mosaic.data import Manifest, MosaicBatch, collate
from mosaic.lora.adapter import reference_lora_parameters, write_reference_lora
from mosaic.lora.files import LoraFile
from mosaic.method import losses
from mosaic.method.losses import MosaicLoss
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.training import Trainer, objective, train
from mosaic.training import trainer as training
from mosaic.training.objective import logged_terms
from mosaic.training.starting import open_run, warn_of_cut_captions
from tests import runs

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


# ---- the optimizer step


def test_accumulation_equals_one_batch(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(runs.make_config(world, tmp_path, optimizer__max_grad_norm=None))
    seen, start = runs.captured_gradients(trainer, monkeypatch), runs.values(trainer)
    samples = [trainer.dataset[i] for i, k in enumerate(trainer.dataset.num_references) if k == 2][:4]
    whole = trainer.optimizer_step([collate(samples)])
    with torch.no_grad():
        for key, p in trainer.parameters.items():
            p.copy_(start[key])
    trainer.step = 0  # the same global sample indices
    parts = trainer.optimizer_step([collate(samples[:2]), collate(samples[2:])])
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-6)
    assert runs.total_norm(seen[0]) > 0.01


def test_a_small_group_counts_by_its_share(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples of one reference among steps of four: three quarters of the gradient, and the loss itself; also after a resume."""
    settings = {"training__batch_size": 4, "training__max_steps": 6, "training__checkpoint_every": 3, "optimizer__max_grad_norm": None}
    trainer = Trainer(runs.make_config(world, tmp_path / "run", **settings))
    seen, start = runs.captured_gradients(trainer, monkeypatch), runs.values(trainer)
    batch = runs.samples_of(trainer, num_references=1, count=3)
    losses = []
    for share in (1.0, 0.75):
        losses.append(trainer.optimizer_step([batch], share))
        trainer.step = 0
        with torch.no_grad():
            for key, parameter in trainer.parameters.items():
                parameter.copy_(start[key])
    assert losses[0] == losses[1]
    torch.testing.assert_close(seen[1], {key: 0.75 * gradient for key, gradient in seen[0].items()})
    counted: list[tuple[int, float]] = []

    def spy(self: Trainer, batches: list[MosaicBatch], share: float) -> MosaicLoss:
        counted.append((batches[0].references.shape[1], share))
        return step(self, batches, share)

    step = Trainer.optimizer_step
    monkeypatch.setattr(Trainer, "optimizer_step", spy)
    again = Trainer(runs.make_config(world, tmp_path / "again", **settings))
    again.fit()
    assert sorted(set(counted)) == [(1, 0.75), (2, 1.0)]
    whole, counted[:] = list(counted), []
    resumed = Trainer(runs.make_config(world, tmp_path / "again", **settings), continues=True)
    resumed.resume(tmp_path / "again/checkpoints/step_00000003")
    resumed.fit()
    assert counted == whole[3:]


def test_clipping_really_clips(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    for limit in (None, 1e-3, 1e6):
        trainer = Trainer(runs.make_config(world, tmp_path, optimizer__max_grad_norm=limit))
        seen = runs.captured_gradients(trainer, monkeypatch)
        for _ in range(2):
            trainer.optimizer_step([runs.samples_of(trainer, num_references=2, count=2)])
        norms.append([runs.total_norm(found) for found in seen])
    assert norms[0][0] > 0.01
    assert norms[1] == pytest.approx([1e-3, 1e-3], rel=1e-3)
    assert norms[2] == norms[0]


def test_learning_rate_warm_up(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, rates = Trainer(runs.make_config(world, tmp_path, optimizer__warmup_steps=4)), []
    monkeypatch.setattr(trainer.optimizer, "step", lambda: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    for _ in range(5):
        trainer.optimizer_step([runs.samples_of(trainer, num_references=1, count=1)])
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_another_term_needs_no_change_of_the_trainer(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CONTRIBUTING.md says: a field of the result, a short name, its value in `train_step` and its weight in `loss_weights`."""

    class LossOfFour(NamedTuple):
        total: torch.Tensor
        flow_matching: torch.Tensor
        correspondence: torch.Tensor
        disentanglement: torch.Tensor
        sharpness: torch.Tensor

    def with_sharpness(terms: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> Any:
        return mosaic_loss({**terms, "sharpness": terms["correspondence"].square()}, weights)

    mosaic_loss, weights = objective.mosaic_loss, objective.loss_weights
    for place in (losses, training):
        monkeypatch.setattr(place, "MosaicLoss", LossOfFour)
    monkeypatch.setitem(losses.SHORT_NAMES, "sharpness", "sharp")
    monkeypatch.setattr(objective, "mosaic_loss", with_sharpness)
    monkeypatch.setattr(objective, "loss_weights", lambda loss, step: {**weights(loss, step), "sharpness": 0.25})
    shown = []
    monkeypatch.setattr(training.tqdm, "set_postfix", lambda _, values: shown.append(dict(values)))
    config = runs.make_config(world, tmp_path / "run", training__max_steps=2)
    train(config)
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(entries) == 2
    for entry in entries:
        values = [entry[f"loss/{name}"] for name in ("flow_matching", "correspondence", "disentanglement", "sharpness")]
        factors = [1, config.loss.correspondence_weight, config.loss.disentanglement_weight, 0.25]
        assert values[3] > 0
        assert entry["loss/total"] == pytest.approx(sum(f * value for f, value in zip(factors, values, strict=True)), rel=1e-5)
    assert list(shown[0]) == ["flow", "scal", "mdl", "sharp"]


# ---- a run


def test_three_steps_and_what_they_write(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = runs.make_config(world, output, lora__pretrained=None, validation__every=2, training__checkpoint_every=2)
    path = train(config)
    assert path == output / "lora.safetensors"
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [entry for entry in entries if "loss/total" in entry]
    assert [entry["step"] for entry in losses] == [1, 2, 3]
    assert all(math.isfinite(entry[f"loss/{name}"]) for entry in losses for name in logged_terms(config.loss))
    accuracies = [entry for entry in entries if "attention/exact" in entry]
    assert [entry["step"] for entry in accuracies] == [0, 2, 3]
    assert all(0 <= entry["attention/exact"] <= entry["attention/near"] <= 1 for entry in accuracies)
    assert accuracies[0]["attention/exact_chance"] == pytest.approx(1 / 24)
    for step in (0, 2, 3):
        assert sorted(p.name for p in (output / f"validation/step_{step:08d}").iterdir()) == ["case_0.png", "case_1.png"]
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
    assert json.loads((output / "config.json").read_text()) == resolved_dict(config)
    names = runs.files_below(output)
    assert any("tfevents" in name for name in names)
    assert not [name for name in names if "partial" in name]
    tensors = load_file(path)
    runs.assert_same_tensors(tensors, load_file(output / "checkpoints/step_00000003/lora.safetensors"))
    untouched = {key.split(".")[3] for key, value in tensors.items() if "lora_B" in key and not value.any()}
    assert untouched == {"proj_mlp", "proj_out"}  # of the last block, whose reference output nobody reads

    pipeline = MosaicFluxPipeline.from_pretrained(config.model.pretrained)
    assert pipeline.load_reference_lora(path) == runs.RANK
    assert pipeline.reference_config == resolved_dict(config)
    loaded = reference_lora_parameters(pipeline.transformer)
    runs.assert_same_tensors({key: p.detach() for key, p in loaded.items()}, tensors)


def test_a_fresh_adapter_is_neutral_and_the_same_for_a_seed(world: Path, tmp_path: Path) -> None:
    first, again, other = (
        runs.values(Trainer(runs.make_config(world, tmp_path, lora__pretrained=None, training__seed=seed))) for seed in (1, 1, 2)
    )
    runs.assert_same_tensors(first, again)
    assert all(bool((value == 0).all()) == ("lora_B" in key) for key, value in first.items())
    assert not torch.equal(next(iter(first.values())), next(iter(other.values())))


def test_max_epochs_ends_a_run(world: Path, tmp_path: Path) -> None:
    trainer = Trainer(runs.make_config(world, tmp_path / "run", training__max_steps=None, training__max_epochs=2))
    trainer.fit()
    assert trainer.step == 8  # three batches of K = 2 and one of K = 1 per epoch


def test_validation_takes_a_cases_file(world: Path, tmp_path: Path) -> None:
    config = runs.make_config(
        world, tmp_path / "run", validation__every=1, validation__cases=str(world / "cases.json"), training__max_steps=1
    )
    train(config)
    assert len(list((tmp_path / "run/validation/step_00000001").iterdir())) == 2


def test_prompts_of_the_panels_that_are_cut_are_told_at_the_start(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = tmp_path / "cases.json"
    long = {"prompt": "a cat and a mug and a fish on the beach", "image_paths": [str(world / "reference_0.png")]}
    cases.write_text(json.dumps([long]))
    config = runs.make_config(world, tmp_path / "run", validation__every=1, validation__cases=str(cases))
    with caplog.at_level("WARNING"):
        warn_of_cut_captions(config, open_run(config, continues=False))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith('validation.cases: the prompt "a cat and a mug and a fish on the beach" has ')
    assert message.endswith('beach"')


def test_panels_honour_what_their_cases_say(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"width": 16, "num_inference_steps": 3, "guidance_scale": 2.0, "image_guidance_scale": 1.5}
    pictures = ["reference_0.png", "reference_1.png"]
    entries = [
        {"prompt": "a cat and a mug", "references": [{"path": pictures[0], "strength": 0.5}, pictures[1]], **own},
        {"prompt": "a cat", "image_paths": pictures[:1]},
    ]
    path = tmp_path / "panels.json"
    for name in pictures:
        (tmp_path / name).write_bytes((world / name).read_bytes())
    path.write_text(json.dumps(entries))
    trainer = Trainer(
        runs.make_config(
            world,
            tmp_path / "run",
            validation__every=1,
            validation__cases=str(path),
            validation__seed=5,
            validation__image_guidance_scale=2,
            model__reference_position="index",
        )
    )
    seen: list[dict[str, Any]] = []
    call = MosaicFluxPipeline.__call__

    def record(self: MosaicFluxPipeline, prompt: str, references: list, **given: Any) -> Any:
        seen.append(given)
        return call(self, prompt, references, **given)

    def refuse(*_: Any) -> None:
        raise AssertionError("the pictures of panels are read and prepared once, at the start")

    monkeypatch.setattr(MosaicFluxPipeline, "__call__", record)
    for name in ("read_picture", "decode_image"):
        monkeypatch.setattr(f"mosaic.rendering.cases.pictures.{name}", refuse)
    monkeypatch.setattr("mosaic.images.PreparedReference.make", refuse)
    training.validate(trainer.pipeline, trainer.held_out, trainer.panels, trainer.config, None, lambda: False)
    assert [given["reference_strength"] for given in seen] == [[0.5, 1.0], [1.0]]
    usual = {"width": trainer.config.data.image_size[1], "image_guidance_scale": 2, "guidance_scale": 3.5}
    usual |= {"num_inference_steps": trainer.config.validation.num_inference_steps}
    assert [{name: given[name] for name in own} for given in seen] == [own, usual]
    for name in ("reference_attention", "reference_position"):
        assert {given[name] for given in seen} == {getattr(trainer.config.model, name)}
    assert [given["generator"].initial_seed() for given in seen] == [5, 6]


def test_panels_of_a_size_that_the_model_cannot_have_are_refused_before_it_is_loaded(world: Path, tmp_path: Path) -> None:
    (tmp_path / "reference_0.png").write_bytes((world / "reference_0.png").read_bytes())
    path = tmp_path / "panels.json"
    path.write_text(json.dumps([{"prompt": "a cat", "image_paths": ["reference_0.png"], "height": 18}]))
    with pytest.raises(
        ValueError, match=r"panels.json\[0\].height, width: height and width must be positive multiples of the token size 4"
    ):
        open_run(runs.make_config(world, tmp_path / "run", validation__every=1, validation__cases=str(path)), False)


def test_validation_is_reproducible_and_changes_nothing(world: Path, tmp_path: Path) -> None:
    trainer = Trainer(runs.make_config(world, tmp_path, validation__every=1))
    before = runs.values(trainer)
    found = [
        training.validate(trainer.pipeline, trainer.held_out, trainer.panels, trainer.config, tmp_path / name, lambda: False)
        for name in ("a", "b")
    ]
    assert found[0] == found[1]
    assert found[0].num_points > 0
    assert runs.files_below(tmp_path / "a") == runs.files_below(tmp_path / "b")
    runs.assert_same_tensors(runs.values(trainer), before)
    assert all(p.grad is None for p in trainer.parameters.values())


def test_averages_are_validated_and_exported_and_the_trained_weights_come_back(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(runs.make_config(world, tmp_path / "run", optimizer__ema_decay=0.2, validation__every=2))
    average, count, step = runs.values(trainer), 0, trainer.optimizer.step
    validated, trained = [], []

    def spy_step() -> None:
        nonlocal average, count
        step()
        count += 1
        decay = min(0.2, (1 + count - 1) / (10 + count - 1)) if count > 1 else 0.0
        average = {key: decay * average[key] + (1 - decay) * value for key, value in runs.values(trainer).items()}
        trained.append(runs.values(trainer))

    def spy_validate(*_: Any) -> Any:
        validated.append((runs.values(trainer), average))
        return training_accuracy

    from mosaic.method.metrics import pool_accuracies

    training_accuracy = pool_accuracies([])
    monkeypatch.setattr(trainer.optimizer, "step", spy_step)
    monkeypatch.setattr(training, "validate", spy_validate)
    path = trainer.fit()
    assert len(validated) == 3  # at the start, after step 2 and at the end
    for found, expected in validated:
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(load_file(path), average)
    folder = tmp_path / "run/checkpoints/step_00000003"
    runs.assert_same_tensors(load_file(folder / "ema.safetensors"), load_file(path))
    runs.assert_same_tensors(load_file(folder / "lora.safetensors"), trained[-1])
    runs.assert_same_tensors(runs.values(trainer), trained[-1])
    assert not torch.equal(trained[-1][next(iter(average))], average[next(iter(average))])


# ---- starting


@pytest.mark.parametrize("resume", [False, True])
def test_a_start_opens_the_data_and_the_adapter_once(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool) -> None:
    config = runs.make_config(world, tmp_path / "run", validation__every=1, validation__num_cases=1, training__max_steps=1)
    if resume:
        train(config)
        AcceleratorState._reset_state(reset_partial_state=True)
    splits, adapters, open_manifest, read = [], [], Manifest.__init__, LoraFile.__init__
    monkeypatch.setattr(Manifest, "__init__", lambda self, root, split: splits.append(split) or open_manifest(self, root, split))
    monkeypatch.setattr(LoraFile, "__init__", lambda self, path, *what: adapters.append(Path(path)) or read(self, path, *what))
    train(config.replace(training=config.training.replace(max_steps=2)), resume="auto")
    assert splits == ["train"]  # of which the held-out samples are another split
    if resume:  # the checkpoint's own, whose header is held against its state besides
        assert set(adapters) == {tmp_path / "run/checkpoints/step_00000001/lora.safetensors"}
    else:
        assert adapters == [world / "lora.safetensors"]


# ---- resuming


class Recorded:
    """Ids, steps and noise of all micro-steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple] = []

        def seen(step: int, batch: MosaicBatch, generators: list[torch.Generator]) -> None:
            self.calls.append((step, tuple(batch.ids), *(generator.initial_seed() for generator in generators)))

        runs.watch_steps(seen, patch=monkeypatch.setattr)


@pytest.mark.parametrize(("accumulation", "done"), [(1, 2), (1, 4), (2, 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, done: int
) -> None:
    """Five steps, of which an epoch has four (accumulation 1) or two."""
    recorded = Recorded(monkeypatch)
    options = {"optimizer__ema_decay": 0.9, "training__gradient_accumulation_steps": accumulation, "data__image_dropout": 0.2}
    train(runs.make_config(world, tmp_path / "whole", training__max_steps=5, **options))
    expected = recorded.calls.copy()
    recorded.calls.clear()
    train(runs.make_config(world, tmp_path / "parts", training__max_steps=done, **options))
    assert len(recorded.calls) == done * accumulation
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(1234)  # a new process
    train(runs.make_config(world, tmp_path / "parts", training__max_steps=5, **options), resume="auto")
    assert recorded.calls == expected
    assert len(set(expected)) == 5 * accumulation
    for name in ("lora", "optimizer", "ema"):
        file = f"checkpoints/step_00000005/{name}.safetensors"
        runs.assert_same_tensors(load_file(tmp_path / "parts" / file), load_file(tmp_path / "whole" / file))
    runs.assert_same_tensors(load_file(tmp_path / "parts/lora.safetensors"), load_file(tmp_path / "whole/lora.safetensors"))
    logs = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_resume_from_an_earlier_checkpoint_rewrites_the_log(world: Path, tmp_path: Path) -> None:
    config = runs.make_config(world, tmp_path / "run", training__checkpoint_every=1, training__keep_checkpoints=2)
    train(config)
    first = (tmp_path / "run/metrics.jsonl").read_text()
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss')  # killed while writing
    train(config, resume=str(tmp_path / "run/checkpoints/step_00000002"))
    assert (tmp_path / "run/metrics.jsonl").read_text() == first


def test_resume_auto_without_a_checkpoint_starts_anew(world: Path, tmp_path: Path) -> None:
    train(runs.make_config(world, tmp_path / "run", training__max_steps=1), resume="auto")
    assert (tmp_path / "run/lora.safetensors").is_file()


def test_an_average_may_start_at_a_resume(world: Path, tmp_path: Path) -> None:
    train(runs.make_config(world, tmp_path / "run", training__max_steps=1))
    trainer = Trainer(runs.make_config(world, tmp_path / "run", optimizer__ema_decay=0.9))
    trainer.resume(tmp_path / "run/checkpoints/step_00000001")
    runs.assert_same_tensors(dict(zip(trainer.parameters, trainer.ema.shadow_params, strict=True)), runs.values(trainer))
    assert all(average is not p for average, p in zip(trainer.ema.shadow_params, trainer.parameters.values(), strict=True))


def test_a_new_run_does_not_mix_with_an_earlier_one(world: Path, tmp_path: Path) -> None:
    config = runs.make_config(world, tmp_path / "run", training__max_steps=1)
    train(config)
    before = runs.files_below(tmp_path)
    with pytest.raises(
        ValueError, match=r"training\.output_dir: .*run holds checkpoints of an earlier run, up to step_00000001.*--resume auto"
    ):
        train(config)
    assert runs.files_below(tmp_path) == before


# ---- warm start


def test_an_adapter_that_cannot_serve_is_refused_before_the_base_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(MosaicFluxPipeline, "from_pretrained", lambda name, **_: loaded.append(name))
    whole, cut = runs.lora_tensors(), tmp_path / "cut.safetensors"
    cut.write_bytes((world / "lora.safetensors").read_bytes()[:-5])
    first, last = next(iter(whole)), list(whole)[-1]
    wrong = {
        "keys do not match": {key: tensor for key, tensor in whole.items() if key != last},
        "must have shape": whole | {last: whole[last][:-1]},
        "must be a matrix of float64, .* got I64": whole | {first: whole[first].long()},
        "must be a matrix of float64, .* got F32 of shape": whole | {first: whole[first][0]},
        r"lora\.rank is 3, but .* has rank 4": runs.lora_tensors(rank=4),
    }
    files = {
        message: write_reference_lora(tensors, tmp_path / f"{number}.safetensors")
        for number, (message, tensors) in enumerate(wrong.items())
    }
    for message, file in {**files, "not a safetensors file": cut}.items():
        with pytest.raises(ValueError, match=message):
            train(runs.make_config(world, tmp_path / "run", lora__pretrained=str(file)))
    assert loaded == []


def test_warm_start(world: Path, trainer: Trainer) -> None:
    runs.assert_same_tensors(runs.values(trainer), load_file(world / "lora.safetensors"))


def test_warm_start_with_another_rank_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora\.rank is 5, but .*lora\.safetensors has rank 3\. Set lora\.rank=3, or lora\.resize=true"):
        train(runs.make_config(world, tmp_path / "run", lora__rank=5))
    assert not (tmp_path / "run").exists()
