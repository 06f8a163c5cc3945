"""Self-contained HTML pages: one file each, pictures embedded, no script, nothing loaded from elsewhere. All text is escaped here."""

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
HEAD = '<!doctype html>\n<html lang="en"><head>'
STYLE = """
:root { color-scheme: light; --ink: #22242a; --soft: #5b606b; --line: #dfe1e6; --paper: #f5f5f2; --card: #fff; --accent: #1d4e89; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; max-width: 1120px; padding: 2rem 1.25rem 4rem; }
h1, h2, h3 { line-height: 1.2; margin: 0 0 .5rem; } h1 { font-size: 1.9rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; }
h3 { font-size: 1.02rem; } p { margin: 0 0 .8rem; max-width: 76ch; } a { color: var(--accent); }
a:focus-visible, summary:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: 3px; }
figure { margin: 0 0 1.5rem; } figcaption { color: var(--soft); font-size: .9rem; }
img { max-width: 100%; border: 1px solid var(--line); border-radius: 6px; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
.row figure { flex: 1 1 320px; } svg.plot { background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: 0 0 .4rem; }
td, th { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
"""


def text(value: object) -> str:
    """A value as text of a page or of an attribute in double quotes, whatever letters it holds."""
    return html.escape(" ".join(str(value).split()), quote=True)


def png_uri(image: Image.Image) -> str:
    """A picture as the address of a PNG inside the page."""
    return data_uri(_encoded(image, "PNG"))


def jpeg_uri(image: Image.Image, quality: int = 82) -> str:
    """A picture as the address of a JPEG inside the page, for thumbnails."""
    return data_uri(_encoded(image, "JPEG", quality=quality), "jpeg")


def data_uri(data: bytes, form: str = "png") -> str:
    """The content of a picture file as an address inside the page."""
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


def embedded(png: bytes, caption: str) -> str:
    """A PNG inside the page, with its caption."""
    return f'<figure><img alt="{text(caption)}" src="{data_uri(png)}"><figcaption>{text(caption)}</figcaption></figure>'


def page(title: str, parts: Sequence[str], style: str = "", digest: str = "") -> str:
    """A whole page.

    Args:
        title: Title of the window; what the page shows as its heading is in `parts`.
        parts: HTML, in which every text has gone through `text`.
        style: CSS after the common one.
        digest: Of what decides the page, in hexadecimal; `page_digest_at` reads it again.
    """
    security = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    return (
        f'{HEAD}<meta name="mosaic-digest" content="{text(digest)}"><meta charset="utf-8">{security}'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{text(title)}</title>'
        f"<style>{STYLE}{style}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def page_digest_at(path: Path) -> str | None:
    """The digest that a page carries; None where there is no such page."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            found = re.match(re.escape(HEAD) + '<meta name="mosaic-digest" content="([0-9a-f]+)">', file.read(400))
    except OSError:
        return None
    return found and found[1]


def _encoded(image: Image.Image, form: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
