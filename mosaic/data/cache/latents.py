"""The latent cache: VAE posteriors by the pixels that they were made of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mosaic.data.cache.tensors import COMMAND, TensorCache, content_key
from mosaic.data.samples import Posteriors, Sample

KIND, SETTING = "latents", "data.latent_cache"


def picture_key(picture: Tensor) -> bytes:
    """The key of a picture as the VAE gets it.

    Args:
        picture: float32 [3, H, W] in [-1, 1], made of 8-bit pixels in the training frame.
    """
    pixels = (picture + 1).mul_(127.5).round_().to(torch.uint8)
    return content_key(str(tuple(pixels.shape)).encode(), pixels.contiguous().numpy().tobytes())


@torch.no_grad()
def encode_sample(vae: AutoencoderKL, sample: Sample) -> dict[bytes, dict[str, Tensor]]:
    """The entries of a sample's pictures by key: {"moments": [2 C, h, w]}, the posterior's mean, then its logarithmic variance.

    The target is encoded alone and the references together, as training does at batch size 1: so the tensors are equal bit by bit. At
    other batch sizes the kernels of the VAE may sum in another order.
    """
    entries: dict[bytes, dict[str, Tensor]] = {}
    for pictures in (sample.target[None], sample.references):
        moments = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.parameters.cpu()
        entries |= {picture_key(picture): {"moments": one} for picture, one in zip(pictures, moments, strict=True)}
    return entries


class LatentCache(TensorCache):
    """Reads the posteriors of samples. Pictures are compared by their pixels, so that changed pictures never pass."""

    def __init__(self, root: str | Path, encoding: Mapping[str, Any]) -> None:
        """Open the cache; see `TensorCache`.

        Args:
            root: Folder of the cache.
            encoding: `mosaic.data.cache.opening.latent_encoding` of the run.
        """
        super().__init__(root, SETTING, KIND, encoding)

    def posteriors(self, sample: Sample) -> Posteriors:
        """Read the posteriors of a sample's pictures.

        Raises:
            ValueError: A picture is not in the cache.
        """
        moments = [self._moments(sample, picture, where) for picture, where in _pictures(sample)]
        vae = self.encoding["vae"]
        return Posteriors(moments[0], torch.stack(moments[1:]), vae["shift_factor"], vae["scaling_factor"])

    def _moments(self, sample: Sample, picture: Tensor, where: str) -> Tensor:
        entry = self.read(picture_key(picture))
        if entry is None:
            shard = self.shard_of(sample.id)
            cure = "The same command adds it" if shard is None else f"Remove {shard} and build it again"
            raise ValueError(
                f'{SETTING}: the cache in {self.root} does not hold the {where} of the sample "{sample.id}" as it is now: it was changed '
                f"since, or this machine decodes pictures otherwise. {cure}: {COMMAND}"
            )
        return entry["moments"]


def cached_latent_bytes(
    target_size: tuple[int, int], reference_size: int, num_references: int, scale_factor: int = 8, channels: int = 16, value_bytes: int = 2
) -> int:
    """Bytes of one sample in the latent cache; keys and headers add less than 0.1 %.

    Args:
        target_size: Height and width of the target in pixels.
        reference_size: Side of the references in pixels.
        num_references: K.
        scale_factor: Pixels per latent cell.
        channels: Latent channels C; mean and logarithmic variance make 2 C.
        value_bytes: Of one number: 2 for bfloat16, 4 for float32.
    """
    pixels = target_size[0] * target_size[1] + num_references * reference_size**2
    return pixels // scale_factor**2 * 2 * channels * value_bytes


def _pictures(sample: Sample) -> list[tuple[Tensor, str]]:
    return [(sample.target, "target"), *((reference, f"reference {k}") for k, reference in enumerate(sample.references))]
