"""Stage 1 as the pipeline runs it."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mosaic.weights.frozen import short_digest
from preprocess.construct.candidates import Candidate
from preprocess.construct.chats import key_of, load_chat
from preprocess.construct.prompts.drawing import Drawer
from preprocess.construct.prompts.settings import PromptsSettings
from preprocess.construct.prompts.sources import ChatSource, PromptSource, TemplateSource
from preprocess.construct.prompts.templates import read_templates
from preprocess.construct.rows import PromptRow
from preprocess.construct.stage import Stage

NAME = "prompts"
INVALID = "invalid_prompt"


class PromptWorker:
    """Draws assignments and has them put into words."""

    def __init__(self, drawer: Drawer, source: PromptSource, provenance: dict[str, Any], parallel: int = 1) -> None:
        self.drawer, self.source, self.parallel = drawer, source, parallel
        self.provenance = provenance | source.provenance

    def __call__(self, candidates: Sequence[Candidate], folder: Path) -> Iterator[PromptRow]:
        """A row for each candidate, which depends on its number alone.

        Raises:
            OSError: An endpoint cannot be reached.
        """
        if self.parallel == 1:
            yield from map(self._row, candidates)
            return
        with ThreadPoolExecutor(self.parallel) as pool:
            yield from pool.map(self._row, candidates)

    def _row(self, candidate: Candidate) -> PromptRow:
        return self.source(candidate.number, self.drawer(candidate.number))


def prompts_stage(settings: PromptsSettings, base_seed: int, dtype: torch.dtype = torch.float32) -> Stage:
    """Stage 1.

    Args:
        settings: Its section.
        base_seed: Of the run.
        dtype: Of a model that is loaded to be asked.

    Raises:
        FieldError, FileNotFoundError, ValueError: The templates file is none or lacks what the shares ask for; a key's variable is not set.
    """
    templates = read_templates(settings.templates)
    drawer = Drawer(settings, templates, base_seed)
    if settings.chat is not None:
        key_of(settings.chat)

    def load(device: torch.device) -> PromptWorker:
        provenance = {"templates": short_digest(settings.templates)}
        if settings.chat is None:
            return PromptWorker(drawer, TemplateSource(settings, templates), provenance)
        chat = load_chat(settings.chat, device, dtype, pictures=False)
        return PromptWorker(drawer, ChatSource(settings, chat), provenance, settings.parallel if settings.chat.url is not None else 1)

    return Stage(NAME, PromptRow, settings, load, reasons)


def reasons(candidate: Candidate) -> list[str]:
    """Whether no valid prompt came out."""
    return [INVALID] if candidate.prompt.problem else []
