"""Every text of reports and page can be read: contrasts by the formula of WCAG 2.2, from the colours as the style sheets name them."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mosaic.reports.contrast import Colour, contrast, shade, shaded
from mosaic.reports.html import TEMPLATES
from scripts.app.theme import COLOURS, TEXTS

ROOT = Path(__file__).resolve().parents[2]
READABLE = 4.5
LIGHT, DARK = 0, 1


def colour(text: str) -> Colour:
    """A colour written as #rgb or #rrggbb."""
    digits = "".join(2 * digit for digit in text[1:]) if len(text) == 4 else text[1:]
    assert re.fullmatch("[0-9a-f]{6}", digits), text
    return tuple(bytes.fromhex(digits))  # type: ignore[return-value]


def rules(css: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Selectors with their declarations; those inside of @media too."""
    css = re.sub(r"/\*.*?\*/|{%.*?%}", "", css, flags=re.S)
    for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", css):
        yield selector.strip(), dict(part.strip().split(":", 1) for part in body.split(";") if ":" in part)


def test_contrast_is_that_of_wcag() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.478, abs=1e-3)
    assert contrast((148, 163, 184), (255, 255, 255)) == pytest.approx(2.56, abs=5e-3)


def test_shares_can_be_read_on_their_shades() -> None:
    assert shade(0) == "background:#ffffff;color:#000000"
    assert shade(1) == shade(1.5) == "background:#2f5c92;color:#ffffff"
    inks = []
    for percent in range(101):
        back, ink = (colour(part.split(":")[1]) for part in shade(percent / 100).split(";"))
        assert back == shaded(percent / 100)
        assert contrast(back, ink) >= READABLE, percent
        inks.append(ink[0])
    assert inks == sorted(inks), "black on light, white on dark"


@pytest.mark.parametrize("name", ["style.css", "attention.css"])
def test_the_texts_of_reports_can_be_read(name: str) -> None:
    root = next(body for selector, body in rules((TEMPLATES / "style.css").read_text(encoding="utf-8")) if selector == ":root")
    names = {key: colour(value.strip()) for key, value in root.items() if value.strip().startswith("#")}
    papers = [names["--paper"], names["--card"], (255, 255, 255)]  # white: in print
    seen = 0
    for selector, body in rules((TEMPLATES / name).read_text(encoding="utf-8")):
        if (text := body.get("color", "").strip()) in ("", "inherit"):
            continue
        ink = names[text[4:-1]] if text.startswith("var(") else colour(text)
        own = body.get("background", "").strip()
        for paper in [colour(own)] if own.startswith("#") else papers:
            assert contrast(ink, paper) >= READABLE, selector
            seen += 1
    assert seen >= 3


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_the_texts_of_the_page_can_be_read(scheme: int) -> None:
    for text, backs in TEXTS.items():
        for back in backs:
            assert contrast(colour(COLOURS[text][scheme]), colour(COLOURS[back][scheme])) >= READABLE, (text, back)


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_the_page_draws_texts_in_colours_that_can_be_read(scheme: int) -> None:
    """Every `color` of the page's style sheet is one of the theme's texts, or stands beside its own background."""
    css = (ROOT / "scripts/app/style.css").read_text(encoding="utf-8")
    by_rule = {selector: body for selector, body in rules(css) if selector.startswith(".dark ") == (scheme == DARK)}
    seen = 0
    for selector, body in by_rule.items():
        text = body.get("color", "").strip()
        if text in ("", "inherit"):
            continue
        seen += 1
        if text.startswith("#"):
            assert contrast(colour(text), colour(body["background"].strip())) >= READABLE, selector
        else:
            variable = text.removeprefix("var(--").removesuffix(")").replace("-", "_")
            assert variable in TEXTS or variable == "soft", selector
    assert seen >= (1 if scheme == DARK else 8)
    assert "--soft: var(--body-text-color-subdued)" in css
    assert not re.search(r"(?<!-)opacity: 0?\.[0-7]", css), "texts that shine through are paler than their colour"
