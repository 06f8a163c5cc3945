"""Pieces of the page as HTML. Whatever comes from users or files is escaped here."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

from mosaic.rendering.recipe import ReferenceEntry
from mosaic.reports.figures import LINE_COLOURS
from scripts.app.examples import Example
from scripts.app.sessions import Kept
from scripts.app.studio import CANCELLED, FAILED, RUNNING, WAITING, Run
from scripts.app.uploads import Upload

POCKET_NOTE = (
    "Pocket weights: a toy world of 64-pixel pictures that runs anywhere. It knows birds, cars, cats, fish, mugs, mushrooms, rockets and "
    "snails in a few places; start from an example below. docs/page.md says how to open this page with FLUX.1-dev."
)


def colour(position: int) -> str:
    """The colour of a reference: that of its lines in the attention view."""
    return "#{:02x}{:02x}{:02x}".format(*LINE_COLOURS[position % len(LINE_COLOURS)])


def header(model: str, lora: str | None, device: str, is_pocket: bool) -> str:
    """Title, and what is loaded."""
    tiles = "".join(f'<i style="background:{colour(position)}"></i>' for position in range(6))
    loaded = [("model", model), ("references", lora or "none: no reference LoRA"), ("on", device)]
    chips = "".join(f"<span><b>{name}</b> {html.escape(value)}</span>" for name, value in loaded)
    title = "<h1>MOSAIC</h1><p>Several subjects, each from its own picture, in one scene.</p>"
    logo = f'<div class="m-logo" aria-hidden="true">{tiles}</div>'
    head = f'<div class="m-head">{logo}<div>{title}</div><div class="m-chips">{chips}</div></div>'
    return head + f'<p class="m-note">{POCKET_NOTE}</p>' * is_pocket


def card(position: int, upload: Upload | None) -> str:
    """The picture of a reference with its number."""
    if upload is None:
        return ""
    name = html.escape(upload.name, quote=True)
    return (
        f'<figure class="m-card"><img alt="reference {position + 1}: {name}" src="{upload.thumbnail}">'
        f'<b style="background:{colour(position)}">{position + 1}</b><figcaption title="{name}">{name}</figcaption></figure>'
    )


def sample(example: Example) -> str:
    """An example case: its references, and its prompt."""
    pictures = "".join(f'<img alt="" src="{upload.thumbnail}">' for upload in example.uploads)
    return f'<div class="m-sample">{pictures}</div><p class="m-sample-prompt">{html.escape(example.case.prompt)}</p>'


def notice(problems: Sequence[str] = (), kind: str = "error") -> str:
    """Messages to the user; nothing where there are none."""
    lines = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
    return f'<ul class="m-notice m-{kind}" role="alert">{lines}</ul>' if problems else ""


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
    share = round(100 * run.step / run.num_steps)
    values = f'aria-label="steps" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{share}"'
    bar = f'<div class="m-bar" role="progressbar" {values}><i style="width:{share}%"></i></div>'
    return f'<div class="m-run">{bar}<span role="status">{text}</span></div>'


def duration(seconds: float) -> str:
    """A time in words, short."""
    whole = math.ceil(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def summary(kept: Kept | None) -> str:
    """The recipe of a picture in short."""
    if kept is None:
        return '<p class="m-empty">The recipe of a picture stands here once there is one.</p>'
    recipe, options = kept.recipe, kept.recipe.options
    rows = {
        "Prompt": recipe.prompt,
        "Seed": recipe.seed,
        "Size": f"{options.width} x {options.height}",
        "Steps": options.num_inference_steps,
        "Guidance": f"{options.guidance_scale:g}",
        "Image guidance": f"{options.image_guidance_scale:g}",
        "Time": f"{kept.seconds:.1f} s",
    }
    cells = "".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in rows.items())
    references = "".join(_reference_line(position, entry) for position, entry in enumerate(recipe.references))
    return f'<dl class="m-recipe">{cells}<dt>References</dt><dd>{references or "none"}</dd></dl>'


def _reference_line(position: int, entry: ReferenceEntry) -> str:
    name = f" as &lt;{html.escape(entry.name)}&gt;" if entry.name else ""
    strength = f", strength {entry.strength:g}" if entry.strength != 1 else ""
    return f'<div><b class="m-dot" style="background:{colour(position)}"></b>{html.escape(entry.file)}{name}{strength}</div>'


def attention_note(kept: Kept | None) -> str:
    """What the attention view shows, and the leakage between references as a table."""
    if kept is None:
        return '<p class="m-empty">Where each reference looks in the picture stands here once there is one.</p>'
    if kept.panel_path is None:
        reason = "it has no references" if not kept.recipe.references else "the attention view was switched off for it"
        return f'<p class="m-empty">No attention view for this picture: {reason}.</p>'
    text = (
        '<p class="m-help">Left: each reference with its sharpest points. Middle: where these points look in the picture. Right: where the '
        "whole subject looks, in red.</p>"
    )
    return text + (leakage_table(kept.leakage) if len(kept.leakage) > 1 else "")


def leakage_table(leakage: Sequence[Sequence[float]]) -> str:
    """Rows: a reference's attention; columns: whose part of the picture it falls on."""
    head = "".join(f'<th scope="col">{_dot(position)}</th>' for position in range(len(leakage)))
    rows = ""
    for i, row in enumerate(leakage):
        cells = "".join(
            f'<td class="{"m-own" if i == j else "m-leak"}" style="--share:{100 * value:.0f}%">{100 * value:.0f} %</td>'
            for j, value in enumerate(row)
        )
        rows += f'<tr><th scope="row">{_dot(i)}</th>{cells}<td>{100 * max(0.0, 1 - sum(row)):.0f} %</td></tr>'
    caption = "Share of each reference's attention (rows) on the part of the picture that each reference owns (columns)"
    return f'<table class="m-leakage"><caption>{caption}</caption><tr><td></td>{head}<th scope="col">elsewhere</th></tr>{rows}</table>'


def _dot(position: int) -> str:
    return f'<b class="m-badge" style="background:{colour(position)}">{position + 1}</b>'


def recipe_json(kept: Kept | None) -> str:
    """A recipe for reading; empty without a picture."""
    return json.dumps(kept.recipe.to_json(), ensure_ascii=False, indent=2) if kept else ""


def public_name(source: str | None) -> str | None:
    """A hub id as it is, of a local path the last part."""
    return source and (Path(source).name if Path(source).exists() else source)
