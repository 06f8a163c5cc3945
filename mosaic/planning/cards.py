"""Graphics cards that a run may be planned for: their memory as CUDA reports it, and by the maker's data sheet their speed."""

from typing import NamedTuple

from mosaic.files import nearest
from mosaic.training.watch.throughput import peak_of

LIKE = 0.08  # cards whose memory differs by no more than this share are looked at together


class Card(NamedTuple):
    """A card.

    Attributes:
        name: As people call it.
        memory: GiB, about as CUDA reports it.
        peak_tflops: Dense bf16 products.
    """

    name: str
    memory: float
    peak_tflops: float


_MEMORY = {
    "RTX 3090": 23.6,
    "RTX 4090": 23.6,
    "L4": 22.5,
    "RTX 5090": 31.4,
    "A100 40GB": 39.4,
    "L40S": 45.0,
    "RTX A6000": 47.5,
    "RTX 6000 Ada": 47.5,
    "A100 80GB": 79.2,
    "H100 PCIe": 79.2,
    "H100": 79.2,
    "H100 NVL": 93.1,
    "H200": 139.8,
    "B200": 178.4,
}
CARDS = tuple(Card(name, memory, peak) for name, memory in _MEMORY.items() if (peak := peak_of(name)) is not None)


def cards_of_size(memory: float) -> list[Card]:
    """The known cards of about so many GiB, the slowest first."""
    return sorted((card for card in CARDS if abs(card.memory - memory) <= LIKE * memory), key=lambda card: card.peak_tflops)


def find_card(name: str) -> Card:
    """The card of a name, or of a part of it that no other has.

    Raises:
        ValueError: None or several are meant.
    """
    word = " ".join(name.split()).casefold()
    exact = [card for card in CARDS if card.name.casefold() == word]
    found = exact or [card for card in CARDS if word and word in card.name.casefold()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"--gpu: must name one card, but {name!r} may be {', '.join(card.name for card in found)}.")
    known = [card.name for card in CARDS]
    raise ValueError(f"--gpu: must be a known card, got {name!r}.{nearest(name, known)} Known: {', '.join(known)}; else --gpu-memory GIB.")
