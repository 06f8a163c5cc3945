"""What the transformer reads besides noise: prompts as embeddings, pictures as latents.

A pipeline has one object for it, `pipeline.encoders`. It encodes when asked (`LiveEncoders`), remembers what neighbouring pictures share
(`RememberedEncoders`), or holds prompts that were encoded before the text encoders left (`GivenPrompts`).
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mosaic.devices import to_device
from mosaic.files import shown
from mosaic.pipeline.flux import FluxPipeline
from mosaic.pipeline.latents import encode_images, images_to_tensor
from mosaic.pipeline.prompt_lengths import TextWindow

logger = logging.getLogger(__name__)


class PromptEmbeddings(NamedTuple):
    """Embeddings of B prompts.

    Attributes:
        prompt_embeds: [B, T, d], of T5.
        pooled: [B, d_pooled], of CLIP.
    """

    prompt_embeds: Tensor
    pooled: Tensor


class Encoders(ABC):
    """Prompts and pictures to embeddings and latents."""

    @property
    @abstractmethod
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> PromptEmbeddings:
        """Embeddings of B prompts.

        Args:
            prompts: B texts; an empty one is the dropped prompt of training.
            max_sequence_length: T, the number of T5 tokens.
        """

    @abstractmethod
    def encode_images(self, images: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Shifted and scaled VAE latents [B, C, h, w] of pictures [B, 3, H, W] in [-1, 1].

        Args:
            images: On any device, in any floating dtype.
            generator: Draws a posterior sample, one for all or one per picture; None takes the posterior mode.
        """

    def encode_references(self, references: Sequence[Sequence[Image.Image]]) -> list[Tensor | None]:
        """Latents of the references of every prompt of a call.

        Args:
            references: Per prompt its prepared pictures, all of one size, maybe none.

        Returns:
            Per prompt [K, C, h, w], the posterior's mode; None where it has no references.
        """
        return [self.encode_images(images_to_tensor(pictures)) if pictures else None for pictures in references]


class LiveEncoders(Encoders):
    """The VAE and the text encoders of a pipeline."""

    def __init__(
        self, pipeline: FluxPipeline, vae_scale_factor: int | None = None, warns: bool = False, device: torch.device | None = None
    ) -> None:
        """Keep the pipeline; nothing is encoded.

        Args:
            pipeline: Whose models encode.
            vae_scale_factor: Pixels per latent cell of the model, for a pipeline whose VAE was left out. None: as its VAE says.
            warns: Whether to warn of prompts that are cut. The commands say it before they begin, and not in their progress bars.
            device: Where the models stay. None: what the pipeline's offload hooks say, for which each call goes over all its modules.
        """
        self._pipeline, self._vae_scale_factor, self._warns, self._device = pipeline, vae_scale_factor, warns, device

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell."""
        return self._vae_scale_factor or self._pipeline.vae_scale_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> PromptEmbeddings:
        """Encode prompts, as `FluxPipeline.encode_prompt` does."""
        if self._warns:
            for prompt, lost in TextWindow.of_tokenizer(self._pipeline.tokenizer_2, max_sequence_length).all_lost(prompts):
                logger.warning("prompt %s %s", shown(prompt), lost)
        device = self._device or self._pipeline._execution_device
        with _silent_libraries():
            embeds, pooled, _ = self._pipeline.encode_prompt(prompt=list(prompts), device=device, max_sequence_length=max_sequence_length)
        return PromptEmbeddings(embeds, pooled)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Encode pictures in the VAE's dtype (Eq. 3)."""
        vae = self._pipeline.vae
        images = to_device(images, self._device or self._pipeline._execution_device)
        return encode_images(vae, images.to(vae.dtype), generator)


