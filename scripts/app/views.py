"""Pieces of the page as HTML. Whatever comes from users or files is escaped by the templates, views.html.jinja."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosaic.reports.html import environment
from scripts.app.examples import Example
from scripts.app.sessions import FinishedPicture
from scripts.app.studio import CANCELLED, FAILED, RUNNING, WAITING, Run
from scripts.app.uploads import Upload

FOLDER = Path(__file__).resolve().parent
POCKET_NOTE = (
    "Pocket weights: a toy world of 64-pixel pictures that runs anywhere. It knows birds, cars, cats, fish, mugs, mushrooms, rockets and "
    "snails in a few places; start from an example below. docs/page.md says how to open this page with FLUX.1-dev."
)


def view(name: str, *values: Any) -> str:
    """A piece of the page, by the name of its macro."""
    return str(getattr(environment(FOLDER).get_template("views.html.jinja").module, name)(*values))


def header(model: str, lora: str | None, device: str, is_pocket: bool) -> str:
    """Title, and what is loaded."""
    return view("header", model, lora, device, POCKET_NOTE if is_pocket else "")


def title(words: str, hint: str) -> str:
    """The title of a part of the page."""
    return view("title", words, hint)


def drop_help(max_bytes: int) -> str:
    """What can be dropped."""
    return view("drop_help", max_bytes >> 20)


def card(position: int, upload: Upload | None) -> str:
    """The picture of a reference with its number."""
    return view("card", position, upload) if upload else ""


def sample(example: Example) -> str:
    """An example case: its references, and its prompt."""
    return view("sample", example)


def notice(problems: Sequence[str] = (), kind: str = "error") -> str:
    """Messages to the user; nothing where there are none."""
    return view("notice", problems, kind) if problems else ""


def progress(run: Run, num_before: int) -> str:
    """Where a run is."""
    if run.state == FAILED:
        return notice([run.error])
    if run.state == CANCELLED:
        return notice([f"Cancelled after step {run.step} of {run.num_steps}." if run.step else "Cancelled before it began."], "quiet")
    if run.state == WAITING:
        text = f"Waiting: {num_before} {'picture' if num_before == 1 else 'pictures'} before yours." if num_before else "Starting ..."
    elif run.state == RUNNING:
        left = run.seconds_left()
        text = f"Step {run.step} of {run.num_steps}" + (f" · {duration(left)} left" if left is not None else " · encoding the references")
        text = "Cancelling after this step ..." if run.cancel_asked else text
    else:
        text = "Finishing ..."
    return view("progress", text, round(100 * run.step / run.num_steps))


def duration(seconds: float) -> str:
    """A time in words, short."""
    whole = math.ceil(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def summary(picture: FinishedPicture | None) -> str:
    """The recipe of a picture in short."""
    if picture is None:
        return view("empty", "The recipe of a picture stands here once there is one.")
    return view("summary", picture.recipe, picture.seconds)


def attention_note(picture: FinishedPicture | None) -> str:
    """What the attention view shows, and the leakage between references as a table."""
    if picture is None:
        return view("empty", "Where each reference looks in the picture stands here once there is one.")
    if picture.panel_path is None:
        reason = "it has no references" if not picture.recipe.references else "the attention view was switched off for it"
        return view("empty", f"No attention view for this picture: {reason}.")
    return view("attention", picture.recipe.labels, picture.numbers)


def recipe_json(picture: FinishedPicture | None) -> str:
    """A recipe for reading; empty without a picture."""
    return json.dumps(picture.recipe.to_json(), ensure_ascii=False, indent=2) if picture else ""


def public_name(source: str) -> str:
    """A hub id as it is, of a local path the last part."""
    return Path(source).name if Path(source).exists() else source
