"""The chart of attention entropy over the sampling steps, as SVG: one curve per reference, named at its end."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mosaic.reports.case_figures import DASHES, colour
from mosaic.reports.html import text

WIDTH, HEIGHT = 760, 340  # px
LEFT, RIGHT, TOP, BOTTOM = 56, 190, 18, 46  # px, margins; the names stand in the right one
LABEL_DISTANCE = 19  # px between the names of two curves
LABEL_LETTERS = 20
NUM_STEP_LABELS = 5


def entropy_chart(labels: Sequence[str], numbers: Mapping[str, Any]) -> str:
    """One curve per reference; the dotted line is attention spread evenly.

    Args:
        labels: Of the references.
        numbers: By `mosaic.pipeline.attention_report.attention_numbers`.
    """
    entropy, limit = numbers["entropy"], numbers["uniform_entropy"]
    place = _Scale(len(entropy), limit)
    curves = [[row[k] for row in entropy] for k in range(len(labels))]
    names = _apart([place.y(limit), *(place.y(curve[-1]) for curve in curves)])
    parts = [_axes(place, len(entropy), limit), _label(names[0], f"even: {limit:.2f}")]
    for k, (curve, name_y) in enumerate(zip(curves, names[1:], strict=True)):
        path = " ".join(f"{place.x(step):.1f},{place.y(value):.1f}" for step, value in enumerate(curve))
        x, y, look = place.x(len(curve) - 1), place.y(curve[-1]), f'stroke="{colour(k)}"'
        parts.append(f'<polyline points="{path}" fill="none" {look} stroke-width="2.5" stroke-dasharray="{DASHES[k % len(DASHES)]}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour(k)}"/>')
        parts.append(f'<line x1="{x + 5:.1f}" y1="{y:.1f}" x2="{x + 12:.1f}" y2="{name_y:.1f}" {look}/>')
        parts.append(_label(name_y, f'<tspan font-weight="700">{k + 1}</tspan> {text(_short(labels[k]))}'))
    told = "; ".join(f"reference {k + 1}: {curve[0]:.2f} at the first step, {curve[-1]:.2f} at the last" for k, curve in enumerate(curves))
    alt = f"Entropy in nats over the sampling steps. {told}. Attention spread evenly has {limit:.2f}."
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(alt)}">{"".join(parts)}</svg>'


class _Scale:
    """From steps and nats to px."""

    def __init__(self, num_steps: int, limit: float) -> None:
        self.num_steps, self.highest = num_steps, max(limit, 1e-9) * 1.04

    def x(self, step: int) -> float:
        return LEFT + step / max(self.num_steps - 1, 1) * (WIDTH - LEFT - RIGHT)

    def y(self, nats: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - nats / self.highest)


def _axes(place: _Scale, num_steps: int, limit: float) -> str:
    """Grid, numbers, names of the axes, and the line of even attention."""
    end, parts = WIDTH - RIGHT, []
    for nats in range(int(limit) + 1):
        y = place.y(nats)
        parts.append(f'<line x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e6e7eb"/>')
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{nats}</text>')
    for step in sorted({part * (num_steps - 1) // (NUM_STEP_LABELS - 1) for part in range(NUM_STEP_LABELS)}):
        parts.append(f'<text x="{place.x(step):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{step + 1}</text>')
    y = place.y(limit)
    parts.append(f'<line x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}" stroke="#5b606b" stroke-width="1.5" stroke-dasharray="3 4"/>')
    parts.append(f'<text x="{(LEFT + end) / 2}" y="{HEIGHT - 6}" text-anchor="middle">sampling step</text>')
    parts.append(f'<text x="{LEFT - 10}" y="{TOP - 4}" text-anchor="end">nats</text>')
    return "".join(parts)


def _label(y: float, content: str) -> str:
    """HTML at the end of a curve."""
    return f'<text x="{WIDTH - RIGHT + 14}" y="{y + 4:.1f}">{content}</text>'


def _apart(heights: Sequence[float]) -> list[float]:
    """The heights, moved down and then up where that is needed so that any two differ by LABEL_DISTANCE."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    moved, lowest = list(heights), HEIGHT - BOTTOM + 4.0
    for before, index in itertools.pairwise(order):
        moved[index] = max(moved[index], moved[before] + LABEL_DISTANCE)
    for index in reversed(order):
        moved[index] = min(moved[index], lowest)
        lowest = moved[index] - LABEL_DISTANCE
    return moved


def _short(label: str) -> str:
    return label if len(label) <= LABEL_LETTERS else label[: LABEL_LETTERS - 1] + "…"
