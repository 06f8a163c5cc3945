"""Tiny models of the real classes and file layouts that XVerseBench is measured with; some say what they are told, others are random."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    BartConfig,
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    Dinov2Config,
    Dinov2Model,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    Owlv2Processor,
    PreTrainedTokenizerFast,
    Sam2Config,
    Sam2Model,
    Sam3Config,
    Sam3Model,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessorPil,
    ViltProcessor,
    ViTImageProcessorPil,
)

from mosaic.evaluation.aesthetics import LAYERS
from mosaic.evaluation.arcface import IrSe
from tests.tiny import randomise, tokenizers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "is", "there", "a", "?", ".", "cat", "mug", "on", "the"]
SHAPE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURE: dict[str, Any] = {"image_size": 32, "patch_size": 8}
LOCATIONS = 1000  # of Florence-2's words for positions


def recite(words: nn.Embedding, positions: nn.Embedding, layers: nn.Module, tokens: Sequence[int], offset: int = 0) -> None:
    """Make a decoder, its head tied to its words, say tokens in turn: each place asks for its own, the layers change nothing."""
    with torch.no_grad():
        for name, parameter in layers.named_parameters():
            if any(part in name for part in ("output.dense", "out_proj", "fc2")):
                parameter.zero_()
        words.weight.zero_()
        positions.weight.zero_()
        for place, token in enumerate(tokens):
            words.weight[token, place] = 10
            positions.weight[place + offset, place] = 100
        positions.weight[len(tokens) + offset :, len(tokens) - 1] = 100  # the last one again and again, so that all beams end


def bert_tokenizer(folder: Path) -> BertTokenizer:
    """A tokenizer of few words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer(str(folder / "vocab.txt"))


def write_blip(folder: Path, says: str = "yes") -> Path:
    """A BLIP for visual question answering whose every answer is one word."""
    tokenizer = bert_tokenizer(folder)
    text = SHAPE | {"vocab_size": len(WORDS) + 1, "encoder_hidden_size": 16, "max_position_embeddings": 32, "bos_token_id": len(WORDS)}
    text |= {"pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=SHAPE | PICTURE))
    bert, head = model.text_decoder.bert, model.text_decoder.cls.predictions
    recite(bert.embeddings.word_embeddings, bert.embeddings.position_embeddings, bert.encoder, [WORDS.index(says), 3])
    head.transform.dense.weight.data.copy_(torch.eye(16))
    head.transform.dense.bias.data.zero_()
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def write_vilt(folder: Path) -> Path:
    """A random ViLT that knows the answers yes and no."""
    tokenizer = bert_tokenizer(folder)
    config = ViltConfig(**SHAPE, **PICTURE, vocab_size=len(WORDS), max_position_embeddings=16, id2label={0: "Yes", 1: "no"})
    _write(ViltForQuestionAnswering(config), folder, 5)
    ViltProcessor(ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=8), tokenizer).save_pretrained(folder)
    return folder


def chat_tokenizer() -> tuple[list[str], PreTrainedTokenizerFast]:
    """A tokenizer of few words, which also asks and answers."""
    words = ["<s>", "</s>", "<pad>", "<unk>", "<image>", "USER", "ASSISTANT", "Yes", "no", ".", "is", "there", "a", "cat", "?", ":", ","]
    base = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, **special, extra_special_tokens={"image_token": "<image>"})
    return words, tokenizer


def say_yes_no(model: Any, language_model: Any, words: list[str]) -> None:
    """Make a Llama write "Yes. no" after its prompt: every word asks for the next, and the layers change nothing."""
    with torch.no_grad():
        for name, parameter in language_model.layers.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        language_model.embed_tokens.weight.copy_(torch.eye(len(words), 32))
        model.lm_head.weight.zero_()
        for word, following in (("ASSISTANT", "Yes"), ("Yes", "."), (".", "no"), ("no", "</s>")):
            model.lm_head.weight[words.index(following), words.index(word)] = 1
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 2


