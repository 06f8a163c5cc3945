"""The part of a page that an ablation fills: its main tables and figures, between two markers."""

import os
from pathlib import Path
from typing import Any

from mosaic.files import write_text
from scripts.ablation.tables import (
    EXACT,
    FRECHET,
    IDENTIFICATION,
    LEAKAGE,
    NEAR,
    OVERLAP,
    attention_table,
    by_arm,
    contrast_k_table,
    contrast_table,
    gradient_table,
    k_table,
    summary_table,
    target_rows_table,
)

MARKER = "<!-- ablation -->"
FIGURES = (  # of a part: file and text
    ("main", "k_identification.svg", "identification over K"),
    ("main", "k_attention_near.svg", "attention within one token over K"),
    ("factors", "factors_k2.svg", "one factor at a time"),
    ("main", "lines.png", "reference points and their peaks"),
)
MEASURES = (IDENTIFICATION, LEAKAGE, EXACT, NEAR, OVERLAP, FRECHET)
SUMMARY_K = 2


def block(results: dict[str, Any], folder: str) -> str:
    """The tables and figures as Markdown.

    Args:
        results: Of the ablation.
        folder: Of the report, relative to the page.
    """
    size, hardware, seconds = results["size"], results["hardware"], results["seconds"]
    hours = {name: f"{value / 3600:.1f} h" for name, value in seconds.items()}
    made = (
        f"{results['date'][:10]}, {size['seeds']} training seeds, {size['steps']:,} steps of batch {size['batch_size']} "
        f"(one-factor variants: {size['factor_seeds']} of {size['factor_steps']:,}), {size['cases']} held-out scenes per K, in brackets "
        f"95 % intervals for other seeds and scenes (Frechet distance, pulls: for other seeds); {hardware['processor']}, "
        f"{hardware['cores']} cores, {hardware['side_by_side']} runs side by side: training {hours['training']}, measuring "
        f"{hours['measuring']}, added up over all runs. All tables, and every number's run: [report.md]({folder}/report.md)."
    )
    parts = [made, summary_table(results, SUMMARY_K, MEASURES), contrast_table(results)]
    parts += [k_table(results, IDENTIFICATION), contrast_k_table(results)]
    parts += [gradient_table(results, [SUMMARY_K]), target_rows_table(results, [SUMMARY_K])]
    if by_arm(results, "attention"):
        parts.append(attention_table(results))
    parts += [f"![{text}]({folder}/{name})" for part, name, text in FIGURES if by_arm(results, part)]
    return "\n\n".join(parts)


def put_into(page: Path, results: dict[str, Any], report: Path) -> None:
    """Write the tables and figures of a report into a page.

    Raises:
        FileNotFoundError: There is no such page.
        ValueError: It has not exactly two markers, or the ablation is not finished.
    """
    if not results["complete"]:
        raise ValueError(f"{page}: only a finished ablation goes into a page; start the same scripts/ablation.py again to finish it.")
    parts = page.read_text(encoding="utf-8").split(f"{MARKER}\n")
    if len(parts) != 3:
        raise ValueError(f'{page}: must have two lines "{MARKER}", between which the tables go, got {len(parts) - 1}.')
    folder = Path(os.path.relpath(report.parent, page.parent)).as_posix()
    write_text(page, f"{parts[0]}{MARKER}\n{block(results, folder)}\n\n{MARKER}\n{parts[2]}")
