"""Data sets: readers, the writer of our format, batches."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mosaic.data.cache.samples import CachedSamples
    from mosaic.data.inspection import Inspection, check_supervision
    from mosaic.data.multi_reference.dataset import MultiReferenceDataset
    from mosaic.data.multi_reference.manifest import Manifest
    from mosaic.data.multi_reference.records import ReferenceRecord, SampleRecord, sample_id
    from mosaic.data.multi_reference.rows import ReferenceEntry, Row
    from mosaic.data.multi_reference.writer import DatasetWriter
    from mosaic.data.opening import TrainingDataset, open_dataset
    from mosaic.data.placement import check_placement
    from mosaic.data.readable import ReadableSamples, find_unreadable
    from mosaic.data.sampler import BucketBatchSampler
    from mosaic.data.samples import MosaicBatch, Sample, collate
    from mosaic.data.semalign.dataset import SemAlignDataset

__all__ = [
    "BucketBatchSampler",
    "CachedSamples",
    "DatasetWriter",
    "Inspection",
    "Manifest",
    "MosaicBatch",
    "MultiReferenceDataset",
    "ReadableSamples",
    "ReferenceEntry",
    "ReferenceRecord",
    "Row",
    "Sample",
    "SampleRecord",
    "SemAlignDataset",
    "TrainingDataset",
    "check_placement",
    "check_supervision",
    "collate",
    "find_unreadable",
    "open_dataset",
    "sample_id",
]

_MODULES = {
    "cache.samples": ("CachedSamples",),
    "inspection": ("Inspection", "check_supervision"),
    "multi_reference.dataset": ("MultiReferenceDataset",),
    "multi_reference.manifest": ("Manifest",),
    "multi_reference.records": ("ReferenceRecord", "SampleRecord", "sample_id"),
    "multi_reference.rows": ("ReferenceEntry", "Row"),
    "multi_reference.writer": ("DatasetWriter",),
    "opening": ("TrainingDataset", "open_dataset"),
    "placement": ("check_placement",),
    "readable": ("ReadableSamples", "find_unreadable"),
    "sampler": ("BucketBatchSampler",),
    "samples": ("MosaicBatch", "Sample", "collate"),
    "semalign.dataset": ("SemAlignDataset",),
}
_EXPORTS = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    # Imported on first use, so that a command line that names a data set does not wait for torch.
    if name in _EXPORTS:
        return getattr(import_module(f"mosaic.data.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'mosaic.data' has no attribute {name!r}")
