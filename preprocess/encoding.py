"""What preprocess/cache.py does: the caches that a config names, filled from its data by its encoders."""

import argparse
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState

from mosaic.config.loading import Config
from mosaic.data import open_dataset
from mosaic.data.cache.opening import latent_encoding, text_encoding
from mosaic.locks import FolderLock, acquire_for_all
from mosaic.pipeline.encoders import LiveEncoders
from mosaic.pipeline.pipeline import DTYPES, MosaicFluxPipeline
from mosaic.training.encoding import run_grids
from mosaic.weights.components import TEXT_COMPONENTS
from mosaic.weights.digests import vae_scale_factor
from preprocess.caching import PictureSource, PromptSource, fill
from preprocess.extractors.arguments import check_device


def fill_caches(config: Config, arguments: argparse.Namespace, state: PartialState) -> list[str]:
    """Fill the caches that the config names, in folders that are locked until all processes are done; returns a summary of each.

    Raises:
        FileNotFoundError, OSError, ValueError: Settings, data or weights do not fit, or another run is filling one of the caches.
    """
    data = config.data
    device = check_device(arguments.device or str(state.device))
    factor = vae_scale_factor(config.model.pretrained)
    grids = run_grids(data, factor)
    with ExitStack() as locks:
        for name, folder in (("data.latent_cache", data.latent_cache), ("data.text_cache", data.text_cache)):
            if folder is not None:
                acquire_for_all(locks.enter_context(FolderLock(Path(folder), name)), state)
        with state.main_process_first():  # the index of ids of SemAlign data is made once
            dataset = open_dataset(data, data.split, grids.target, grids.reference)
        pipeline = load_encoders(config, factor).to(device)
        made_of = {"format": data.format, "root": data.root, "split": data.split, "shard_size": arguments.shard_size}
        summaries = []
        if data.latent_cache is not None:
            pictures = PictureSource(dataset, pipeline, data.skip_invalid, data.num_workers)
            summaries.append(fill(Path(data.latent_cache), pictures, latent_encoding(config), made_of, arguments.shard_size, state))
        if data.text_cache is not None:
            prompts = PromptSource(dataset, pipeline.encoders, config.model.text_length)
            summaries.append(fill(Path(data.text_cache), prompts, text_encoding(config), made_of, arguments.shard_size, state))
        state.wait_for_everyone()
    return summaries


def load_encoders(config: Config, vae_scale_factor: int) -> MosaicFluxPipeline:
    """The pipeline without its transformer, and without the encoders that are not needed; `vae_scale_factor` is what its VAE would say."""
    absent = ["transformer"]
    if config.data.latent_cache is None:
        absent.append("vae")
    if config.data.text_cache is None:
        absent.extend(TEXT_COMPONENTS)
    pretrained = config.model.pretrained
    pipeline = MosaicFluxPipeline.from_pretrained(pretrained, dtype=DTYPES[config.model.dtype], **dict.fromkeys(absent))
    pipeline.encoders = LiveEncoders(pipeline, vae_scale_factor)
    return pipeline


def run(config: Config, arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises as `fill_caches`."""
    # The first process to end waits for the last one, however long that takes.
    state = PartialState(cpu=(arguments.device or "").startswith("cpu"), timeout=timedelta(days=30))
    try:
        summaries = fill_caches(config, arguments, state)
    finally:
        state.destroy_process_group()
    for summary in summaries:
        print(f"process {state.process_index + 1} of {state.num_processes}: {summary}")
