"""Self-contained HTML pages from templates: one file each, pictures embedded, no script, nothing loaded from elsewhere.

Every value is escaped where a template shows it, but the charts of `mosaic.reports.charts`, which escape their words themselves.
"""

import base64
import functools
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mosaic.reports.contrast import shade
from mosaic.reports.figures import colour_name

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).resolve().parent / "templates"
BEGINNING = '<!doctype html>\n<html lang="en"><head><meta name="mosaic-digest" content="'  # of page.html.jinja
DIGEST = re.compile(re.escape(BEGINNING) + '([0-9a-f]+)">')


@functools.cache
def environment(folder: Path = TEMPLATES) -> "Environment":
    """The templates of a folder, which may build on those of this one."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # most commands write no page

    loader = FileSystemLoader([folder, TEMPLATES])
    found = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    found.filters.update(png=png_uri, jpeg=jpeg_uri, data_uri=data_uri, percent=percent, colour=colour_name, shade=shade)
    return found


def page(template: str, folder: Path = TEMPLATES, **values: Any) -> str:
    """A whole page.

    Args:
        template: Name of a template that extends page.html.jinja.
        folder: Where it lies.
        values: What it shows; `title` is that of the window, `digest` that of what decides the page, in hexadecimal, or empty:
            `page_digest_at` reads it again.

    Raises:
        jinja2.UndefinedError: A value is missing.
    """
    return environment(folder).get_template(template).render({"digest": "", **values})


def page_digest_at(path: Path) -> str | None:
    """The digest that a page carries; None where there is no such page."""
    found = DIGEST.match(_beginning(path))
    return found and found[1]


def is_page(path: Path) -> bool:
    """Whether there is a page of ours, whatever it shows."""
    return _beginning(path).startswith(BEGINNING)


def _beginning(path: Path) -> str:
    """What an ordinary file begins with; nothing where there is none."""
    try:
        if not path.is_file():  # a pipe would keep its reader waiting
            return ""
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(400)
    except OSError:
        return ""


def png_uri(image: Image.Image) -> str:
    """A picture as the address of a PNG inside the page."""
    return data_uri(_encoded(image, "PNG"))


def jpeg_uri(image: Image.Image, quality: int = 82) -> str:
    """A picture as the address of a JPEG inside the page, for thumbnails."""
    return data_uri(_encoded(image, "JPEG", quality=quality), "jpeg")


def data_uri(data: bytes, form: str = "png") -> str:
    """The content of a picture file as an address inside the page."""
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


def percent(share: float) -> str:
    """A share of 1; small ones are not rounded to nothing."""
    return "<1\u00a0%" if 0 < share < 0.005 else f"{100 * share:.0f}\u00a0%"


def _encoded(image: Image.Image, form: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
