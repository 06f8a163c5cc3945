"""What the sources share: a target, its references and a prompt as a record that is not matched yet."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mosaic.data.multi_reference.records import Picture, ReferenceRecord, SampleRecord, reference_grid_of, sample_id, target_grid_of
from mosaic.data.multi_reference.writer import decode_picture


def unmatched_sample(
    target: Picture,
    references: Sequence[ReferenceRecord],
    prompt: str,
    metadata: Mapping[str, object],
    split: str,
    grid: int,
) -> SampleRecord:
    """Make a record whose points have yet to be found.

    The target's grid has about `grid` x `grid` cells and follows its aspect; a reference's has `grid` cells along its longer side.
    Cells are square up to rounding.

    Args:
        target: Target picture.
        references: References without points and grids.
        prompt: Caption.
        metadata: Where the sample comes from.
        split: Split it belongs to.
        grid: Cells per side of a square picture.

    Raises:
        FileNotFoundError: A picture file is missing.
        ValueError: A picture does not decode, the prompt is empty or there are no references.
    """
    prompt = prompt.strip()
    if not prompt:
        raise ValueError("the prompt must not be empty.")
    if not references:
        raise ValueError("must have at least one reference, got none.")
    picture = decode_picture(target)
    pictures = [decode_picture(reference.image) for reference in references]
    square = (grid, grid)
    placed = []
    for reference, decoded in zip(references, pictures, strict=True):
        own = reference_grid_of((decoded.height, decoded.width), grid)
        placed.append(replace(reference, grid=None if own == square else own))
    return SampleRecord(
        id=sample_id([picture, *pictures], prompt),
        split=split,
        prompt=prompt,
        target=target,
        references=placed,
        reference_grid=square,
        target_grid=target_grid_of((picture.height, picture.width), grid),
        metadata=metadata,
    )
