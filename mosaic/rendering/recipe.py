"""The recipe of a picture: everything that decides it, with a digest; it travels in the PNG and in the manifest."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from mosaic.pipeline.options import ResolvedOptions

KEY = "mosaic"  # of the PNG text that holds a recipe
NOT_DECIDING = ("name", "index", "versions")
OWN_OPTIONS = ("height", "width", "num_inference_steps", "guidance_scale", "image_guidance_scale")  # that a case may decide
RUN_OPTIONS = ("reference_size", "reference_scale", "reference_attention", "reference_cache", "refresh_references")

LATER_OPTIONS = {"reference_position": "width"}  # with what older pictures have, which recipes leave out: their digests stay


@dataclass(frozen=True)
class Weights:
    """Weights of a model or of a reference LoRA: their public name, and the digest of their content."""

    name: str
    digest: str


@dataclass(frozen=True)
class StyleWeights(Weights):
    """Weights of a style LoRA: public name, digest of the content, and the factor on its change of the base weights."""

    scale: float


@dataclass(frozen=True)
class ReferenceEntry:
    """A reference picture: name of its file, its name in the prompt (None: it has none), strength, and the SHA-256 of the file."""

    file: str
    name: str | None
    strength: float
    sha256: str


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """What all pictures of a run have in common beside their options; the fields are keys of the JSON, in its order.

    Attributes:
        dtype: `model.dtype`.
        model: The base model.
        lora: The reference LoRA; None: there is none.
        style_lora: The style LoRA; None: there is none.
        device: Type of the device, such as "cpu".
        num_threads, compile, attention_backend, step_cache, step_cache_threshold: Of `inference`.
        batch_size: The most of a batch: smaller ones, the last or those tried one by one, differ in last bits.
        storage: Formats in which the models lie in memory.
        versions: Of the packages; they do not decide.
    """

    dtype: str
    model: Weights
    lora: Weights | None
    style_lora: StyleWeights | None
    device: str
    num_threads: int
    batch_size: int
    compile: bool
    attention_backend: str | None
    step_cache: str
    step_cache_threshold: float | None
    storage: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes one picture.

    Attributes:
        name: Beginning of the names of its files.
        index: Of its case.
        prompt: As the model sees it.
        seed: Of the start noise.
        options: What the sampler is told.
        references: The reference pictures.
        run: What it has in common with the other pictures of a run.
    """

    name: str
    index: int
    prompt: str
    seed: int
    options: ResolvedOptions
    references: tuple[ReferenceEntry, ...]
    run: RunRecipe

    @property
    def strengths(self) -> list[float]:
        """One per reference."""
        return [reference.strength for reference in self.references]

    @property
    def labels(self) -> list[str]:
        """Name, or name of the file, of every reference."""
        return [reference.name or Path(reference.file).stem for reference in self.references]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what decides the picture: names of files, models and references, and versions of packages do not."""
        deciding = {key: value for key, value in self._values().items() if key not in NOT_DECIDING}
        deciding["references"] = [{"strength": reference.strength, "sha256": reference.sha256} for reference in self.references]
        run = self.run
        deciding["model"], deciding["lora"] = run.model.digest, run.lora and run.lora.digest
        deciding["style_lora"] = run.style_lora and {"digest": run.style_lora.digest, "scale": run.style_lora.scale}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True, allow_nan=False).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The recipe as it stands in PNGs and manifests: keys in their order, values ready for JSON."""
        return {**self._values(), "digest": self.digest}

    def _values(self) -> dict[str, Any]:
        options = self.options.arguments
        return {
            **{key: getattr(self, key) for key in ("name", "index", "prompt", "seed")},
            **{key: options[key] for key in OWN_OPTIONS},
            "references": [asdict(reference) for reference in self.references],
            **{key: options[key] for key in RUN_OPTIONS},
            **{key: options[key] for key, usual in LATER_OPTIONS.items() if options[key] != usual},
            "text_length": options["max_sequence_length"],
            **asdict(self.run),
        }


def png_text(recipe: Recipe) -> dict[str, str]:
    """The recipe as text for a PNG."""
    return {KEY: json.dumps(recipe.to_json(), ensure_ascii=False, allow_nan=False)}


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The recipe that a PNG carries, whoever wrote it; None where there is no such file, it is damaged, or carries none."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            assert isinstance(picture, PngImageFile)
            picture.load()
            recipe = json.loads(picture.text[KEY])
    except (OSError, ValueError, KeyError, SyntaxError, RecursionError, Image.DecompressionBombError):
        return None
    return recipe if isinstance(recipe, dict) else None


def has_digest(path: Path, digest: str) -> bool:
    """Whether a PNG is whole, and carries the recipe of that digest."""
    recipe = read_recipe(path)
    return recipe is not None and recipe.get("digest") == digest
