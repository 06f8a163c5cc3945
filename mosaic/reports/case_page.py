"""The page that shows why a picture came out as it did (`--report`)."""

import html
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mosaic.pipeline.attention_report import PictureAttention
from mosaic.reports.case_figures import heat_figure, leakage_table, letters, lines_figure, named, percent, place, shown, symbols
from mosaic.reports.entropy_chart import entropy_chart
from mosaic.reports.html import page, png_uri, text
from mosaic.reports.page_style import STYLE

OVERVIEW = "report.html"
NOTABLE = 0.05  # of a reference's attention; a leak is spoken of if it is more than even attention would give by this


class CasePage(NamedTuple):
    """What the page of one picture shows.

    Attributes:
        recipe: Of the picture.
        digest: Of what decides the page (`page_digest`).
        references: K prepared reference pictures.
        result: The picture.
        attention: Where the references look in it.
        numbers: By `attention_numbers`.
        chosen: The references whose points were given; those of the others are the strongest.
    """

    recipe: Mapping[str, Any]
    digest: str
    references: Sequence[Image.Image]
    result: Image.Image
    attention: PictureAttention
    numbers: dict[str, Any]
    chosen: Collection[int] = ()

    @property
    def labels(self) -> list[str]:
        """Name, or name of the file, of every reference."""
        return [entry["name"] or Path(entry["file"]).stem for entry in self.recipe["references"]]


def case_page(case: CasePage) -> str:
    """The page of one picture, as HTML."""
    title = case_title(case.recipe["name"])
    pictures = {f"reference{k}": picture for k, picture in enumerate(case.references)}
    parts = [
        symbols({**pictures, "result": case.result}),
        f'<header><p class="crumb"><a href="{OVERVIEW}">&larr; all pictures of this run</a></p><h1>{text(title)}</h1>'
        f'<p class="prompt"><bdi>{text(case.recipe["prompt"])}</bdi></p></header><main>',
        _hero(case),
        "<h2>Where each reference looks</h2>",
        "<p>Left: points of the reference, each with a line to the token of the picture that it attends to most. Right: the attention "
        "of the whole subject; darker is more. Attention is that of the reference&rsquo;s tokens over the tokens of the picture, "
        "averaged over heads, blocks and sampling steps.</p>",
        *(_look(case, k) for k in range(len(case.references))),
        "<h2>Who looks at whose place</h2>",
        "<p>A token of the picture belongs to the reference with most peaks on it. Off the framed diagonal, attention leaks to the place "
        "of another reference: this is where subjects mix. Compare with the last row, the share of the picture that each one holds.</p>",
        leakage_table(case.labels, case.numbers),
        "<h2>How focused they are</h2>",
        "<p>Mean entropy of the attention of each subject&rsquo;s tokens at every sampling step. 0 is all attention on one token; the "
        "dotted line is attention spread evenly over the picture.</p>",
        entropy_chart(case.labels, case.numbers),
        _entropy_table(case.numbers),
        "<h2>Recipe</h2>",
        _recipe(case.recipe),
        "</main>",
    ]
    return page(f"{title}: {case.recipe['prompt']}", parts, STYLE, case.digest)


def case_title(name: str) -> str:
    """A picture's name as a heading: "case_007_seed_3" -> "Case 7, seed 3"."""
    found = re.fullmatch(r"case_(\d+)(?:_seed_(\d+))?", name)
    return f"Case {int(found[1])}" + (f", seed {found[2]}" if found[2] else "") if found else name


def strongest_leak(numbers: Mapping[str, Any]) -> tuple[int, int] | None:
    """(i, j): reference i has the most attention on the place of j beyond that place's share of the picture; None if that is little."""
    excess = {(i, j): share - numbers["owned"][j] for i, row in enumerate(numbers["leakage"]) for j, share in enumerate(row) if i != j}
    pair = max(excess, key=excess.__getitem__, default=None)
    return pair if pair is not None and excess[pair] >= NOTABLE else None


def _hero(case: CasePage) -> str:
    """The references and the result."""
    items = []
    for k, (label, entry) in enumerate(zip(case.labels, case.recipe["references"], strict=True)):
        strength = f'<span class="soft">strength {entry["strength"]:g}</span>' if entry["strength"] != 1 else ""
        picture = shown(f"reference{k}", f"Reference {k + 1}: {label}")
        items.append(f'<li class="card">{picture}{named(k, label)}{strength}</li>')
    look = ' class="hard"' if max(case.result.size) <= 256 else ""
    alt = f"The generated picture for: {case.recipe['prompt']}"
    picture = f'<img{look} alt="{text(alt)}" src="{png_uri(case.result)}">'
    left = f'<ul class="references">{"".join(items)}</ul>{_finding(case.labels, case.numbers)}{_summary(case.labels, case.numbers)}'
    return f'<div class="hero"><div>{left}</div><figure class="card result">{picture}<figcaption>The result</figcaption></figure></div>'


