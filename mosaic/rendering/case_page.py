"""The page that shows why a picture came out as it did (`--report`)."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from mosaic.pipeline.attention_report import PictureAttention
from mosaic.rendering.folder import OVERVIEW
from mosaic.rendering.recipe import Recipe
from mosaic.reports.case_figures import SIDE, entropy_chart, heat_figure, lines_figure
from mosaic.reports.html import page

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

    recipe: Recipe
    digest: str
    references: Sequence[Image.Image]
    result: Image.Image
    attention: PictureAttention
    numbers: dict[str, Any]
    chosen: Collection[int] = ()


def case_page(case: CasePage) -> str:
    """The page of one picture, as HTML."""
    heading, attention = case_title(case.recipe.name), case.attention
    references = {f"reference{k}": picture for k, picture in enumerate(case.references)}
    return page(
        "case.html.jinja",
        title=f"{heading}: {case.recipe.prompt}",
        digest=case.digest,
        overview=OVERVIEW,
        heading=heading,
        recipe=case.recipe,
        whole_recipe=json.dumps(case.recipe.to_json(), ensure_ascii=False, indent=2),
        labels=case.recipe.labels,
        chosen=case.chosen,
        pictures={**references, "result": case.result},
        side=SIDE,
        numbers=case.numbers,
        leak=strongest_leak(case.numbers),
        # How many tokens an even spread of the last step's entropy would cover.
        spread=[math.exp(entropy) for entropy in case.numbers["entropy"][-1]],
        lines=[lines_figure(k, case.numbers, case.result.size) for k in range(len(case.references))],
        heats=[heat_figure(case.result, distribution, attention.target_grid) for distribution in attention.distributions],
        entropy_chart=entropy_chart(case.recipe.labels, case.numbers),
    )


def case_title(name: str) -> str:
    """A picture's name as a heading: "case_007_seed_3" -> "Case 7, seed 3"."""
    found = re.fullmatch(r"case_(\d+)(?:_seed_(\d+))?", name)
    return f"Case {int(found[1])}" + (f", seed {found[2]}" if found[2] else "") if found else name


def strongest_leak(numbers: Mapping[str, Any]) -> tuple[int, int] | None:
    """(i, j): reference i has the most attention on the place of j beyond that place's share of the picture; None if that is little."""
    excess = {(i, j): share - numbers["owned"][j] for i, row in enumerate(numbers["leakage"]) for j, share in enumerate(row) if i != j}
    pair = max(excess, key=excess.__getitem__, default=None)
    return pair if pair is not None and excess[pair] >= NOTABLE else None