class GivenPrompts(Encoders):
    """Embeddings of known prompts in CPU memory (4 MiB each with FLUX.1), for a pipeline without text encoders."""

    def __init__(self, encoders: Encoders, known: Mapping[tuple[str, int], PromptEmbeddings]) -> None:
        """Keep the embeddings.

        Args:
            encoders: Encode pictures.
            known: By prompt and number of T5 tokens, as of `encode_each`.
        """
        self._encoders, self._known = encoders, known

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell."""
        return self._encoders.vae_scale_factor

    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> PromptEmbeddings:
        """Look prompts up.

        Raises:
            ValueError: One is not there.
        """
        missing = [prompt for prompt in prompts if (prompt, max_sequence_length) not in self._known]
        if missing:
            raise ValueError(f"the text encoders have left, and this prompt was not encoded before: {missing[0][:100]!r}.")
        found = [self._known[prompt, max_sequence_length] for prompt in prompts]
        return PromptEmbeddings(*(torch.cat(part) for part in zip(*found, strict=True)))

    def encode_images(self, images: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Encode pictures."""
        return self._encoders.encode_images(images, generator)


def encode_each(encoders: Encoders, prompts: Iterable[str], max_sequence_length: int) -> dict[tuple[str, int], PromptEmbeddings]:
    """Embeddings on the CPU of distinct prompts, one at a time, as a picture's own call would have them.

    Args:
        encoders: With their text encoders.
        prompts: Any number; each is encoded once.
        max_sequence_length: T5 tokens.
    """
    known = {}
    for prompt in dict.fromkeys(prompts):
        found = encoders.encode_prompts([prompt], max_sequence_length)
        known[prompt, max_sequence_length] = PromptEmbeddings(found.prompt_embeds.cpu(), found.pooled.cpu())
    return known


class RememberedEncoders(Encoders):
    """Takes over what the call before encoded from the same prompts and pictures.

    The tensors are the very ones that would be computed again, so that no picture changes. Only those of the last call are kept.
    """

    def __init__(self, encoders: Encoders) -> None:
        """Begin with nothing.

        Args:
            encoders: Encode what is new.
        """
        self._encoders = encoders
        # The prompts of a call are one key: the last bits of an embedding may depend on how many are encoded at once.
        self._prompts: tuple[tuple[tuple[str, ...], int], PromptEmbeddings] | None = None
        self._references: dict[str, Tensor] = {}

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell."""
        return self._encoders.vae_scale_factor

    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> PromptEmbeddings:
        """Encode prompts, unless the call before had the same."""
        key = (tuple(prompts), max_sequence_length)
        if self._prompts is None or self._prompts[0] != key:
            self._prompts = None  # old and new ones need not be in memory at once
            self._prompts = key, self._encoders.encode_prompts(prompts, max_sequence_length)
        return self._prompts[1]

    def encode_references(self, references: Sequence[Sequence[Image.Image]]) -> list[Tensor | None]:
        """Encode the references of those prompts whose pictures the call before did not have; equal ones of a call once."""
        # What this call does not use is forgotten; what it uses comes over from the call before.
        before, self._references = self._references, {}
        latents: list[Tensor | None] = []
        for pictures in references:
            if not pictures:
                latents.append(None)
                continue
            # By pixels, not by file: different files may give equal prepared pictures.
            key = _pixels_digest(pictures)
            if key not in self._references:
                self._references[key] = before[key] if key in before else self._encoders.encode_images(images_to_tensor(pictures))
            latents.append(self._references[key])
        return latents

    def encode_images(self, images: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Encode pictures; these are not remembered."""
        return self._encoders.encode_images(images, generator)


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Without the libraries' warnings of prompts that are cut: diffusers counts T5's tokens as if they were CLIP's."""
    loggers = [logging.getLogger(name) for name in ("diffusers.pipelines.flux.pipeline_flux", "transformers.tokenization_utils_base")]
    for one in loggers:
        one.addFilter(_is_of_no_cut)
    try:
        yield
    finally:
        for one in loggers:
            one.removeFilter(_is_of_no_cut)


def _is_of_no_cut(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not text.startswith(("The following part of your input was truncated", "Token indices sequence length is longer"))


def _pixels_digest(pictures: Sequence[Image.Image]) -> str:
    """SHA-256 of pictures' sizes and pixels, in order."""
    digest = hashlib.sha256()
    for picture in pictures:
        # Else 2 x 8 and 4 x 4 pixels of one colour would be equal.
        digest.update(f"{picture.size}".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()
