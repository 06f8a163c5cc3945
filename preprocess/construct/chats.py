"""Which model a stage asks for words: the settings that the stages share."""

import os
import re
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator

from mosaic.config.schema import FieldError, Section
from mosaic.config.sections import Text

VARIABLE = re.compile("[A-Z_][A-Z0-9_]*")


class ChatSettings(Section):
    """Base of the sections that name a model of transformers, or an endpoint with OpenAI's protocol."""

    model: Text
    """Model that is asked: a folder or a hub id; where `url` is given, what the endpoint calls it."""
    url: Text | None = None
    """Endpoint with OpenAI's protocol, up to and without "/chat/completions"; null: the model is loaded."""
    key_variable: str | None = None
    """Environment variable that holds the endpoint's key, such as "OPENAI_API_KEY"; null: it needs none. Keys stand nowhere else."""
    max_tokens: Annotated[int, Field(ge=1, le=65536)] = 512
    """Tokens of an answer at most."""

    @model_validator(mode="after")
    def _without_secrets(self) -> Self:
        """What may be a key is not shown."""
        if self.key_variable is not None and not VARIABLE.fullmatch(self.key_variable):
            raise FieldError(f"{self.path}.key_variable", "must be the NAME of an environment variable, in capital letters, never a key")
        if self.url is not None and not re.fullmatch(r"https?://[^@?#\s]+", self.url):
            raise FieldError(
                f"{self.path}.url", "must begin with http:// or https:// and hold no user, password or query; the key's variable is named"
            )
        return self


def load_chat(settings: ChatSettings, device: torch.device, dtype: torch.dtype, pictures: bool = True) -> Any:
    """The `Chat` that the settings name.

    Args:
        settings: Of the stage.
        device: Of a model that is loaded.
        dtype: Of its weights.
        pictures: Whether it will be asked about pictures.

    Raises:
        FileNotFoundError, ValueError: The model cannot be had or is of another kind, or the key's variable is not set.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from mosaic.evaluation.chat import EndpointChat, LocalChat, LocalTextChat
    from mosaic.weights.frozen import call_loader

    if settings.url is not None:
        return EndpointChat(settings.url, settings.model, key_of(settings), settings.max_tokens)
    flag = f"{settings.path}.model"
    both = type(call_loader(AutoConfig, settings.model, flag)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    cls = LocalChat if both or pictures else LocalTextChat
    return cls(settings.model, flag, device, dtype, settings.max_tokens)


def key_of(settings: ChatSettings) -> str | None:
    """The endpoint's key.

    Raises:
        FieldError: Its variable is not set.
    """
    if settings.key_variable is None:
        return None
    key = os.environ.get(settings.key_variable, "").strip()
    if not key:
        raise FieldError(f"{settings.path}.key_variable", f"names {settings.key_variable}, which is not set in the environment")
    return key
