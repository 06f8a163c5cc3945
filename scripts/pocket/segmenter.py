"""Segmenter of the pocket world: a CLIPSeg of the real class at toy size, that shows where in a scene each class stands."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import CLIPModel, CLIPSegConfig, CLIPSegForImageSegmentation, CLIPTokenizer

from mosaic.evaluation.pixels import CLIP_MEAN, CLIP_STD
from preprocess.construct.segmentation.masks import overlap_of_masks
from preprocess.construct.segmentation.protocol import PhraseSegmenter
from preprocess.construct.segmentation.stage import find_subjects
from scripts.pocket import creatures, encoders, world
from scripts.pocket.evaluation import held_out_scenes
from scripts.pocket.statistics import over_seeds_and_scenes

SIDE = encoders.SIDE  # px, pictures as the segmenter reads them
CLIP = Path(__file__).resolve().parents[2] / "assets" / "pocket" / "clip"
_TOWER = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 256, "hidden_act": "relu"}
_VISION = _TOWER | {"image_size": SIDE, "patch_size": 8}
_DECODER = {"extract_layers": [3], "reduce_dim": 192, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 256}


def phrases(class_name: str) -> tuple[str, ...]:
    """What a class may be asked for by."""
    plural = creatures.DRAWINGS[class_name].plural
    return class_name, f"a {class_name}", f"the {class_name}", plural, f"two {plural}"


def build_segmenter() -> CLIPSegForImageSegmentation:
    """A CLIPSeg at toy size that reads texts as the pocket CLIP does; all else has fresh weights.

    CLIP's picture tower knows which classes a whole picture shows, not where each stands.
    """
    clip = CLIPModel.from_pretrained(CLIP)
    config = CLIPSegConfig(
        text_config=clip.config.text_config.to_dict(), vision_config=_VISION, projection_dim=clip.config.projection_dim, **_DECODER
    )
    model = CLIPSegForImageSegmentation(config)
    model.clip.text_model.load_state_dict(clip.text_model.state_dict())
    model.clip.text_projection.load_state_dict(clip.text_projection.state_dict())
    return model


def normalize(pictures: Tensor) -> Tensor:
    """Pictures float32 `[N, 3, SIDE, SIDE]` in [-1, 1] as the segmenter reads them."""
    return encoders.normalize(pictures, "clip")


def save_segmenter(folder: Path, model: CLIPSegForImageSegmentation, tokenizer: CLIPTokenizer) -> None:
    """Write a folder as the Hub has them. Weights are float16; the config says float32, so that they are loaded as such."""
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "processor_class": "CLIPSegProcessor",
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "resample": int(Image.Resampling.BILINEAR),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    encoders.save_half(folder, model, processor, tokenizer)


def measure(segmenter: PhraseSegmenter, num_subjects: int, count: int, regime: str = "distinct") -> dict[str, float]:
    """How well the stage's masks agree with the exact ones of held-out scenes, asked for classes by name.

    Returns:
        "iou": mean intersection over union of all subjects' masks with what is seen of them, 0 for those that were not found, averaged
        over scenes; "half": half of its 95 % interval over scenes; "found": share of subjects; "count": scenes.
    """
    ious, found = [], []
    for scene in held_out_scenes(num_subjects, count, regime):
        rendered = world.render_scene(scene, SIDE)
        names = [placement.identity.class_name for placement in scene.placements]
        masks = [one[1] if one else np.zeros((SIDE, SIDE), bool) for one in find_subjects(segmenter, rendered.image, names)]
        ious.append(float(np.mean(subject_ious(masks, list(rendered.masks > 0), names))))
        found += [bool(mask.any()) for mask in masks]
    estimate = over_seeds_and_scenes([ious])
    return {"iou": estimate.mean, "half": estimate.half, "found": float(np.mean(found)), "count": count}


def subject_ious(masks: Sequence[np.ndarray], exact: Sequence[np.ndarray], names: Sequence[str]) -> list[float]:
    """Intersection over union of each subject's mask with the exact one; those of one class are told apart as fits best."""
    ious = np.zeros(len(names))
    for name in set(names):
        own = [k for k, other in enumerate(names) if other == name]
        table = np.array([[overlap_of_masks(masks[k], exact[j]) for j in own] for k in own])
        rows, columns = linear_sum_assignment(table, maximize=True)
        ious[own] = table[rows, columns]
    return ious.tolist()
