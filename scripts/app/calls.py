"""What a browser may ask of the page's actions: which there are, and of what kind and size each value is. Nothing else reaches Gradio."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MAX_TEXT = 100_000  # letters of a text
MAX_FILES = 100  # of one upload
MAX_DEPTH = 8  # of lists and objects in each other
MAX_VALUES = 2_000  # in one call
KEYS = {"data", "fn_index", "session_hash", "event_data", "trigger_id"}
FILE_KEYS = {"path", "url", "size", "orig_name", "mime_type", "is_stream", "meta"}
PAGE = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Calls:
    """The page's actions.

    Attributes:
        inputs: Per action, by its number, the kinds of its inputs: the names of Gradio's components.
        folder: Where uploaded files lie, each in a folder of its own; files of other places are refused.
    """

    def __init__(self, inputs: Mapping[int, Sequence[str]], folder: Path) -> None:
        self.inputs, self.folder = inputs, folder

    def check(self, body: bytes) -> str:
        """Check a call; returns the id of the page that makes it.

        Raises:
            ValueError: It is not one that the page makes. The message is short, whatever was sent.
        """
        try:
            call = json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise ValueError("A call must be JSON.") from None
        _check_shape(call)
        if not isinstance(call, dict) or not call.keys() <= KEYS:
            raise ValueError(f"A call must be an object with the keys {', '.join(sorted(KEYS))}.")
        page, action, values = call.get("session_hash"), call.get("fn_index"), call.get("data")
        if not isinstance(page, str) or not PAGE.fullmatch(page):
            raise ValueError("session_hash must have 1 to 64 letters, digits, - and _.")
        if type(action) is not int or action not in self.inputs:
            raise ValueError("fn_index must be the number of one of the page's actions.")
        if not _is_number(call.get("trigger_id")):
            raise ValueError("trigger_id must be a number or null.")
        kinds = self.inputs[action]
        if not isinstance(values, list) or len(values) != len(kinds):
            raise ValueError(f"data must be a list of {len(kinds)} values.")
        for number, (kind, value) in enumerate(zip(kinds, values, strict=True)):
            if not self._fits(kind, value):
                raise ValueError(f"data[{number}] is not a value of a {kind}.")
        return page

    def _fits(self, kind: str, value: Any) -> bool:
        """Whether a component of that kind gives such a value."""
        if kind == "textbox":
            return value is None or isinstance(value, str)
        if kind == "checkbox":
            return isinstance(value, bool)
        if kind == "file":
            return value is None or (isinstance(value, list) and len(value) <= MAX_FILES and all(map(self._is_upload, value)))
        if kind == "dataset":
            return type(value) is int and abs(value) < 2**31
        return _is_number(value)  # number, slider; of a state, which the server keeps, browsers send null

    def _is_upload(self, value: Any) -> bool:
        if not isinstance(value, dict) or not value.keys() <= FILE_KEYS or not isinstance(value.get("path"), str):
            return False
        if value.get("is_stream") or not isinstance(value.get("size"), int | None) or value.get("meta") != {"_type": "gradio.FileData"}:
            return False
        path = Path(value["path"])
        return (
            ".." not in path.parts
            and path.is_relative_to(self.folder)
            and all(isinstance(value.get(key), str | None) for key in ("url", "orig_name", "mime_type"))
        )


def _check_shape(value: Any) -> None:
    """Raise ValueError where a text is too long or cannot be encoded, or values are too many or lie too deep."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str) and (len(one) > MAX_TEXT or any("\ud800" <= letter <= "\udfff" for letter in one)):
                raise ValueError(f"A text must have at most {MAX_TEXT} letters, without halves of surrogate pairs.")
        count += len(below)
        if count > MAX_VALUES:
            raise ValueError(f"A call must have at most {MAX_VALUES} values.")
        level = below
    if level:
        raise ValueError(f"Lists and objects must lie at most {MAX_DEPTH} deep.")


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63)


def _no_constant(name: str) -> None:
    raise ValueError(name)
