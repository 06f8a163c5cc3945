"""A tiny model folder, data set, adapter file and config on disk, for tests of training, inference and the commands."""

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mosaic.config.loading import Config, from_dict
from mosaic.data import DatasetWriter, MosaicBatch, ReferenceRecord, SampleRecord, collate
from mosaic.lora.adapter import reference_lora_modules, write_reference_lora
from mosaic.method.losses import MosaicLoss
from mosaic.training import Trainer
from mosaic.training import trainer as training
from mosaic.training.objective import draw_inputs, sample_generators, train_step
from tests import tiny

IMAGE_SIZE = (16, 24)  # px, height and width: 4 x 6 tokens of 4 px
REFERENCE_SIZE = 12  # px: 3 x 3 tokens
NUM_REFERENCES = (2, 1, 2, 2, 1, 2, 2, 1, 2)  # K of the training samples: batches of 2 make 4 per epoch
HELD_OUT = (2, 1, 2, 1)
RANK = 3
ASPECT_SIZES = ((16, 16), (16, 32), (32, 16))  # px; tokens of 4 px


def write_model(folder: Path) -> Path:
    """A stock diffusers FLUX folder with random weights."""
    tiny.build_stock_pipeline(guidance_embeds=False).save_pretrained(folder)
    return folder


def write_gguf(model: Path, path: Path, kind: str = "Q8_0") -> Path:
    """The transformer of a model folder as a GGUF file, matrices of the blocks quantised; needs the package gguf."""
    import gguf

    quantized = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in load_file(model / "transformer/diffusion_pytorch_model.safetensors").items():
        array = tensor.numpy()
        if "blocks." in name and array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def lora_tensors(rank: int = RANK, seed: int = 5) -> dict[str, Tensor]:
    """A random adapter for the tiny model, A and B not zero."""
    transformer = tiny.build_transformer(False, stock=True, num_layers=1, num_single_layers=1)
    return tiny.random_lora_file(tiny.linear_shapes(transformer, reference_lora_modules(transformer)), rank, seed)


def write_lora(path: Path, rank: int = RANK, seed: int = 5) -> Path:
    """A random adapter file."""
    return write_reference_lora(lora_tensors(rank, seed), path)


def _sample(index: int, split: str, num_references: int) -> SampleRecord:
    """Random colours; reference k owns the k-th part of the target's columns; points on grids of 2 px."""
    rng = np.random.default_rng([index, num_references])
    rows, columns = IMAGE_SIZE[0] // 2, IMAGE_SIZE[1] // 2
    side = REFERENCE_SIZE // 2
    references = []
    for k in range(num_references):
        v = [row * columns + column for row in range(rows) for column in range(columns) if column * num_references // columns == k]
        v = rng.choice(v, size=12, replace=False)
        picture = np.full((REFERENCE_SIZE, REFERENCE_SIZE, 3), 255, np.uint8)
        picture[1:-1, 1:-1] = rng.integers(0, 200, (REFERENCE_SIZE - 2, REFERENCE_SIZE - 2, 3))
        points = np.stack([rng.integers(0, side * side, len(v)), v], axis=1)
        references.append(ReferenceRecord(Image.fromarray(picture), "cat", points))
    target = Image.fromarray(rng.integers(0, 256, (*IMAGE_SIZE, 3), dtype=np.uint8))
    prompt = ("a cat and a mug", "two fish on the beach")[index % 2]
    return SampleRecord(f"{split}-{index}", split, prompt, target, references, (side, side), (rows, columns))


def write_dataset(root: Path) -> Path:
    """Nine training and four held-out samples of one or two references."""
    with DatasetWriter(root) as writer:
        for split, counts in (("train", NUM_REFERENCES), ("heldout", HELD_OUT)):
            for index, num_references in enumerate(counts):
                writer.add(_sample(index, split, num_references))
    return root


def write_aspects(root: Path) -> Path:
    """Nine training and nine held-out samples of one reference, with targets of three aspects."""
    with DatasetWriter(root) as writer:
        for split in ("train", "heldout"):
            for index in range(9):
                rng = np.random.default_rng([index, split == "train"])
                height, width = ASPECT_SIZES[index % 3]
                grid = (height // 2, width // 2)
                v = rng.permutation(grid[0] * grid[1])[:20]
                points = np.stack([rng.integers(0, 36, 20), v], axis=1)
                reference = ReferenceRecord(Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)), "cat", points)
                target = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
                writer.add(SampleRecord(f"{split}-{index}", split, "a cat and a mug", target, [reference], (6, 6), grid))
    return root


