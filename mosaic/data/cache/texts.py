"""The text cache: the embeddings of prompts, and those of the empty prompt, which text dropout puts in their place."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mosaic.data.cache.tensors import COMMAND, TensorCache, content_key
from mosaic.data.samples import TextEmbeddings

KIND, SETTING = "text", "data.text_cache"
EMPTY = ""


def prompt_key(prompt: str) -> bytes:
    """The key of a prompt."""
    return content_key(prompt.encode())


def distinct_prompts(prompts: Iterable[str]) -> list[str]:
    """The empty prompt, then each prompt once, in the order of first appearance, so that added samples come last."""
    return list(dict.fromkeys((EMPTY, *prompts)))


class TextCache(TensorCache):
    """Reads the embeddings of prompts."""

    def __init__(self, root: str | Path, encoding: Mapping[str, Any]) -> None:
        """Open the cache; see `TensorCache`.

        Args:
            root: Folder of the cache.
            encoding: `mosaic.data.cache.opening.text_encoding` of the run.

        Raises:
            ValueError: It lacks the empty prompt.
        """
        super().__init__(root, SETTING, KIND, encoding)
        self._empty = self._entry(EMPTY)

    def embeddings(self, prompt: str) -> TextEmbeddings:
        """Read the embeddings of a prompt.

        Raises:
            ValueError: It is not in the cache.
        """
        entry = self._entry(prompt)
        return TextEmbeddings(entry["prompt_embeds"], entry["pooled"], self._empty["prompt_embeds"], self._empty["pooled"])

    def _entry(self, prompt: str) -> dict[str, Tensor]:
        entry = self.read(prompt_key(prompt))
        if entry is None:
            raise ValueError(
                f"{SETTING}: the cache in {self.root} does not hold the prompt {prompt!r}. The same command adds it: {COMMAND}"
            )
        return entry


def cached_text_bytes(text_length: int = 512, text_width: int = 4096, pooled_width: int = 768, value_bytes: int = 2) -> int:
    """Bytes of one distinct prompt in the text cache: 4 MiB and 1.5 KiB for FLUX.1 in bfloat16.

    Args:
        text_length: T5 tokens.
        text_width: Width of a T5 token.
        pooled_width: Width of CLIP's pooled output.
        value_bytes: Of one number: 2 for bfloat16, 4 for float32.
    """
    return (text_length * text_width + pooled_width) * value_bytes
