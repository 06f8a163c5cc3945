"""The references' keys and values of every block, kept from one sampling step for the next ones.

Isolated references see only themselves and timestep 0, so theirs are the same at every step and the cache is exact. In the other modes
references see the target: keys and values of an earlier step are an approximation, to be renewed every few steps.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mosaic.model.attention import BlockReferences


class KeptReferences(NamedTuple):
    """The references of one forward pass, for passes without them.

    Attributes:
        blocks: One entry per block, double-stream blocks first.
        num_references: K.
        num_reference_tokens: N_ref, per reference.
    """

    blocks: tuple[BlockReferences, ...]
    num_references: int
    num_reference_tokens: int

    @property
    def num_bytes(self) -> int:
        """Memory of its tensors."""
        return sum(tensor.nbytes for block in self.blocks for tensor in block if tensor is not None)


def reference_cache_bytes(
    transformer_config: Mapping[str, Any],
    num_references: int,
    num_reference_tokens: int,
    batch_size: int = 1,
    bytes_per_number: int = 2,
    with_attention: bool = False,
) -> int:
    """Memory of kept references in bytes, known beforehand: 0.67 GiB per 512 px reference of FLUX.1-dev in bfloat16.

    Args:
        transformer_config: `transformer/config.json` of a diffusers FLUX folder.
        num_references: K.
        num_reference_tokens: N_ref, per reference.
        batch_size: Pictures that are sampled together.
        bytes_per_number: 2 for bfloat16, 4 for float32.
        with_attention: Whether attention is read in every block, which takes the queries as well.
    """
    blocks = transformer_config["num_layers"] + transformer_config["num_single_layers"]
    width = transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"]
    return (3 if with_attention else 2) * blocks * width * num_references * num_reference_tokens * batch_size * bytes_per_number


def refresh_interval(reference_cache: bool, refresh_references: int | None, reference_attention: str) -> float:
    """Sampling steps from one computation of the references to the next: 1 is every step, infinity never again.

    Args:
        reference_cache: Whether to compute them once.
        refresh_references: Whether to compute them every so many steps; None: no.
        reference_attention: "target", "joint" or "isolated".

    Raises:
        ValueError: If these do not fit each other.
    """
    if refresh_references is not None and (
        not isinstance(refresh_references, int) or isinstance(refresh_references, bool) or refresh_references < 1
    ):
        raise ValueError(f"refresh_references must be a positive integer or None, got {refresh_references!r}.")
    if reference_cache and reference_attention != "isolated":
        raise ValueError(
            f'reference_cache needs reference_attention "isolated", got "{reference_attention}": there references see the target and '
            "change at every step. Leave it out, or compute them every N steps only, an approximation: refresh_references=N."
        )
    if refresh_references is not None and reference_attention == "isolated":
        raise ValueError(
            'refresh_references is for the modes "target" and "joint": isolated references are the same at every step. Use reference_cache.'
        )
    if reference_cache:
        return math.inf
    return 1 if refresh_references is None else refresh_references


class CachedTransformer:
    """The transformer with one set of references, which it computes only every so many sampling steps.

    Attributes:
        kept: The references of the last pass that computed them; None before, and where every pass does.
    """

    def __init__(self, transformer: Callable[..., Any], references: Mapping[str, Any], interval: float) -> None:
        """Nothing is computed yet.

        Args:
            transformer: A `MosaicFluxTransformer2DModel`.
            references: Its arguments that have to do with references; empty without references.
            interval: Sampling steps from one computation of the references to the next (`refresh_interval`).
        """
        self.transformer, self.references = transformer, dict(references)
        self.interval = interval if references else 1
        self.kept: KeptReferences | None = None

    def __call__(self, step: int, **inputs: Any) -> Any:
        """The transformer's output at a sampling step; `inputs` are its other arguments."""
        if self.kept is not None and step % self.interval:
            shared = {key: value for key, value in self.references.items() if key in ("capture", "reference_strength")}
            return self.transformer(**inputs, **shared, kept_references=self.kept)
        self.kept = None  # frees them before the next ones are made: the two together would double the memory
        output = self.transformer(**inputs, **self.references, keep_references=self.interval > 1)
        self.kept = output.kept_references
        return output
