"""Which settings fit which cards: predicted memory of FLUX.1-dev's training and inference over K, resolution and what saves memory."""

from collections.abc import Mapping
from typing import NamedTuple

from tqdm import tqdm

from mosaic.config.loading import Config, from_dict
from mosaic.planning.inference_memory import Demand, predict_inference
from mosaic.planning.memory_model import EMA, ENCODERS, GIB, SAVED, dry_parts, kept_attention_bytes, predict_memory
from mosaic.planning.model_shape import FLUX_DEV_SHAPE, ModelShape
from mosaic.planning.preflight import FITS_BELOW
from mosaic.rendering.memory_presets import PRESETS

#: GB by the card's name: GiB that CUDA reports for an RTX 3060, an RTX 4080, an RTX 4090, an RTX A6000, an H100 and an H200.
CARDS = {12: 11.6, 16: 15.6, 24: 23.6, 48: 47.5, 80: 79.2, 141: 139.8}
TRAINING_CARDS = (24, 48, 80, 141)
SIZES, REFERENCES = (512, 1024), (1, 2, 4, 6)
RANKS = (128, 512)  # the paper's, and that of the published file


class Choice(NamedTuple):
    """Settings of one column: `model.quantization`, `model.gradient_checkpointing`, and whether the encoders' results are cached."""

    quantization: str
    checkpointing: str
    cached: bool

    @property
    def name(self) -> str:
        """For a table's head."""
        base = "bf16" if self.quantization == "none" else self.quantization
        return f"{base}, {self.checkpointing}, {'cached' if self.cached else 'live'}"


#: From the fastest steps to the least memory.
CHOICES = (
    Choice("none", "none", False),
    Choice("none", "none", True),
    Choice("none", "keep_attention", True),
    Choice("none", "block", True),
    Choice("int8", "keep_attention", True),
    Choice("int8", "block", True),
    Choice("nf4", "keep_attention", True),
    Choice("nf4", "block", True),
)


def config_of(size: int) -> Config:
    """Defaults at a resolution: rank 128, batch 1, bf16 autocast, losses on all blocks, no EMA."""
    return from_dict({"data": {"image_size": [size, size], "reference_size": 512}})


def interpolated(first: Mapping[str, int], last: Mapping[str, int], num_references: int) -> dict[str, int]:
    """Parts between those of the least and the most references.

    Exact for what grows with the tokens; a peak is the largest of several such lines, so that it lies below its chord: never too low.
    """
    share = (num_references - REFERENCES[0]) / (REFERENCES[-1] - REFERENCES[0])
    return {name: round((1 - share) * first.get(name, 0) + share * last.get(name, 0)) for name in {**first, **last}}


def totals(shape: ModelShape = FLUX_DEV_SHAPE) -> dict[tuple[int, int], dict[Choice, float]]:
    """Predicted GiB by (px, K) and choice."""
    result: dict[tuple[int, int], dict[Choice, float]] = {}
    steps = [(size, mode) for size in SIZES for mode in (False, True)]
    measured: dict[tuple[int, bool], tuple[dict[str, int], dict[str, int]]] = {}
    for size, recomputed in tqdm(steps, desc="dry runs", unit="setting"):
        config = with_checkpointing(config_of(size), recomputed)
        measured[size, recomputed] = (dry_parts(config, shape, REFERENCES[0]), dry_parts(config, shape, REFERENCES[-1]))
    for size in SIZES:
        config = config_of(size)
        for k in REFERENCES:
            result[size, k] = {}
            for choice in CHOICES:
                parts = interpolated(*measured[size, choice.checkpointing != "none"], k)
                if choice.checkpointing == "keep_attention":
                    parts[SAVED] += kept_attention_bytes(config, shape, k)
                result[size, k][choice] = total_of(config, shape, k, choice, parts)
    return result


def with_checkpointing(config: Config, recomputed: bool) -> Config:
    """The config with or without recomputed blocks."""
    return config.replace(model=config.model.replace(gradient_checkpointing="block" if recomputed else "none"))


def total_of(config: Config, shape: ModelShape, num_references: int, choice: Choice, parts: Mapping[str, int]) -> float:
    """GiB of one cell."""
    memory = predict_memory(config, shape, num_references, dry=parts, quantization=choice.quantization)
    assert memory[EMA] == 0
    if choice.cached:
        memory[ENCODERS] = 0
    return sum(memory.values()) / GIB


def best_fit(cells: Mapping[Choice, float], card: float) -> Choice | None:
    """The first choice that fits a card of so many GiB."""
    return next((choice for choice in CHOICES if cells[choice] <= FITS_BELOW * card), None)


def print_table() -> None:
    """Both tables as Markdown: predicted GiB, and the first choice that fits each card."""
    result = totals()
    print("Predicted GiB of one process, FLUX.1-dev, rank 128, batch 1, bf16, references of 512 px; base, recomputation, encoders:\n")
    print("| px | K | " + " | ".join(choice.name for choice in CHOICES) + " |\n|---|---|" + "---:|" * len(CHOICES))
    for (size, k), cells in result.items():
        print(f"| {size} | {k} | " + " | ".join(f"{cells[choice]:.1f}" for choice in CHOICES) + " |")
    print(f"\nThe fastest of these that fits into {FITS_BELOW:.0%} of a card:\n")
    print("| px | K | " + " | ".join(f"{card} GB" for card in TRAINING_CARDS) + " |\n|---|---|" + "---|" * len(TRAINING_CARDS))
    for (size, k), cells in result.items():
        best = [best_fit(cells, CARDS[card]) for card in TRAINING_CARDS]
        print(f"| {size} | {k} | " + " | ".join("none of these" if choice is None else choice.name for choice in best) + " |")


def print_inference_table(shape: ModelShape = FLUX_DEV_SHAPE) -> None:
    """The memory presets as Markdown: predicted GiB of the fullest stage, and the stage."""
    config = config_of(SIZES[0])
    print("Predicted GiB at the fullest moment of rendering one picture, FLUX.1-dev, bf16, references of 512 px, mode target:\n")
    print("| rank | px | K | " + " | ".join(PRESETS) + " |\n|---|---|---|" + "---:|" * len(PRESETS))
    rows = [(rank, size, k) for rank in RANKS for size in SIZES for k in REFERENCES]
    for rank, size, k in tqdm(rows, desc="dry runs", unit="row"):
        peaks = [predict_inference(config, shape, preset, Demand(size, size, k), rank).peak for preset in PRESETS.values()]
        tqdm.write(f"| {rank} | {size} | {k} | " + " | ".join(f"{peak / GIB:.1f}" for peak in peaks) + " |")
    print("\nWhat they do:\n")
    for preset in PRESETS.values():
        needs = f" (needs {' and '.join(preset.packages)})" if preset.packages else ""
        print(f"- {preset.name}: {preset.describe()}{needs}")
