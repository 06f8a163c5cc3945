"""The page that shows why a picture came out as it did (`--report`)."""

import html
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mosaic.attention_report import PictureAttention
from mosaic.cases.page_figures import (
    badge,
    entropy_chart,
    heat_figure,
    leakage_table,
    letters,
    lines_figure,
    name_of,
    percent,
    place,
    shown,
    symbols,
)
from mosaic.pages import page, png_uri, text

OVERVIEW = "report.html"
NOTABLE = 0.05  # of a reference's attention; a leak is spoken of if it is more than even attention would give by this
STYLE = """
.crumb { margin-bottom: 1.2rem; } .prompt { font-size: 1.2rem; } .soft { color: var(--soft); }
.badge { display: inline-flex; width: 1.65em; height: 1.65em; border: 3px solid; border-radius: 50%; background: #fff; color: var(--ink);
  align-items: center; justify-content: center; font-weight: 700; font-size: .85rem; margin-right: .45rem; flex: none; }
.hero { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 4fr); gap: 1.5rem; align-items: start; margin: 1.5rem 0; }
.references { margin-bottom: 1.2rem !important; display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: .8rem; list-style: none; margin: 0; padding: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem; }
.references .label, .who { display: flex; align-items: center; min-width: 0; } .references .label { margin-top: .5rem; }
.name { overflow-wrap: break-word; min-width: 0; } .line { display: inline-block; margin-right: 1rem; }
.summary { width: 100%; font-size: .92rem; } .summary th[scope=row] { text-align: left; font-weight: 500; padding-left: 0; }
.summary thead th { font-weight: 500; color: var(--soft); line-height: 1.2; vertical-align: bottom; } .summary thead th:first-child { text-align: left; padding-left: 0; } .references .name { font-size: .9rem; line-height: 1.25; }
svg.picture { display: block; width: 100%; } .result img { display: block; width: 100%; border: 0; border-radius: 5px; }
.result figcaption { margin-top: .5rem; } .hard { image-rendering: pixelated; } .symbols { position: absolute; }
.look { margin: 0 0 1rem; padding: 1rem; } .look .figures { display: grid; grid-template-columns: minmax(0, 2.15fr) minmax(0, 1fr); gap: 1rem; }
.look svg { display: block; width: 100%; height: auto; } .look h4 { margin: .6rem 0 .1rem; font-size: .9rem; font-weight: 600; color: var(--soft); }
.look p { margin: .4rem 0 0; font-size: .92rem; }
.scale { display: flex; gap: .6rem; align-items: center; color: var(--soft); font-size: .85rem !important; padding: 0 5%; }
.bar { flex: 1; height: .7rem; border-radius: 3px; border: 1px solid var(--line); background: linear-gradient(90deg, #d9d9d9, #86131f); }
.scroll { overflow-x: auto; } .finding { border-left: 4px solid var(--accent); padding: .7rem 1rem; background: var(--card); margin-bottom: 1.2rem; }
table.leakage td { text-align: center; min-width: 5.2rem; padding: .7rem .6rem; border: 1px solid #fff; font-weight: 600; }
table.leakage td.own { outline: 3px solid var(--ink); outline-offset: -3px; } table.leakage th { text-align: left; border: 0; font-weight: 500; }
table.leakage thead td { border: 0; } table.leakage thead th { vertical-align: bottom; padding: .3rem .6rem; max-width: 9rem; } table.leakage tfoot td, .rest { color: var(--soft); font-weight: 400 !important; }
table.leakage tfoot th { color: var(--soft); font-size: .88rem; line-height: 1.2; }
.chart { width: 100%; max-width: 860px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; font-size: 13px; fill: var(--ink); }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--accent); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; overflow-x: auto; font-size: .82rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; } dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem; list-style: none; margin: 1.5rem 0; padding: 0; }
.cases a { display: block; text-decoration: none; color: inherit; height: 100%; } .cases a:hover, .cases a:focus-visible { border-color: var(--accent); }
.cases h2 { margin: .6rem 0 .2rem; font-size: 1.05rem; color: var(--accent); text-decoration: underline; } .cases p { margin: 0 0 .4rem; }
.cases img { border: 0; width: 100%; height: 170px; object-fit: contain; }
@media (max-width: 760px) { .hero, .look .figures { grid-template-columns: 1fr; } }
@media print { body { background: #fff; max-width: none; } .look, .card { break-inside: avoid; } details > * { display: block; } }
"""


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
    pictures = [(f"reference{k}", picture) for k, picture in enumerate(case.references)]
    parts = [
        symbols([*pictures, ("result", case.result)]),
        f'<header><p class="crumb"><a href="{OVERVIEW}">← all pictures of this run</a></p><h1>{text(title)}</h1>'
        f'<p class="prompt"><bdi>{text(case.recipe["prompt"])}</bdi></p></header><main>',
        _hero(case),
        "<h2>Where each reference looks</h2>",
        "<p>Left: points of the reference, each with a line to the token of the picture that it attends to most. Right: the attention of the "
        "whole subject; darker is more. Attention is that of the reference’s tokens over the tokens of the picture, averaged over heads, "
        "blocks and sampling steps.</p>",
        *(_look(case, k) for k in range(len(case.references))),
        "<h2>Who looks at whose place</h2>",
        "<p>A token of the picture belongs to the reference with most peaks on it. Off the framed diagonal, attention leaks to the place of "
        "another reference: this is where subjects mix. Compare with the last row, which is the share of the picture that each one holds.</p>",
        leakage_table(case.labels, case.numbers),
        "<h2>How focused they are</h2>",
        "<p>Mean entropy of the attention of each subject’s tokens at every sampling step. 0 is all attention on one token; the dotted line is "
        "attention spread evenly over the picture.</p>",
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
    excess = {
        (i, j): share - numbers["owned"][j] for i, row in enumerate(numbers["leakage"]) for j, share in enumerate(row) if i != j
    }
    pair = max(excess, key=excess.__getitem__, default=None)
    return pair if pair is not None and excess[pair] >= NOTABLE else None


def _hero(case: CasePage) -> str:
    """The references and the result."""
    items = []
    for k, (label, entry) in enumerate(zip(case.labels, case.recipe["references"], strict=True)):
        strength = f'<br><span class="soft">strength {entry["strength"]:g}</span>' if entry["strength"] != 1 else ""
        picture = shown(f"reference{k}", f"Reference {k + 1}: {label}")
        items.append(f'<li class="card">{picture}<div class="label">{badge(k)}<span>{name_of(label)}{strength}</span></div></li>')
    look = ' class="hard"' if max(case.result.size) <= 256 else ""
    alt = f"The generated picture for: {case.recipe['prompt']}"
    figure = f'<figure class="card result"><img{look} alt="{text(alt)}" src="{png_uri(case.result)}"><figcaption>The result</figcaption></figure>'
    left = f'<ul class="references">{"".join(items)}</ul>{_finding(case.labels, case.numbers)}{_summary(case.labels, case.numbers)}'
    return f'<div class="hero"><div>{left}</div>{figure}</div>'


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
        f'<p class="finding"><strong>Strongest leak:</strong> reference {i + 1} ({text(labels[i])}) has {percent(share)} of its attention on the '
        f"place of reference {j + 1} ({text(labels[j])}){times}.</p>"
    )


def _summary(labels: Sequence[str], numbers: Mapping[str, Any]) -> str:
    """Per reference where its attention lies, and how many tokens an even spread of the last step's entropy would cover."""
    rows = []
    for k, (label, shares, last) in enumerate(zip(labels, numbers["leakage"], numbers["entropy"][-1], strict=True)):
        others = f"<td>{percent(sum(shares) - shares[k])}</td>" if len(labels) > 1 else ""
        rows.append(
            f'<tr><th scope="row"><span class="who">{badge(k)}{name_of(label)}</span></th><td>{percent(shares[k])}</td>{others}'
            f"<td>{math.exp(last):.0f} of {math.prod(numbers['target_grid'])}</td></tr>"
        )
    others = '<th scope="col">on others’ places</th>' if len(labels) > 1 else ""
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
        f'<section class="card look"><h3 class="who">{badge(k)}{name_of(label)}</h3><div class="figures">'
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
        f'<details><summary>The same as numbers</summary><div class="scroll"><table><caption>Entropy in nats; evenly spread: '
        f'{numbers["uniform_entropy"]:.3f}</caption><thead><tr><th scope="col">step</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>'
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