def write_llama(folder: Path) -> Path:
    """A chatting Llama that writes "Yes. no" after its prompt."""
    words, tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}USER {{ m.content }}{% endfor %} ASSISTANT"
    shape = SHAPE | {"hidden_size": 32, "vocab_size": len(words), "tie_word_embeddings": False, "eos_token_id": 1, "pad_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    say_yes_no(model, model.model, words)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_llava(folder: Path) -> Path:
    """A chatting LLaVA that writes "Yes. no" after its prompt."""
    words, tokenizer = chat_tokenizer()
    text = SHAPE | {"model_type": "llama", "hidden_size": 32, "vocab_size": len(words), "tie_word_embeddings": False}
    vision = {"model_type": "clip_vision_model", **SHAPE, **PICTURE}
    config = LlavaConfig(text_config=text | {"eos_token_id": 1, "pad_token_id": 2}, vision_config=vision, image_token_index=4)
    config.vision_feature_layer = -1
    model = LlavaForConditionalGeneration(config)
    say_yes_no(model, model.model.language_model, words)
    model.save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    template = (
        "{% for m in messages %}USER {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "{% endfor %} ASSISTANT"
    )
    LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template, num_additional_image_tokens=1
    ).save_pretrained(folder)
    return folder


def write_florence(folder: Path, boxes: Sequence[tuple[int, int, int, int]]) -> Path:
    """A Florence-2 that finds the same boxes everywhere, in thousandths of the picture."""
    special = ["<s>", "</s>", "<pad>", "<unk>", "<image>", *(f"<loc_{n}>" for n in range(LOCATIONS))]
    vocabulary = {word: number for number, word in enumerate([*special, "thing", "Locate", "cat", "mug", "in", "the", "image", "."])}
    base = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    base.pre_tokenizer, base.decoder = Whitespace(), Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.add_tokens(special[5:])
    said = [vocabulary["thing"], *(vocabulary[f"<loc_{side}>"] for box in boxes for side in box), vocabulary["</s>"]]
    text = BartConfig(
        vocab_size=len(vocabulary),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=800,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    four = {"embed_dim": [8, 8, 16, 16], "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4, "window_size": 2}
    config = Florence2Config(
        text_config=text.to_dict(), vision_config=four | {"projection_dim": 32}, image_token_id=4, pad_token_id=2, eos_token_id=1
    )
    model = Florence2ForConditionalGeneration(config)
    decoder = model.model.language_model.decoder
    recite(decoder.embed_tokens, decoder.embed_positions, decoder.layers, said, offset=2)
    model.save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5)
    Florence2Processor(pictures, tokenizer).save_pretrained(folder)
    return folder


def write_grounding_dino(folder: Path, mm: bool = False) -> Path:
    """A random Grounding DINO, or MM Grounding DINO; it finds five things, of any sureness above the threshold."""
    tokenizer = bert_tokenizer(folder)
    swin = {"model_type": "swin", "embed_dim": 12, "depths": [1] * 4, "num_heads": [1, 2, 2, 2], "window_size": 4}
    config = (MMGroundingDinoConfig if mm else GroundingDinoConfig)(
        backbone_config=swin | {"image_size": 128, "out_indices": [2, 3, 4]},
        text_config={"model_type": "bert", **SHAPE, "vocab_size": len(WORDS), "max_position_embeddings": 32},
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
        num_feature_levels=4,
        max_text_len=16,
        disable_custom_kernels=True,
    )
    _write((MMGroundingDinoForObjectDetection if mm else GroundingDinoForObjectDetection)(config), folder, 6, 0.02)
    pictures = GroundingDinoImageProcessorPil(size={"shortest_edge": 128, "longest_edge": 160})
    GroundingDinoProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def write_sam2(folder: Path) -> Path:
    """A random SAM 2."""
    hiera = {"hidden_size": 12, "embed_dim_per_stage": [12, 24, 48, 96], "blocks_per_stage": [1, 2, 7, 2], "image_size": [128, 128]}
    hiera |= {"num_attention_heads": 1, "num_attention_heads_per_stage": [1, 2, 4, 8], "window_size_per_stage": [8, 4, 8, 4]}
    hiera |= {"model_type": "sam2_hiera_det_model", "window_positional_embedding_background_size": [4, 4]}
    vision = {"backbone_config": hiera, "backbone_channel_list": [96, 48, 24, 12], "fpn_hidden_size": 32}
    vision |= {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32, "image_size": 128},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
    )
    return _write(Sam2Model(config), folder, 7)


