"""Models that turn pictures and texts into embeddings, of transformers' classes, with the preparation of pictures that protocols fix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Model,
    PreTrainedModel,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipModel,
    ViTModel,
)

from mosaic.evaluation.pixels import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, Preparation, Squeeze
from mosaic.weights.components import component_revision
from mosaic.weights.frozen import call_loader


@dataclass(frozen=True)
class Provenance:
    """What a value was measured with.

    Attributes:
        model: Hub id, or the name of a folder.
        revision: Commit, or SHA-256 of the files.
        preprocessing: What is done to a picture, in words.
    """

    model: str
    revision: str
    preprocessing: str


class ImageEncoder(Protocol):
    """Pictures as vectors whose cosine says how alike they are."""

    provenance: Provenance

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings [N, D] of length 1, float32, on the CPU, of RGB pictures of any sizes."""


class TextEncoder(Protocol):
    """Texts as vectors whose cosine with a picture's says how well they fit."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [N, D] of length 1, float32, on the CPU; what a model does not read of a long text is cut."""


class PictureText(Protocol):
    """Says how well a text fits a picture."""

    provenance: Provenance

    def fit(self, picture: Image.Image, text: str) -> float:
        """The larger, the better; on the model's own scale."""


class ClipEncoder:
    """CLIP, pictures and texts in one space: OpenAI's ViT-B/32 in DreamBench."""

    def __init__(self, name: str, flag: str = "--clip", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load the model.

        Raises:
            FileNotFoundError, ValueError: It cannot be had, or is of another architecture.
        """
        self.model = load_encoder(CLIPModel, name, flag, device, dtype, "clip")
        self.tokenizer = call_loader(CLIPTokenizer, name, flag)
        side = self.model.config.vision_config.image_size
        self.prepare = Preparation(side, side, CLIP_MEAN, CLIP_STD)
        self.provenance = provenance_of(self.model, name, self.prepare)

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Projected embeddings."""
        pixels = self.prepare(pictures).to(self.model.device, self.model.dtype)
        return unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Projected embeddings; texts are cut at the model's 77 tokens."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt").to(self.model.device)
        return unit(self.model.get_text_features(**tokens).pooler_output)

    def fit(self, picture: Image.Image, text: str) -> float:
        """The cosine."""
        return float(self.images([picture])[0] @ self.texts([text])[0])


class SiglipFit:
    """SigLIP, or SigLIP 2 of one size or of any (NaFlex): how probable it is that a text belongs to a picture."""

    def __init__(self, name: str, flag: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load the model.

        Raises:
            FileNotFoundError, ValueError: It cannot be had, or is of another architecture.
        """
        self.flexible = call_loader(AutoConfig, name, flag).model_type == "siglip2"
        self.model = load_encoder(Siglip2Model if self.flexible else SiglipModel, name, flag, device, dtype, "siglip", "siglip2")
        self.tokenizer = call_loader(AutoTokenizer, name, flag)
        if self.flexible:
            self.prepare: Any = call_loader(Siglip2ImageProcessorPil, name, flag)
            patches = f"Siglip2ImageProcessorPil, {self.prepare.max_num_patches} patches of {self.prepare.patch_size}"
        else:
            self.prepare = Squeeze(self.model.config.vision_config.image_size, HALF, HALF)
            patches = str(self.prepare)
        self.provenance = provenance_of(self.model, name, patches)

    @torch.inference_mode()
    def fit(self, picture: Image.Image, text: str) -> float:
        """The sigmoid of the logit. Texts are small letters, padded and cut to the model's length, as it was trained."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([text.lower()], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        pixels = dict(self.prepare(picture, return_tensors="pt")) if self.flexible else {"pixel_values": self.prepare([picture])}
        pixels["pixel_values"] = pixels["pixel_values"].to(self.model.dtype)
        pixels = {key: value.to(self.model.device) for key, value in pixels.items()}
        return float(self.model(input_ids=tokens["input_ids"].to(self.model.device), **pixels).logits_per_image[0, 0].float().sigmoid())


def load_picture_text(name: str, flag: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> PictureText:
    """Load a CLIP or a SigLIP of a folder or a hub id; its config says which it is.

    Raises:
        FileNotFoundError, ValueError: It cannot be had, or is none of them.
    """
    return class_of({"clip": ClipEncoder, "siglip": SiglipFit, "siglip2": SiglipFit}, name, flag)(name, flag, device, dtype)


class DinoEncoder:
    """DINO's first version, a ViT: its class token after the last norm; dino_vits16 in DreamBench."""

    def __init__(self, name: str, flag: str = "--dino", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load the model.

        Raises:
            FileNotFoundError, ValueError: It cannot be had, or is of another architecture.
        """
        self.model = load_encoder(ViTModel, name, flag, device, dtype, "vit", add_pooling_layer=False)
        side = self.model.config.image_size
        self.prepare = Preparation(round(side * 256 / 224), side, IMAGENET_MEAN, IMAGENET_STD)
        self.provenance = provenance_of(self.model, name, self.prepare)

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Class tokens."""
        pixels = self.prepare(pictures).to(self.model.device, self.model.dtype)
        return unit(self.model(pixel_values=pixels).last_hidden_state[:, 0])


class Dinov2Encoder:
    """DINO's second version: its class token after the last norm, prepared as for the first one."""

    def __init__(self, name: str, flag: str = "--dinov2", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load the model.

        Raises:
            FileNotFoundError, ValueError: It cannot be had, or is of another architecture.
        """
        self.model = load_encoder(Dinov2Model, name, flag, device, dtype, "dinov2")
        self.prepare = Preparation(256, 224, IMAGENET_MEAN, IMAGENET_STD)
        self.provenance = provenance_of(self.model, name, self.prepare)

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Class tokens."""
        pixels = self.prepare(pictures).to(self.model.device, self.model.dtype)
        return unit(self.model(pixel_values=pixels).last_hidden_state[:, 0])


def load_image_encoder(name: str, flag: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ImageEncoder:
    """Load a CLIP, DINO or DINOv2 of a folder or a hub id; its config says which it is.

    Raises:
        FileNotFoundError, ValueError: It cannot be had, or is none of them.
    """
    return class_of({"clip": ClipEncoder, "vit": DinoEncoder, "dinov2": Dinov2Encoder}, name, flag)(name, flag, device, dtype)


def class_of(kinds: Mapping[str, Any], name: str, flag: str) -> Any:
    """The class for the type that a model's config states.

    Raises:
        FileNotFoundError, ValueError: There is no such model, or it is of none of these types.
    """
    kind = call_loader(AutoConfig, name, flag).model_type
    if kind not in kinds:
        raise ValueError(f"{flag}: {name} must be a model of one of the types {', '.join(kinds)}, got one of the type {kind}.")
    return kinds[kind]


def unit(embeddings: Tensor) -> Tensor:
    """Vectors [N, D] at length 1, in float32, on the CPU; those that are no numbers stay what they are."""
    return F.normalize(embeddings.float(), dim=-1).cpu()


def load_encoder(cls: Any, name: str, flag: str, device: torch.device | str, dtype: torch.dtype, *kinds: str, **arguments: Any) -> Any:
    """Load a frozen model of transformers whose config says that it is of one of some kinds.

    Weights without safetensors, as some of these models have them on the hub, are read without unpickling objects.

    Raises:
        FileNotFoundError: `name` is neither a folder nor a hub id.
        ValueError: It cannot be had, is of another kind, or lacks weights that the class has.
    """
    config = call_loader(AutoConfig, name, flag)
    if config.model_type not in kinds:
        raise ValueError(
            f"{flag}: {name} must be a model of the type {kinds[0]} ({cls.__name__}), got one of the type {config.model_type}."
        )
    model, loaded = call_loader(cls, name, flag, dtype=dtype, output_loading_info=True, **arguments)
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise ValueError(
            f"{flag}: {name} lacks {missing[0]} ({len(missing)} such weights), which {cls.__name__} has. Name a complete model."
        )
    return model.to(device).eval().requires_grad_(False)


def provenance_of(model: PreTrainedModel, name: str, preprocessing: object) -> Provenance:
    """Provenance of a loaded model: the commit of a hub id, else a digest of the folder's files."""
    folder = Path(name)
    if folder.is_dir():
        return Provenance(folder.resolve().name, component_revision(folder), str(preprocessing))
    return Provenance(name, str(model.config._commit_hash), str(preprocessing))
