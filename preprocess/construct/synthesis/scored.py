"""What measuring a picture gives."""

from typing import NamedTuple


class Scored(NamedTuple):
    """A number, and what was said with it."""

    value: float
    remark: str = ""