def write_owlv2(folder: Path) -> Path:
    """A random OWLv2 of 16 boxes, most of them sure enough."""
    words = ["<pad>", "<unk>", "a", "photo", "of", "cat", "mug"]  # a text whose first token is 0 is none
    base = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", unk_token="<unk>", model_max_length=6)
    text = SHAPE | {"vocab_size": len(words), "max_position_embeddings": 6}
    config = Owlv2Config(text_config=text, vision_config=SHAPE | PICTURE, projection_dim=16)
    model = Owlv2ForObjectDetection(config)
    randomise(model.parameters(), 11, 0.2)
    model.class_head.logit_shift.bias.data.fill_(2)
    model.save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def write_sam3(folder: Path) -> Path:
    """A random SAM 3 of seven things."""
    tokenizer = tokenizers()[0]
    vit = SHAPE | {"model_type": "sam3_vit_model", "num_hidden_layers": 2, "image_size": 112, "patch_size": 14, "window_size": 4}
    vit |= {"global_attn_indexes": [1], "pretrain_image_size": 56}
    layers = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Sam3Config(
        vision_config={
            "model_type": "sam3_vision_model",
            "backbone_config": vit,
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        text_config=SHAPE | special | {"model_type": "clip_text_model", "vocab_size": len(tokenizer), "max_position_embeddings": 12},
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config=layers | {"num_queries": 7},
        mask_decoder_config={"hidden_size": 32, "num_upsampling_stages": 2, "num_attention_heads": 2},
    )
    _write(Sam3Model(config), folder, 12)
    tokenizer.save_pretrained(folder)
    return folder


def write_clipseg(folder: Path) -> Path:
    """A random CLIPSeg."""
    tokenizer = tokenizers()[0]
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = SHAPE | special | {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    vision = SHAPE | PICTURE | {"num_hidden_layers": 2}
    decoder = {"extract_layers": [0, 1], "reduce_dim": 8, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    config = CLIPSegConfig(text_config=text, vision_config=vision, projection_dim=12, **decoder)
    _write(CLIPSegForImageSegmentation(config), folder, 13)
    CLIPSegProcessor(ViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def write_siglip(folder: Path) -> Path:
    """A random SigLIP vision tower."""
    return _write(SiglipVisionModel(SiglipVisionConfig(**SHAPE, **PICTURE)), folder, 8)


def siglip_processor(flexible: bool = False) -> Any:
    """What prepares pictures for a SigLIP of `write_siglip_pair`."""
    if flexible:
        return Siglip2ImageProcessorPil(patch_size=8, max_num_patches=12)
    return SiglipImageProcessorPil(size={"height": 32, "width": 32})


def write_siglip_pair(folder: Path, flexible: bool = False) -> Path:
    """A random SigLIP of pictures and texts; SigLIP 2 of any size where it is flexible."""
    text = SHAPE | {"vocab_size": len(WORDS), "max_position_embeddings": 16, "projection_size": 16, "bos_token_id": 2, "eos_token_id": 3}
    text |= {"pad_token_id": 0}
    if flexible:
        config: Any = Siglip2Config(text_config=text, vision_config=SHAPE | {"patch_size": 8, "num_patches": 16})
        _write(Siglip2Model(config), folder, 11)
    else:
        config = SiglipConfig(text_config=text, vision_config=SHAPE | PICTURE)
        _write(SiglipModel(config), folder, 11)
    siglip_processor(flexible).save_pretrained(folder)
    bert_tokenizer(folder).save_pretrained(folder)
    return folder


def write_dinov2(folder: Path) -> Path:
    """A random DINOv2, of patches so large that 224 px are few."""
    return _write(Dinov2Model(Dinov2Config(**(SHAPE | {"mlp_ratio": 2}), image_size=112, patch_size=56)), folder, 9)


def head_state(width: int = 16) -> dict[str, torch.Tensor]:
    """Weights of an aesthetic head, in bfloat16 as the published ones."""
    generator = torch.Generator().manual_seed(10)
    sides = [width, 12, 8, 6, 4, 1]
    state = {}
    for place, inward, outward in zip(LAYERS, sides, sides[1:], strict=False):
        state[f"scoring_head.{place}.weight"] = torch.randn(outward, inward, generator=generator).bfloat16()
        state[f"scoring_head.{place}.bias"] = torch.randn(outward, generator=generator).bfloat16()
    return state


def arcface_state() -> dict[str, torch.Tensor]:
    """Weights of ArcFace's real shapes; all of a tensor are one number, which a file holds once."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in IrSe().state_dict().items()}

    def value(name: str, shape: torch.Size) -> torch.Tensor:
        if name.endswith(("bias", "running_mean")):
            return torch.tensor(0.01)
        return torch.tensor(1 / shape[1:].numel() if len(shape) > 1 else 1.0)

    return {name: value(name, shape).expand(shape) for name, shape in shapes.items()}


def _write(model: nn.Module, folder: Path, seed: int, std: float = 0.2) -> Path:
    randomise(model.parameters(), seed, std)
    model.save_pretrained(folder)
    return folder
