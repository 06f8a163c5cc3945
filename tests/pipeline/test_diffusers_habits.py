"""What users of diffusers do with pipelines and transformers beside calling ours: sharing, saving, fusing, callbacks."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file

from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from tests import tiny

STOCK_CALL = {name: value for name, value in tiny.CALL.items() if name != "reference_size"} | {"prompt": "a cat", "max_sequence_length": 8}


def style_file(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.norm1.linear", "single_transformer_blocks.0.proj_out"]
    return tiny.random_lora_file(tiny.linear_shapes(transformer, names), 2, seed=9)


def stock_picture(pipeline: FluxPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**STOCK_CALL, generator=torch.Generator().manual_seed(0)).images


def test_a_stock_pipeline_still_works_with_a_shared_transformer() -> None:
    stock = tiny.build_stock_pipeline()
    expected = stock_picture(stock)
    ours = MosaicFluxPipeline.from_pipe(stock)
    assert type(ours.transformer) is MosaicFluxTransformer2DModel
    torch.testing.assert_close(stock_picture(stock), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(stock_picture(FluxPipeline(**ours.components)), expected, rtol=0, atol=1e-5)
    again = MosaicFluxPipeline.from_pipe(ours)
    assert again.transformer is ours.transformer


def test_the_shift_is_that_of_the_scheduler() -> None:
    ours, stock = tiny.build_pipeline(lora_rank=None), tiny.build_stock_pipeline()
    usual = stock_picture(stock)
    for pipeline in (ours, stock):
        other = {"base_image_seq_len": 16, "max_image_seq_len": 32, "base_shift": 0.2, "max_shift": 3.0}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **other)
    expected = stock_picture(stock)
    assert not torch.allclose(expected, usual, atol=1e-3)
    torch.testing.assert_close(stock_picture(ours), expected, rtol=0, atol=1e-5)
    assert ours.num_timesteps == stock.num_timesteps == tiny.CALL["num_inference_steps"]


def test_saving_names_the_stock_class_whatever_was_given(tmp_path: Path) -> None:
    tiny.build_stock_pipeline().save_pretrained(tmp_path / "stock")
    transformer = MosaicFluxTransformer2DModel.from_pretrained(tmp_path / "stock", subfolder="transformer")
    ours = MosaicFluxPipeline.from_pretrained(tmp_path / "stock", transformer=transformer)
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/model_index.json").read_text())["transformer"] == ["diffusers", "FluxTransformer2DModel"]
    expected = stock_picture(FluxPipeline.from_pretrained(tmp_path / "stock"))
    for kind in (FluxPipeline, MosaicFluxPipeline):
        torch.testing.assert_close(stock_picture(kind.from_pretrained(tmp_path / "ours")), expected, rtol=0, atol=1e-5)


def test_saving_beside_a_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"writes the base, but the LoRAs reference are loaded\. Write the reference LoRA with save_ref"):
        tiny.build_pipeline().save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_fused_style_counts_once_and_keeps_the_reference_lora_out() -> None:
    ours, stock = tiny.build_pipeline(lora_rank=None), tiny.build_stock_pipeline()
    for pipeline in (ours, stock):
        pipeline.load_lora_weights(style_file(stock.transformer) if pipeline is stock else style_file(ours.transformer))
        pipeline.fuse_lora()
    torch.testing.assert_close(stock_picture(ours), stock_picture(stock), rtol=0, atol=1e-4)
    ours.unload_lora_weights()
    with pytest.raises(ValueError, match="a style LoRA is fused and would reach the reference tokens too"):
        ours.load_reference_lora("any.safetensors")


def test_offloaded_models_go_back_after_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and only after the picture is decoded."""
    pipeline, order = tiny.build_pipeline(), []
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda *a, **k: order.append("decode") or decode(*a, **k))
    monkeypatch.setattr(pipeline, "maybe_free_model_hooks", lambda: order.append("free"))
    pipeline("a cat", [tiny.picture(0)], **tiny.CALL | {"output_type": "pil"})
    assert order == ["decode", "free"]


