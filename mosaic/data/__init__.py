"""Data sets: readers, the writer of our format, batches."""

from mosaic.data.manifest import Manifest
from mosaic.data.multi_reference import MultiReferenceDataset
from mosaic.data.opening import TrainingDataset, check_dataset, open_dataset
from mosaic.data.sampler import KBatchSampler
from mosaic.data.samples import MosaicBatch, Sample, collate
from mosaic.data.semalign import SemAlignDataset
from mosaic.data.writer import DatasetWriter, ReferenceRecord, SampleRecord

__all__ = [
    "DatasetWriter",
    "KBatchSampler",
    "Manifest",
    "MosaicBatch",
    "MultiReferenceDataset",
    "ReferenceRecord",
    "Sample",
    "SampleRecord",
    "SemAlignDataset",
    "TrainingDataset",
    "check_dataset",
    "collate",
    "open_dataset",
]