def settings(world: Path, output: Path) -> dict[str, Any]:
    """A config as JSON for `world`, the folder with model, data set and adapter: float32, without dropout and validation."""
    return {
        "model": {
            "pretrained": str(world / "model"),
            "dtype": "float32",
            "text_length": tiny.TEXT_LENGTH,
            "gradient_checkpointing": "none",
        },
        "lora": {"rank": RANK, "pretrained": str(world / "lora.safetensors")},
        "data": {
            "root": str(world / "data"),
            "image_size": list(IMAGE_SIZE),
            "reference_size": REFERENCE_SIZE,
            "num_workers": 0,
            "image_dropout": 0,
            "text_dropout": 0,
            "both_dropout": 0,
        },
        "optimizer": {"learning_rate": 1e-2},
        "training": {"max_steps": 3, "batch_size": 2, "mixed_precision": "no", "output_dir": str(output), "log_every": 1},
        "validation": {"every": None, "num_cases": 2, "num_inference_steps": 2},
        "inference": {
            "cases": str(world / "cases.json"),
            "output_dir": str(output),
            "lora": str(world / "lora.safetensors"),
            "height": IMAGE_SIZE[0],
            "width": IMAGE_SIZE[1],
            "num_inference_steps": 2,
        },
    }


def make_config(world: Path, output: Path, **changes: Any) -> Config:
    """`settings` as a config; a change is named `section__field`."""
    values = settings(world, output)
    for name, value in changes.items():
        section, field = name.split("__")
        values.setdefault(section, {})[field] = value
    return from_dict(values)


def write_world(folder: Path) -> Path:
    """Model, adapter, data set and a cases file in one folder."""
    write_model(folder / "model")
    write_lora(folder / "lora.safetensors")
    write_dataset(folder / "data")
    pictures = []
    for index in range(3):
        tiny.picture(index).save(folder / f"reference_{index}.png")
        pictures.append(f"reference_{index}.png")
    cases = [
        {"index": 7, "prompt": "a cat on the beach", "image_paths": pictures[:1]},
        {"index": 2, "prompt": "a cat and a mug", "image_paths": pictures[1:]},
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def count_made(kind: type, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the first argument, as text, of each object of a class that is made from now on."""
    made: list[str] = []
    begin = kind.__init__

    def spy(self: Any, first: Any, *arguments: Any, **settings: Any) -> None:
        made.append(str(first))
        begin(self, first, *arguments, **settings)

    monkeypatch.setattr(kind, "__init__", spy)
    return made


def samples_of(trainer: Trainer, num_references: int, count: int) -> MosaicBatch:
    indices = [i for i, k in enumerate(trainer.dataset.num_references) if k == num_references][:count]
    return collate([trainer.dataset[i] for i in indices])


def step_loss(trainer: Trainer, batch: MosaicBatch, seed: int = 0, first_index: int = 0) -> MosaicLoss:
    """The loss of a batch at the trainer's step, its samples drawn from `seed` and their global indices."""
    generators = sample_generators(seed, first_index, len(batch.ids))
    inputs = draw_inputs(trainer.pipeline.encoders, batch, trainer.config, generators, torch.device("cpu"))
    return train_step(trainer.transformer, *inputs, trainer.config.loss, trainer.step, trainer.call)


def watch_steps(
    seen: Callable[[int, MosaicBatch, list[torch.Generator]], None],
    change: Callable[[int, MosaicLoss], MosaicLoss] = lambda _, loss: loss,
    patch: Callable[[Any, str, Any], None] = setattr,
) -> None:
    """Have `seen` called with step, batch and generators before the loss of every micro-step, and `change` with step and loss after it."""
    draw, loss_of, given = training.draw_inputs, training.train_step, []

    def spy_on_inputs(*arguments: Any, **named: Any) -> Any:
        bound = inspect.signature(draw).bind(*arguments, **named).arguments
        given[:] = bound["batch"], bound["generators"]
        return draw(*arguments, **named)

    def spy_on_step(*arguments: Any, **named: Any) -> MosaicLoss:
        step = inspect.signature(loss_of).bind(*arguments, **named).arguments["step"]
        seen(step, *given)
        return change(step, loss_of(*arguments, **named))

    patch(training, "draw_inputs", spy_on_inputs)
    patch(training, "train_step", spy_on_step)


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in trainer.parameters.items()}


def values(trainer: Trainer) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in trainer.parameters.items()}


def captured_gradients(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The gradients that each optimizer step gets to see."""
    seen, step = [], trainer.optimizer.step

    def spy() -> None:
        seen.append(gradients(trainer))
        step()

    monkeypatch.setattr(trainer.optimizer, "step", spy)
    return seen


def captured_inputs(trainer: Trainer) -> list[dict[str, Any]]:
    """The keyword arguments that each call of the transformer gets."""
    calls: list[dict[str, Any]] = []
    trainer.pipeline.transformer.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def total_norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
