"""The report of one picture: its numbers, its attention maps as a PNG and its page."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from mosaic.images import PreparedReference
from mosaic.pipeline.attention_report import Line, PictureAttention, attention_numbers
from mosaic.rendering.case_page import CasePage, case_page
from mosaic.rendering.recipes import PictureJob, page_digest
from mosaic.reports.figures import attention_panel


class Report(NamedTuple):
    """The report of one picture.

    Attributes:
        numbers: By `attention_numbers`, for the manifest.
        panel: Lines and heat maps.
        page: HTML.
    """

    numbers: dict[str, Any]
    panel: Image.Image
    page: str


def make_report(job: PictureJob, references: Sequence[PreparedReference], picture: Image.Image, attention: PictureAttention) -> Report:
    """The report of a job's picture.

    Args:
        job: The job.
        references: K reference pictures.
        picture: The result.
        attention: Where the references look in it.
    """
    prepared = [reference.picture for reference in references]
    lines = report_lines(job, references, attention)
    numbers = attention_numbers(attention, lines)
    chosen = [k for k, reference in enumerate(job.case.references) if reference.points]
    page = case_page(CasePage(job.recipe, page_digest(job), prepared, picture, attention, numbers, chosen))
    return Report(numbers, attention_panel(prepared, picture, attention, lines), page)


def report_lines(job: PictureJob, references: Sequence[PreparedReference], attention: PictureAttention) -> list[Line]:
    """Lines from the points that the cases file gives for a reference; from its strongest where it gives none."""
    lines: list[Line] = []
    grid = attention.reference_grid
    for k, (reference, prepared) in enumerate(zip(job.case.references, references, strict=True)):
        for point in reference.points:
            x, y = (position / prepared.size for position in prepared.position(point))
            lines.append(attention.line(k, int(y * grid.rows) * grid.columns + int(x * grid.columns)))
        if not reference.points:
            lines += attention.strongest(k)
    return lines