def _finding(labels: Sequence[str], numbers: Mapping[str, Any]) -> str:
    """What the matrix says, in a sentence."""
    if len(labels) == 1:
        return ""
    pair = strongest_leak(numbers)
    if pair is None:
        said = "No reference has notably more attention on the place of another than even attention would have."
        return f'<p class="finding"><strong>The subjects keep apart.</strong> {said}</p>'
    i, j = pair
    share, owned = numbers["leakage"][i][j], numbers["owned"][j]
    times = f", {share / owned:.1f} times what even attention would have" if owned else ""
    return (
        f'<p class="finding"><strong>Strongest leak:</strong> reference {i + 1} ({text(labels[i])}) has {percent(share)} of its attention '
        f"on the place of reference {j + 1} ({text(labels[j])}){times}.</p>"
    )


def _summary(labels: Sequence[str], numbers: Mapping[str, Any]) -> str:
    """Per reference where its attention lies, and how many tokens an even spread of the last step's entropy would cover."""
    rows = []
    for k, (label, shares, last) in enumerate(zip(labels, numbers["leakage"], numbers["entropy"][-1], strict=True)):
        others = f"<td>{percent(sum(shares) - shares[k])}</td>" if len(labels) > 1 else ""
        rows.append(
            f'<tr><th scope="row">{named(k, label)}</th><td>{percent(shares[k])}</td>{others}'
            f"<td>{math.exp(last):.0f} of {math.prod(numbers['target_grid'])}</td></tr>"
        )
    others = '<th scope="col">on others&rsquo; places</th>' if len(labels) > 1 else ""
    return (
        f'<table class="summary"><thead><tr><th scope="col">attention of</th><th scope="col">on its own place</th>{others}'
        f'<th scope="col">spread over tokens</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _look(case: CasePage, k: int) -> str:
    """Lines and heat map of one reference."""
    label, numbers = case.labels[k], case.numbers
    lines = [line for line in numbers["lines"] if line["reference"] == k]
    told = " ".join(
        f'<span class="line"><b>{letter}</b> {place(line["point"])} → {place(line["peak"])}: {percent(line["weight"])}</span>'
        for letter, line in zip(letters(), lines, strict=False)
    )
    kind = "Points of the cases file" if k in case.chosen else "The points whose attention is most focused"
    heat = heat_figure(k, label, case.result, case.attention.distributions[k], case.attention.target_grid)
    figure = lines_figure(k, label, lines, numbers, case.result.size)
    return (
        f'<section class="card look"><h3>{named(k, label)}</h3><div class="figures">'
        f'<div>{figure}<p><span class="soft">{kind}:</span> {told}</p></div><div>{heat}</div></div></section>'
    )


def _entropy_table(numbers: Mapping[str, Any]) -> str:
    """The curves as a table that opens."""
    entropy = numbers["entropy"]
    head = "".join(f'<th scope="col">reference {k + 1}</th>' for k in range(len(entropy[0])))
    rows = "".join(
        f'<tr><th scope="row">{step}</th>{"".join(f"<td>{value:.3f}</td>" for value in row)}</tr>' for step, row in enumerate(entropy, 1)
    )
    return (
        '<details><summary>The same as numbers</summary><div class="scroll"><table><caption>Entropy in nats; evenly spread: '
        f'{numbers["uniform_entropy"]:.3f}</caption><thead><tr><th scope="col">step</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "</div></details>"
    )


def _recipe(recipe: Mapping[str, Any]) -> str:
    """What made the picture."""
    facts = {
        "seed": recipe["seed"],
        "size": f"{recipe['width']} x {recipe['height']} px",
        "steps": recipe["num_inference_steps"],
        "guidance": f"{recipe['guidance_scale']:g}, of the references {recipe['image_guidance_scale']:g}",
        "references see": {"target": "text, picture and themselves", "joint": "everything", "isolated": "only themselves"}.get(
            recipe["reference_attention"], recipe["reference_attention"]
        ),
        "model": recipe["model"]["name"],
        "reference LoRA": recipe["lora"]["name"],
    }
    listed = "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in facts.items())
    whole = html.escape(json.dumps(recipe, ensure_ascii=False, indent=2))
    return f'<dl class="card">{listed}</dl><details><summary>The whole recipe</summary><pre>{whole}</pre></details>'
