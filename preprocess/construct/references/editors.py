"""What makes a reference of a cut-out: pipelines of diffusers that edit pictures, or nothing."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from PIL import Image

from mosaic.config.schema import FieldError
from mosaic.images import WHITE
from mosaic.weights.frozen import call_loader
from preprocess.construct.pipelines import call_arguments, load_pipeline, pipeline_provenance
from preprocess.construct.references.settings import ReferencesSettings


class Editor(Protocol):
    """Edits cut-outs.

    Attributes:
        provenance: Its model and what it depends on, as JSON values.
        tries: Edits of a cut-out that can differ, at most; None: any number.
    """

    provenance: dict[str, Any]
    tries: int | None

    def edit(self, cut_outs: Sequence[Image.Image], instructions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One RGB picture of `references.size` for each cut-out on white of that size, its instruction and its seed."""


class CutOuts:
    """The editor "none"."""

    tries: int | None = 1

    def __init__(self) -> None:
        self.provenance: dict[str, Any] = {}

    def edit(self, cut_outs: Sequence[Image.Image], instructions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """The cut-outs themselves."""
        return list(cut_outs)


class EditorKind(NamedTuple):
    """What differs between the pipelines.

    Attributes:
        pipeline: The name of its class in diffusers.
        together: Whether one call edits several cut-outs; else a list of pictures is several views of one.
        arguments: What is passed beside the usual, from height and width.
    """

    pipeline: str
    together: bool
    arguments: Callable[[int, int], dict[str, Any]]


KINDS = {
    # Without these the input is brought to one of 17 sizes of about a megapixel, and the output to exactly one.
    "kontext": EditorKind("FluxKontextPipeline", True, lambda height, width: {"max_area": height * width, "_auto_resize": False}),
    "flux2-klein": EditorKind("Flux2KleinPipeline", False, lambda height, width: {}),
    "qwen-image-edit": EditorKind("QwenImageEditPlusPipeline", False, lambda height, width: {}),
}


class PipelineEditor:
    """A pipeline of diffusers."""

    tries: int | None = None

    def __init__(self, pipeline: Any, kind: EditorKind, settings: ReferencesSettings, provenance: dict[str, Any]) -> None:
        """Take what is loaded.

        Raises:
            FieldError: The pipeline does not take an argument that the settings have.
        """
        self.pipeline, self.kind, self.settings, self.provenance = pipeline, kind, settings, provenance
        self.arguments = call_arguments(pipeline, settings)

    def edit(self, cut_outs: Sequence[Image.Image], instructions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Noise is drawn on the CPU, of each edit by its own seed.

        Raises:
            FieldError: The pipeline makes pictures of another size than it was asked for.
        """
        if self.kind.together:
            return self._call(list(cut_outs), list(instructions), list(seeds))
        return [self._call([one], [text], [seed])[0] for one, text, seed in zip(cut_outs, instructions, seeds, strict=True)]

    def _call(self, cut_outs: list[Image.Image], instructions: list[str], seeds: list[int]) -> list[Image.Image]:
        height, width = self.settings.size
        arguments = dict(self.arguments)
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(instructions)
        pictures = self.pipeline(
            image=cut_outs,
            prompt=instructions,
            height=height,
            width=width,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            **self.kind.arguments(height, width),
            **arguments,
        ).images
        for picture in pictures:
            if (picture.width, picture.height) != (width, height):
                raise FieldError(
                    "references.size",
                    f"must be a size that {type(self.pipeline).__name__} makes; asked for {height} x {width}, it gave "
                    f"{picture.height} x {picture.width}",
                )
        return [picture.convert("RGB") for picture in pictures]


def fit(cut_out: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A cut-out in the middle of a white picture of a height and a width, as large as it fits (Lanczos); nothing is stretched."""
    height, width = size
    scale = min(width / cut_out.width, height / cut_out.height)
    inner = max(1, min(width, round(cut_out.width * scale))), max(1, min(height, round(cut_out.height * scale)))
    canvas = Image.new("RGB", (width, height), WHITE)
    resized = cut_out if inner == cut_out.size else cut_out.resize(inner, Image.Resampling.LANCZOS)
    canvas.paste(resized, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def load_editor(settings: ReferencesSettings, device: torch.device, dtype: torch.dtype) -> Editor:
    """Load the editor that a section names.

    Raises:
        FileNotFoundError, ValueError: Its model cannot be had, is of another class, or does not take what the settings have.
    """
    import diffusers

    if settings.editor == "none":
        return CutOuts()
    kind = KINDS[settings.editor or editor_of(settings)]
    pipeline = load_pipeline(getattr(diffusers, kind.pipeline), settings, device, dtype)
    return PipelineEditor(pipeline, kind, settings, pipeline_provenance(pipeline, settings, dtype))


def editor_of(settings: ReferencesSettings) -> str:
    """The editor whose class the model's index names.

    Raises:
        FileNotFoundError, ValueError: It cannot be had.
        FieldError: It is none of the classes.
    """
    revision = {"revision": settings.revision} if settings.revision is not None else {}
    named = call_loader(_Index, settings.model, "references.model", **revision)
    for name, kind in KINDS.items():
        if kind.pipeline == named:
            return name
    known = ", ".join(kind.pipeline for kind in KINDS.values())
    raise FieldError(
        "references.editor", f"must be given: {settings.model} is a {named}, none of {known}; one of {', '.join(KINDS)} may fit its weights"
    )


class _Index:
    """The model_index.json of a pipeline."""

    @staticmethod
    def from_pretrained(name: str, **arguments: Any) -> str:
        """The name of its class."""
        from diffusers import DiffusionPipeline

        return str(cast(Any, DiffusionPipeline).load_config(name, **arguments)["_class_name"])
