"""Tiny models of the real classes and file layouts, and pictures to score."""

import functools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from tests.tiny import tokenizers

PROMPTS = ("a cat and a mug", "a mug in the snow")


def write_clip(folder: Path, image_size: int = 32) -> Path:
    """A random CLIP with its tokenizer."""
    tokenizer = tokenizers()[0]
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": image_size}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 8}, projection_dim=12))
    return _write(model, folder, tokenizer)


def write_dino(folder: Path, image_size: int = 32) -> Path:
    """A random ViT, as DINO's first version is one."""
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": image_size}
    return _write(ViTModel(ViTConfig(**shape, patch_size=8), add_pooling_layer=False), folder)


def _write(model: torch.nn.Module, folder: Path, tokenizer: object = None) -> Path:
    for parameter in model.parameters():  # the initial weights hardly tell pictures apart
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def picture(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    """Soft coloured blobs."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_benchmark(folder: Path, sizes: tuple[tuple[int, int], ...] = ((40, 40), (37, 52))) -> Path:
    """DreamBench in small: two subjects alone and together, two runs; returns the file of lines."""
    for subject, count in (("cat", 3), ("mug", 2), ("can", 1)):
        (folder / "subjects" / subject).mkdir(parents=True)
        for number in range(count):
            picture(hash_of(subject, number), *sizes[number % len(sizes)]).save(folder / "subjects" / subject / f"{number:02d}.png")
    lines = []
    for number, (subjects, prompt) in enumerate(
        [(("cat",), PROMPTS[1]), (("cat",), PROMPTS[0]), (("mug",), PROMPTS[1]), (("cat", "mug"), PROMPTS[0])]
    ):
        for run in range(2):
            name = f"{number}_{run}.png"
            picture(100 + 10 * number + run, *sizes[run]).save(folder / name)
            lines.append({"picture": name, "prompt": prompt, "run": run, "subjects": [f"subjects/{subject}" for subject in subjects]})
    return write_lines(folder / "pictures.jsonl", lines)


def write_lines(path: Path, lines: list[dict]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict]:
    """What `write_lines` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def hash_of(subject: str, number: int) -> int:
    """A seed."""
    return sum(map(ord, subject)) * 10 + number
