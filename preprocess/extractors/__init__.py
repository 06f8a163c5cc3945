"""Feature extractors by name. Their modules are imported when one is built, so that a name alone costs nothing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mosaic.config.schema import Section
from mosaic.files import nearest

if TYPE_CHECKING:
    import torch

    from preprocess.extractors.protocol import Extractor

EXTRACTORS: dict[str, tuple[str, str, str]] = {
    "dift": ("dift", "Dift", "DiftOptions"),
    "cleandift": ("dift", "CleanDift", "CleanDiftOptions"),
    "geoaware": ("geoaware", "Geoaware", "GeoawareOptions"),
    "dinov2": ("dino", "Dino", "Dinov2Options"),
    "dinov2_diysc": ("dino", "Dinov2Diysc", "Dinov2DiyscOptions"),
    "dinov3": ("dino", "Dino", "Dinov3Options"),
    "flux": ("flux", "Flux", "FluxOptions"),
    "vae": ("vae", "Vae", "VaeOptions"),
    "pixels": ("pixels", "Pixels", "PixelsOptions"),
}
"""Per name the module, the extractor's class and its options' class."""
WEAK = frozenset({"pixels", "vae"})
"""Those that compare colours and local appearance, and know no part of a subject by its meaning."""


@dataclass(frozen=True)
class ExtractorSpec:
    """A named extractor and its options, checked but not built yet."""

    name: str
    options: Section


def extractor_spec(name: str, options: Mapping[str, Any] | None = None) -> ExtractorSpec:
    """Check the name and the options of an extractor.

    Args:
        name: One of `EXTRACTORS`.
        options: Settings that differ from the defaults.

    Raises:
        ValueError: An unknown name or option, or a value that does not fit.
    """
    if name not in EXTRACTORS:
        cure = nearest(name, EXTRACTORS) or f" Known: {', '.join(EXTRACTORS)}."
        raise ValueError(f'there is no extractor "{name}".{cure}')
    module, _, options_name = EXTRACTORS[name]
    return ExtractorSpec(name, getattr(import_module(f"preprocess.extractors.{module}"), options_name)(**(options or {})))


def weakness(names: Iterable[str]) -> str | None:
    """What must be said where only weak extractors match; None where another one is among them."""
    names = list(names)
    if not names or not WEAK.issuperset(names):
        return None
    return (
        f"weak extractors only ({', '.join(names)}): they compare colours and local appearance and know no parts, so that most of their "
        "matches on photographs are wrong. For real data use learned ones, such as dift and dinov2"
    )


def build_extractor(spec: ExtractorSpec, device: "torch.device | str" = "cpu", dtype: "torch.dtype | None" = None) -> "Extractor":
    """Load the models of an extractor.

    Args:
        spec: From `extractor_spec`.
        device: Where it computes.
        dtype: Of its models, float32 by default; features are float32 in any case.

    Raises:
        FileNotFoundError, ValueError: A model cannot be had or an option does not fit it.
    """
    import torch

    module, class_name, _ = EXTRACTORS[spec.name]
    return getattr(import_module(f"preprocess.extractors.{module}"), class_name)(spec.options, torch.device(device), dtype or torch.float32)
