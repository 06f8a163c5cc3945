"""A model that looks at pictures and answers a question as JSON: one of transformers, or any endpoint that speaks OpenAI's protocol."""

import json
import time
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub import InferenceClient
from PIL import Image
from pydantic import BaseModel, ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mosaic.evaluation.encoders import Provenance, provenance_of
from mosaic.files import in_one_line, shown
from mosaic.reports.html import png_uri
from mosaic.weights.frozen import call_loader

MAX_TOKENS = 512
TIMEOUT = 120  # seconds
WAITS = (2, 8, 32)  # seconds before an endpoint that failed is asked again
PASSING = (408, 409, 425, 429)  # refusals of HTTP that another try may not meet
NO_KEY = "none"  # without any, the client would send the user's token of the hub to whatever endpoint it is
Answer = TypeVar("Answer", bound=BaseModel)
Part = str | Image.Image


class Chat(Protocol):
    """Something that answers with JSON.

    Attributes:
        provenance: The model, and what is done to pictures.
    """

    provenance: Provenance

    def __call__(self, parts: Sequence[Part]) -> str:
        """The answer to texts and pictures in order, as text; the most likely one, so that it is the same each time."""


def ask(chat: Chat, parts: Sequence[Part], form: type[Answer]) -> Answer:
    """Ask for an answer of a form.

    Args:
        chat: Who is asked.
        parts: Texts and pictures; the form, as a JSON Schema, is added.
        form: The fields of the answer.

    Raises:
        ValueError: The answer holds no JSON object of that form.
        OSError: An endpoint cannot be reached, or refuses.
    """
    schema = json.dumps(form.model_json_schema())
    text = chat([*parts, f"Answer with one JSON object of this schema and nothing else: {schema}"])
    start, end = text.find("{"), text.rfind("}")
    try:
        return form.model_validate_json(text[start : end + 1], strict=True)
    except ValidationError as error:
        reason = in_one_line(str(error.errors(include_url=False)[0]["msg"]))
        raise ValueError(f"{chat.provenance.model}: answers with something else than {form.__name__} ({reason}): {shown(text)}.") from error


class LocalChat:
    """A model of transformers that takes pictures and texts, such as Qwen/Qwen3-VL-8B-Instruct."""

    def __init__(
        self,
        name: str,
        flag: str = "--judge",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        """Load the model, which is to write a number of tokens at most.

        Raises:
            FileNotFoundError, ValueError: It cannot be had, or is no model of pictures and texts.
        """
        call_loader(AutoConfig, name, flag)
        self.processor: Any = call_loader(AutoProcessor, name, flag)
        self.model: Any = call_loader(AutoModelForImageTextToText, name, flag, dtype=dtype).to(device).eval().requires_grad_(False)
        self.max_tokens = max_tokens
        self.provenance = provenance_of(self.model, name, type(self.processor).__name__)

    @torch.inference_mode()
    def __call__(self, parts: Sequence[Part]) -> str:
        """Greedy."""
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts]
        messages = [{"role": "user", "content": content}]
        tokens = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, self.model.dtype)
        found = self.model.generate(**tokens, do_sample=False, max_new_tokens=self.max_tokens)
        return str(self.processor.batch_decode(found[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)[0])


class LocalTextChat:
    """A model of transformers that writes after texts alone, such as Qwen/Qwen3-8B."""

    def __init__(
        self,
        name: str,
        flag: str = "--model",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        """Load the model, which is to write a number of tokens at most.

        Raises:
            FileNotFoundError, ValueError: It cannot be had, is no language model, or was not trained to be asked.
        """
        self.tokenizer: Any = call_loader(AutoTokenizer, name, flag)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{flag}: {name} has no chat template, so that it cannot be asked. Name a model that follows instructions.")
        self.model: Any = call_loader(AutoModelForCausalLM, name, flag, dtype=dtype).to(device).eval().requires_grad_(False)
        self.max_tokens = max_tokens
        self.provenance = provenance_of(self.model, name, "texts only")

    @torch.inference_mode()
    def __call__(self, parts: Sequence[Part]) -> str:
        """Greedy.

        Raises:
            ValueError: There is a picture among the parts.
        """
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(
                f"{self.provenance.model}: reads texts only, and was asked about a picture. Name a model of pictures and texts."
            )
        messages = [{"role": "user", "content": "\n".join(str(part) for part in parts)}]
        tokens = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        found = self.model.generate(**tokens, do_sample=False, max_new_tokens=self.max_tokens)
        return str(self.tokenizer.decode(found[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))


class EndpointChat:
    """An endpoint with OpenAI's protocol: a server of one's own (vLLM, llama.cpp, ...) or a provider."""

    def __init__(self, url: str, model: str, key: str | None = None, max_tokens: int = MAX_TOKENS) -> None:
        """Name the endpoint; nothing is asked yet.

        Args:
            url: Up to and without "/chat/completions", such as "http://localhost:8000/v1".
            model: What the endpoint calls the model.
            key: Its key, which is neither shown nor stored.
            max_tokens: Of an answer.
        """
        self.client = InferenceClient(base_url=url, api_key=key or NO_KEY, timeout=TIMEOUT)
        self.url, self.max_tokens = url, max_tokens
        self.provenance = Provenance(model, f"as served at {url}", "PNG")

    def __call__(self, parts: Sequence[Part]) -> str:
        """At temperature 0. It is asked again, a few times, where it does not answer.

        Raises:
            OSError: It cannot be reached, or refuses.
        """
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": {"url": png_uri(part)}}
            for part in parts
        ]
        for wait in (*WAITS, None):
            try:
                found = self.client.chat_completion(
                    [{"role": "user", "content": content}], model=self.provenance.model, max_tokens=self.max_tokens, temperature=0
                )
                return str(found.choices[0].message.content or "") if found.choices else ""
            except Exception as error:  # of the client's transport, which has been another library in every major version
                status = getattr(getattr(error, "response", None), "status_code", None)
                final = status is not None and 400 <= status < 500 and status not in PASSING
                if wait is None or final:
                    raise OSError(self._problem(error, final)) from None  # the first error's text may hold the key
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _problem(self, error: Exception, final: bool) -> str:
        """What happened, without the key, which some servers repeat."""
        text = f"{type(error).__name__}: {error}"
        reason = in_one_line(text if self.client.token in (None, NO_KEY) else text.replace(self.client.token, "***"), 300)
        tries = "" if final else f" {1 + len(WAITS)} times"
        return f"the endpoint {self.url} failed{tries} ({reason}). Look at its address, the model's name, the key and its server's log."
