"""Templates: nothing that is missing is passed over, all words are escaped, they ship with the package, and who writes no page does not wait."""

import fnmatch
import subprocess
import sys
import tomllib
from pathlib import Path

import jinja2
import pytest

from mosaic.reports.html import TEMPLATES, environment, page, percent

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (TEMPLATES, ROOT / "scripts/app", ROOT / "scripts/doctor", ROOT / "preprocess/construct/page")


@pytest.mark.parametrize("path", [path for folder in FOLDERS for path in sorted(folder.glob("*.jinja"))], ids=lambda path: path.name)
def test_only_charts_are_shown_as_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert environment(path.parent).get_template(path.name)
    assert "autoescape" not in text
    shown = [line for line in text.splitlines() if "|safe" in line]
    assert all("chart|safe" in line or '"_<wbr>"|safe' in line for line in shown), shown


def test_words_are_escaped_wherever_a_page_shows_them() -> None:
    evil = "</title></table><script>alert(1)</script>\" onerror='x' & "
    values = {"title": evil, "verdict": evil, "rows": [(evil, evil)], "panels": [(b"png", evil)], "because": [evil], "look": evil}
    content = page("findings.html.jinja", ROOT / "scripts/doctor", **values)
    assert "<script" not in content
    assert content.count("&lt;script&gt;alert(1)&lt;/script&gt;&#34; onerror=&#39;x&#39; &amp;") == 9
    cases = [{"heading": evil, "panel": b"png", "link": evil, "verdicts": [evil]}]
    content = page("report.html.jinja", title="x", cases=cases, verdict=evil, maps=[(b"png", evil)], run=None)
    escaped = str(jinja2.utils.markupsafe.escape(evil))
    assert "<script" not in content
    assert content.count(f'alt="{escaped}"') == 2
    assert f'<a href="{escaped}">' in content
    assert content.count(escaped) == 7


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'rows' is undefined"):
        page("findings.html.jinja", ROOT / "scripts/doctor", title="x", verdict="x", because=[], look="x", panels=[])


def test_templates_ship_with_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["mosaic.reports"]
    names = [path.relative_to(ROOT / "mosaic/reports").as_posix() for path in TEMPLATES.iterdir()]
    assert len(names) >= 5
    assert [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


def test_jinja_is_imported_where_a_page_is_written() -> None:
    program = "import sys, mosaic.reports.html as html; print('jinja2' in sys.modules); html.environment(); print('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_small_shares_are_not_rounded_to_nothing() -> None:
    assert [percent(share) for share in (0, 0.004, 0.125, 1)] == ["0\u00a0%", "<1\u00a0%", "12\u00a0%", "100\u00a0%"]
