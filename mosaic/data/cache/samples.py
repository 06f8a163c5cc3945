"""Samples with what the caches hold for them, so that training encodes nothing."""

from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mosaic.data.cache.latents import LatentCache
from mosaic.data.cache.texts import TextCache
from mosaic.data.inspection import Inspection
from mosaic.data.samples import Sample


class CachedSamples(Dataset[Sample]):
    """The samples of a data set with cached posteriors, cached embeddings, or both.

    Pictures are still read and framed: points need their sizes, and the cache is asked by their pixels. That is the loader's work,
    which does not hold up a GPU; what is saved is the encoders' time and memory.
    """

    def __init__(self, dataset: Any, latents: LatentCache | None, text: TextCache | None) -> None:
        """Check that the caches cover the data set, by the names of the samples and by their prompts.

        Raises:
            ValueError: A sample or prompt is missing.
        """
        self.dataset, self.latents, self.text = dataset, latents, text
        if latents is not None:
            latents.check_names(dataset.sample_ids(), "samples")
        if text is not None:
            text.check_names(dict.fromkeys(dataset.prompts()), "prompts")

    @property
    def batch_keys(self) -> np.ndarray:
        """int [N, columns]: what the samples of one batch must share, as the data set says it."""
        return self.dataset.batch_keys

    @property
    def num_references(self) -> np.ndarray:
        """K of each sample."""
        return self.batch_keys[:, 0]

    def sample_ids(self) -> list[str | None]:
        """Names of the samples."""
        return self.dataset.sample_ids()

    def prompts(self) -> list[str]:
        """Prompts of the samples."""
        return self.dataset.prompts()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            FileNotFoundError, ValueError: As the data set; or the cache does not hold these pixels or this prompt.
        """
        sample = self.dataset[index]
        posteriors = None if self.latents is None else self.latents.posteriors(sample)
        text = None if self.text is None else self.text.embeddings(sample.prompt)
        return replace(sample, posteriors=posteriors, text=text)

    def inspect(self, index: int) -> Inspection:
        """Look at one sample as it is stored."""
        return self.dataset.inspect(index)
