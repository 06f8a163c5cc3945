"""Recipes for tests."""

import dataclasses
from typing import Any

from mosaic.pipeline.options import ResolvedOptions
from mosaic.rendering.recipe import Recipe, ReferenceEntry, RunRecipe, Weights

RUN = RunRecipe(
    dtype="float32",
    model=Weights("model", "0" * 64),
    lora=Weights("lora.safetensors", "1" * 64),
    style_lora=None,
    device="cpu",
    num_threads=1,
    batch_size=1,
    compile=False,
    attention_backend=None,
    step_cache="none",
    step_cache_threshold=None,
    storage={"transformer": "none", "text_encoder_2": "none", "vae_tiling": False},
    versions={"torch": "2"},
)
OPTIONS = ResolvedOptions(
    height=16,
    width=32,
    num_inference_steps=3,
    reference_size=32,
    reference_scale=1.0,
    reference_attention="target",
    reference_position="width",
    max_sequence_length=24,
)


def make_recipe(name: str = "case_000", **changes: Any) -> Recipe:
    """A recipe with these fields, or fields of its options, in place of the usual ones."""
    own = {field.name for field in dataclasses.fields(Recipe)}
    options = dataclasses.replace(OPTIONS, **{key: value for key, value in changes.items() if key not in own})
    usual: dict[str, Any] = {"index": 0, "prompt": "a cat", "seed": 1, "options": options, "references": (), "run": RUN}
    return Recipe(name=name, **usual | {key: value for key, value in changes.items() if key in own})


def entry(file: str = "picture.png", name: str | None = None, strength: float = 1.0) -> ReferenceEntry:
    """A reference of a recipe."""
    return ReferenceEntry(file, name, strength, "2" * 64)