def test_dora_is_refused() -> None:
    pipeline = tiny.build_pipeline()
    tensors = style_file(tiny.build_transformer(stock=True))
    name = next(iter(tensors)).split(".lora_")[0]
    tensors[f"{name}.lora_magnitude_vector"] = torch.ones(3)
    with pytest.raises(ValueError, match="DoRA adapters rescale the base weights of all tokens"):
        pipeline.load_lora_weights(tensors)


def test_a_reference_lora_in_a_folder_is_no_style(tmp_path: Path) -> None:
    pipeline = tiny.build_pipeline()
    names = ["transformer_blocks.0.attn.to_q"]
    tensors = tiny.random_lora_file(tiny.linear_shapes(tiny.build_transformer(stock=True), names), 2, seed=9)
    save_file(tensors, tmp_path / "part.safetensors", metadata={"mosaic": json.dumps({"config": {"lora": {}}})})
    with pytest.raises(ValueError, match="is a reference LoRA, not a style LoRA"):
        pipeline.load_lora_weights(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data": [1]}, r"data of the config in its metadata must be an object, got \[1\]"),
        ({"data": {"image_size": "x"}}, "data.image_size of the config in its metadata must be two sizes in px, got 'x'"),
        ({"data": {"reference_size": "12"}}, "data.reference_size of the config in its metadata must be a size in px, got '12'"),
        ({"model": {"reference_attention": "all"}}, "model.reference_attention of the config in its metadata must be one of"),
        ({"model": {"reference_position": "left"}}, "model.reference_position of the config in its metadata must be one of"),
    ],
)
def test_what_the_pipeline_takes_from_metadata_is_checked(config: dict, message: str, tmp_path: Path) -> None:
    pipeline = tiny.build_pipeline()
    pipeline.reference_config = config
    pipeline.save_reference_lora(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message):
        pipeline.load_reference_lora(tmp_path)


def test_any_tensor_that_a_callback_returns_counts() -> None:
    ours, stock = tiny.build_pipeline(lora_rank=None), tiny.build_stock_pipeline()
    pictures = []
    for pipeline in (ours, stock):
        pipeline.set_progress_bar_config(disable=True)
        embeds = torch.zeros(1, 8, pipeline.transformer.config.joint_attention_dim)
        generator = torch.Generator().manual_seed(0)
        call = STOCK_CALL | {"callback_on_step_end": lambda *_, embeds=embeds: {"prompt_embeds": embeds}}
        pictures.append(pipeline(**call, generator=generator).images)
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-4)


def test_guidance_must_fit_the_model(guidance_embeds: bool) -> None:
    transformer, inputs = tiny.build_transformer(guidance_embeds), tiny.build_batch(guidance_embeds=guidance_embeds).inputs
    wrong = None if guidance_embeds else torch.ones(len(inputs["hidden_states"]))
    with pytest.raises(ValueError, match="guidance must be given" if guidance_embeds else "guidance must be None"):
        transformer(**inputs | {"guidance": wrong})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"joint_attention_kwargs": {"scale": 2.0}}, "joint_attention_kwargs must be empty with a reference branch, got scale"),
        ({"reference_ids": None}, "reference_hidden_states need reference_ids"),
    ],
)
def test_what_the_transformer_refuses(arguments: dict, message: str, batch: tiny.Batch) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.build_transformer()(**batch.inputs | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": None}, "guidance_scale must be a finite number, got None"),
        ({"image_guidance_scale": float("nan")}, "image_guidance_scale must be a finite number, got nan"),
        ({"height": 24.0}, r"height and width must be integers, got 24\.0 x"),
    ],
)
def test_numbers_of_a_call(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.build_pipeline()(**STOCK_CALL | arguments)
