"""Data sets: readers, the writer of our format, batches."""

from mosaic.data.cache.samples import CachedSamples
from mosaic.data.inspection import Inspection, check_supervision
from mosaic.data.multi_reference.dataset import MultiReferenceDataset
from mosaic.data.multi_reference.manifest import Manifest
from mosaic.data.multi_reference.records import ReferenceRecord, SampleRecord, sample_id
from mosaic.data.multi_reference.rows import ReferenceEntry, Row
from mosaic.data.multi_reference.writer import DatasetWriter
from mosaic.data.opening import TrainingDataset, open_dataset
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
    "check_supervision",
    "collate",
    "find_unreadable",
    "open_dataset",
    "sample_id",
]
