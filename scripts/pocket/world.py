"""The pocket world in one import: what there is to draw, scenes, references, correspondences, sheets and strips."""

from scripts.pocket.drawing import REFERENCE_SIZE, RenderedScene, correspondences, render_reference, render_scene
from scripts.pocket.scenes import (
    BACKGROUNDS,
    CLASSES,
    MARKINGS,
    MAX_SUBJECTS,
    PALETTES,
    PATTERNS,
    SPLITS,
    Identity,
    Placement,
    Scene,
    caption,
    covers,
    is_held_out,
    reference_order,
    sample_identity,
    sample_scene,
    visible_fractions,
)
from scripts.pocket.sheets import (
    Sheet,
    Strip,
    render_sheet,
    render_strip,
    sample_sheet,
    sample_strip,
    sheet_caption,
    strip_caption,
)

__all__ = [
    "BACKGROUNDS", "CLASSES", "MARKINGS", "MAX_SUBJECTS", "PALETTES", "PATTERNS", "REFERENCE_SIZE", "SPLITS",
    "Identity", "Placement", "RenderedScene", "Scene", "Sheet", "Strip", "caption", "correspondences", "covers",
    "is_held_out", "reference_order", "render_reference", "render_scene", "render_sheet", "render_strip", "sample_identity",
    "sample_scene", "sample_sheet", "sample_strip", "sheet_caption", "strip_caption", "visible_fractions",
]
