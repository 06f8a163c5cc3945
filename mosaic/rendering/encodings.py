"""What neighbouring pictures have in common is encoded once: the prompts' embeddings and the references' latents."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from mosaic.images import prepare_reference
from mosaic.pipeline.inputs import PipelineInputs
from mosaic.pipeline.pipeline import MosaicFluxPipeline


@contextmanager
def shared_encodings(pipeline: MosaicFluxPipeline) -> Iterator[None]:
    """Within this context a call of the pipeline takes over what the call before it encoded from the same prompts and pictures.

    The tensors are the very ones that it would compute again, so that no picture changes. Only those of the last call are kept.
    """
    attributes = vars(pipeline)
    names = ("encode_prompt", "_encode_references")
    before = {name: attributes[name] for name in names if name in attributes}
    pipeline.encode_prompt = _Prompts(pipeline)
    pipeline._encode_references = _References(pipeline)
    try:
        yield
    finally:
        for name in names:
            attributes.pop(name, None)
        attributes.update(before)


class _Prompts:
    """Stands for `encode_prompt`, and keeps what it gave last.

    The prompts of a call are one key: the last bits of an embedding may depend on how many are encoded at once.
    """

    def __init__(self, pipeline: MosaicFluxPipeline) -> None:
        self._encode = pipeline.encode_prompt
        self._key: Any = None
        self._found: tuple[Tensor, Tensor, Any] | None = None

    def __call__(self, *, prompt: list[str], max_sequence_length: int, **arguments: Any) -> tuple[Tensor, Tensor, Any]:
        key = (tuple(prompt), max_sequence_length)
        if key != self._key:
            self._key = self._found = None
            self._found = self._encode(prompt=prompt, max_sequence_length=max_sequence_length, **arguments)
            self._key = key
        return self._found


class _References:
    """Stands for `_encode_references`, and keeps the latents of the last call by the pixels of a prompt's prepared pictures."""

    def __init__(self, pipeline: MosaicFluxPipeline) -> None:
        self._encode = pipeline._encode_references
        self._found: dict[str, Tensor | None] = {}

    def __call__(self, inputs: PipelineInputs, size: int, scale: float) -> list[Tensor | None]:
        if inputs.reference_latents is not None:
            return self._encode(inputs, size, scale)
        before, self._found, keys = self._found, {}, []
        for pictures in inputs.reference_images:
            digest = hashlib.sha256(f"{size}".encode())
            for picture in pictures:
                digest.update(prepare_reference(picture, size, scale).tobytes())
            key = digest.hexdigest()
            if key not in self._found:
                given = replace(inputs, reference_images=[pictures])
                self._found[key] = before[key] if key in before else self._encode(given, size, scale)[0]
            keys.append(key)
        return [self._found[key] for key in keys]
