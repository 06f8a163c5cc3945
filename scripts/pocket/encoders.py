"""Encoders of the pocket world: a CLIP and a ViT of the real classes at toy size, and how well they tell its identities apart.

CLIP knows pictures and captions, also captions that name looks; the ViT (in DINO's place) knows which individuals a picture shows. They
stand where CLIP ViT-B/32 and DINO ViT-S/16 stand in a benchmark, and read pictures that are prepared as theirs are.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedModel, ViTConfig, ViTModel

from mosaic.evaluation.encoders import ClipEncoder, ImageEncoder
from mosaic.evaluation.pixels import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preparation
from mosaic.files import replacing, save_tensors, write_text
from scripts.pocket import world
from scripts.pocket.evaluation import MIN_VISIBLE, candidate_lists, held_out_scenes, proportion
from scripts.pocket.scenes import count_phrase
from scripts.pocket.tokenizers import build_clip_tokenizer, caption_words

SIDE = 64  # px, pictures as the encoders read them
TEXT_LENGTH = 48  # tokens; a caption of four subjects that names their looks has 45 at most
KINDS = ("clip", "dino")
PREPARATION = {
    "clip": Preparation(SIDE, SIDE, CLIP_MEAN, CLIP_STD),
    "dino": Preparation(round(SIDE * 256 / 224), SIDE, IMAGENET_MEAN, IMAGENET_STD),
}
_TOWER = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 256}
_TEXT = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 96, "intermediate_size": 192}


def looks_phrase(identity: world.Identity) -> str:
    """Name one individual by its looks, e.g. "an ember cat with stripes and a hat"."""
    article = "an" if identity.palette[0] in "aeiou" else "a"
    marking = "" if identity.marking == "none" else f" and a {identity.marking}"
    return f"{article} {identity.palette} {identity.class_name} with {identity.pattern}{marking}"


def looks_caption(identities: Sequence[world.Identity], background: str) -> str:
    """A scene's caption that names the looks of all its subjects."""
    return f"{', '.join(looks_phrase(identity) for identity in identities)} {background}"


def build_tokenizer() -> CLIPTokenizer:
    """One token for each word of captions, with looks and without."""
    numbers = range(1, world.MAX_SUBJECTS + 1)
    counted = [count_phrase([world.Identity(name, "", "", "")] * number) for name in world.CLASSES for number in numbers]
    looks = ["an", "with", "and", ",", *world.PALETTES, *world.PATTERNS, *world.MARKINGS, *world.BACKGROUNDS]
    return build_clip_tokenizer(caption_words([*counted, *looks]), TEXT_LENGTH)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP at toy size with fresh weights."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = _TEXT | special | {"vocab_size": len(tokenizer), "max_position_embeddings": TEXT_LENGTH, "projection_dim": 128}
    vision = _TOWER | {"image_size": SIDE, "patch_size": 8, "projection_dim": 128}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def build_dino() -> ViTModel:
    """A ViT at toy size with fresh weights."""
    return ViTModel(ViTConfig(image_size=SIDE, patch_size=8, **_TOWER), add_pooling_layer=False)


def prepare(pictures: Sequence[Image.Image], kind: str) -> np.ndarray:
    """Pictures resized and cut as an encoder of a kind reads them, before their values are normalised: uint8 `[N, SIDE, SIDE, 3]`."""
    made = PREPARATION[kind]
    values = made(pictures).permute(0, 2, 3, 1) * torch.tensor(made.std) + torch.tensor(made.mean)
    return (values * 255).round().byte().numpy()


def normalize(pictures: Tensor, kind: str) -> Tensor:
    """Pictures float32 `[N, 3, SIDE, SIDE]` in [-1, 1] as the encoder reads them."""
    made = PREPARATION[kind]
    return ((pictures + 1) / 2 - torch.tensor(made.mean).view(3, 1, 1)) / torch.tensor(made.std).view(3, 1, 1)


def embed_pixels(model: CLIPModel | ViTModel, pixels: Tensor) -> Tensor:
    """Embeddings `[N, 128]` of pictures as the encoder reads them, not normalised."""
    if isinstance(model, CLIPModel):
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    return model(pixel_values=pixels).last_hidden_state[:, 0]


def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Embeddings `[N, 128]` of captions, not normalised."""
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    return model.text_projection(model.text_model(**tokens).pooler_output)


def save_encoder(folder: Path, kind: str, model: CLIPModel | ViTModel, tokenizer: CLIPTokenizer | None) -> None:
    """Write a folder as the Hub has them. Weights are float16; the config says float32, so that they are loaded as such."""
    made = PREPARATION[kind]
    processor = {
        "image_processor_type": "CLIPImageProcessor" if kind == "clip" else "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": made.short_side},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": made.mean,
        "image_std": made.std,
        "do_convert_rgb": True,
    }
    save_half(folder, model, processor, tokenizer)


def save_half(folder: Path, model: PreTrainedModel, processor: Mapping[str, Any], tokenizer: CLIPTokenizer | None) -> None:
    """Write a model in half precision, its preprocessor_config.json and its tokenizer as transformers has them, the folder as a whole."""
    with replacing(folder) as aside:
        aside.mkdir()
        model.save_pretrained(aside)
        weights = {name: tensor.to(torch.float16) if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
        file = aside / "model.safetensors"
        file.unlink()  # with it the permissions, which were the owner's alone
        save_tensors(weights, file, {"format": "pt"})
        write_text(aside / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)


def identification(encoder: ImageEncoder, num_subjects: int, count: int) -> dict[str, float]:
    """Which share of the subjects of held-out scenes is, by the cosine to the whole picture, recognised by its reference?

    The candidates are the judge's: eight of the class, that share palette or pattern with the true one. Chance is 12.5 %.
    """
    scenes, hits = held_out_scenes(num_subjects, count), []
    drawn = encoder.images([world.render_scene(scene, SIDE).image for scene in scenes])
    for scene, embedding in zip(scenes, drawn, strict=True):
        visible = world.visible_fractions(scene, SIDE)
        for placement, candidates, seen in zip(scene.placements, candidate_lists(scene), visible, strict=True):
            if seen >= MIN_VISIBLE:
                views = encoder.images([world.render_reference(candidate, world.REFERENCE_SIZE) for candidate in candidates])
                hits.append(candidates[int((views @ embedding).argmax())] == placement.identity)
    share = proportion(hits)
    return {"share": share.share, "low": share.low, "high": share.high, "count": share.count}


def retrieval(encoder: ClipEncoder, count: int, looks: bool) -> dict[str, float]:
    """Of `count` held-out scenes of one to four subjects: share of pictures whose caption is the nearest, and of captions whose picture is.

    Where several scenes have one caption, each of their pictures is its own. With `looks` captions name them.
    """
    scenes = [scene for k in range(1, 5) for scene in held_out_scenes(k, count // 4)]
    captions = [
        looks_caption([p.identity for p in scene.placements], scene.background) if looks else world.caption(scene) for scene in scenes
    ]
    similarity = encoder.images([world.render_scene(scene, SIDE).image for scene in scenes]) @ encoder.texts(captions).T
    own = torch.tensor([[a == b for b in captions] for a in captions])
    caption_right = own[torch.arange(len(scenes)), similarity.argmax(1)].float().mean().item()
    picture_right = own[similarity.argmax(0), torch.arange(len(scenes))].float().mean().item()
    return {"captions_of_pictures": caption_right, "pictures_of_captions": picture_right, "count": len(scenes)}
