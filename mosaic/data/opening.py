"""Opening the data set that a config names."""

from mosaic.config.sections import DataConfig
from mosaic.data.multi_reference.dataset import MultiReferenceDataset
from mosaic.data.semalign.dataset import SemAlignDataset
from mosaic.data.semalign.rows import SemAlignRows
from mosaic.method.grids import Grid

TrainingDataset = MultiReferenceDataset | SemAlignDataset


def open_dataset(
    data: DataConfig,
    split: str,
    target_grid: Grid,
    reference_grid: Grid,
    semalign_rows: SemAlignRows | None = None,
    with_masks: bool = False,
) -> TrainingDataset:
    """Open one split of the data set that `data.format` and `data.root` name; its `of_split` gives the others.

    Args:
        data: The settings.
        split: Split to read; `data.split` is not looked at.
        target_grid: Rows and columns of the target in tokens.
        reference_grid: Rows and columns of one reference in tokens.
        semalign_rows: The rows of SemAlign's Parquet files, where those are open already.
        with_masks: Whether samples bring their masks.

    Raises:
        FileNotFoundError: There is no such data set, or a file of it is missing.
        ValueError: The data set is damaged, has no such split, or does not fit the sizes.
    """
    if data.format == "semalign":
        return SemAlignDataset(
            data.root,
            data.image_size[0],
            data.downsample,
            reference_size=data.reference_size,
            token_size=data.image_size[0] // target_grid.rows,
            split=split,
            heldout_share=data.heldout_share,
            parquet=data.parquet,
            masks=data.masks,
            coordinates=data.coordinates,
            id_index=data.id_index,
            rows=semalign_rows,
            with_masks=with_masks,
        )
    return MultiReferenceDataset(
        data.root,
        split=split,
        image_size=data.image_size,
        reference_size=data.reference_size,
        target_token_grid=target_grid,
        reference_token_grid=reference_grid,
        max_references=data.max_references,
        buckets=data.buckets,
        with_masks=with_masks,
        reference_order=data.reference_order,
    )
