"""Style LoRAs beside the reference LoRA: where they act, in any order of loading, and what is refused."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from mosaic.lora.adapter import save_reference_lora
from mosaic.model.attention_rows import CaptureRequest
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from tests import naive, tiny

# PEFT matches names by their ends, then goes by the file, and says so: "proj_out" also ends the names of the single-stream layers.
# It also points out every second adapter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning"),
]

# Style LoRAs come on any linear layer, also on those that the reference LoRA leaves alone.
STYLE_MODULES = (
    *("x_embedder", "context_embedder", "norm_out.linear", "proj_out"),
    *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.guidance_embedder.linear_2", "time_text_embed.text_embedder.linear_1"),
    *("transformer_blocks.0.norm1.linear", "transformer_blocks.0.norm1_context.linear", "transformer_blocks.0.attn.to_q"),
    *("transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.to_add_out"),
    *("transformer_blocks.1.ff.net.0.proj", "transformer_blocks.1.ff.net.2", "transformer_blocks.1.ff_context.net.0.proj"),
    *("transformer_blocks.1.ff_context.net.2", "single_transformer_blocks.0.norm.linear", "single_transformer_blocks.0.attn.to_v"),
    *("single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.1.proj_out"),
)


def style_tensors(transformer: FluxTransformer2DModel, seed: int = 5, rank: int = 2) -> dict[str, Tensor]:
    """A random style LoRA; read the shapes from a stock transformer."""
    return tiny.random_lora_file(tiny.linear_shapes(transformer, STYLE_MODULES), rank, seed)


def style_pipeline() -> MosaicFluxPipeline:
    """A pipeline around the 2 + 2 block transformer, without text encoders."""
    components = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return MosaicFluxPipeline(scheduler=tiny.build_components()["scheduler"], transformer=tiny.build_transformer(), **components)


def lora_layers(transformer: nn.Module) -> list[str]:
    return [name for name, module in transformer.named_modules() if isinstance(module, LoraLayer)]


def run(transformer: nn.Module, batch: tiny.Batch) -> Tensor:
    with torch.no_grad():
        return transformer(**batch.inputs).sample


def close(found: Tensor, want: Tensor) -> bool:
    return torch.allclose(found, want, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("order", ["style_first", "reference_first", "style_alone"])
def test_a_style_acts_on_text_and_target_only(batch: tiny.Batch, order: str) -> None:
    pipeline, stock = style_pipeline(), tiny.build_transformer(stock=True)
    style, reference = style_tensors(stock), {}
    if order == "reference_first":
        reference = tiny.attach_random_lora(pipeline.transformer)
    pipeline.load_lora_weights(dict(style), adapter_name="style")
    if order == "style_first":
        reference = tiny.attach_random_lora(pipeline.transformer)
    twin = naive.NaiveFlux(stock, naive.lora_matrices(reference), [(naive.lora_matrices(style), 1.0)])
    every = torch.arange(2 * batch.num_reference_tokens).expand(2, -1)
    with torch.no_grad():
        output, want = pipeline.transformer(**batch.inputs, capture=CaptureRequest(every)), twin(**batch.inputs)
    torch.testing.assert_close(output.sample, want.velocity, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(output.attention_rows.double(), naive.mean_maps(want.maps), atol=1e-6, rtol=1e-4)
    bare = naive.NaiveFlux(stock, naive.lora_matrices(reference))(**batch.inputs).velocity
    assert not close(want.velocity, bare)


def test_a_style_alone_equals_stock_with_the_same_style(batch: tiny.Batch) -> None:
    pipeline, stock = style_pipeline(), tiny.build_transformer(stock=True)
    style, inputs = style_tensors(stock), tiny.without_references(batch.inputs)
    bare = stock(**inputs).sample
    pipeline.load_lora_weights(dict(style), adapter_name="style")
    stock.load_lora_adapter(dict(style), prefix="transformer", adapter_name="style")
    want = stock(**inputs).sample
    assert not close(want, bare)
    torch.testing.assert_close(pipeline.transformer(**inputs).sample, want)
    tiny.attach_random_lora(pipeline.transformer)  # no references: the reference LoRA has no say
    torch.testing.assert_close(pipeline.transformer(**inputs).sample, want)


def test_training_the_reference_lora_beside_a_style_leaves_the_style_frozen(batch: tiny.Batch) -> None:
    pipeline = style_pipeline()
    pipeline.load_lora_weights(style_tensors(tiny.build_transformer(stock=True)), adapter_name="style")
    parameters = tiny.attach_random_lora(pipeline.transformer)
    assert {id(p) for p in pipeline.transformer.parameters() if p.requires_grad} == {id(p) for p in parameters.values()}


@pytest.mark.parametrize("order", ["style_first", "reference_first"])
def test_loading_a_reference_file_keeps_the_styles(batch: tiny.Batch, tmp_path: Path, order: str) -> None:
    stock = tiny.build_transformer(stock=True)
    donor = tiny.build_transformer()
    reference = tiny.attach_random_lora(donor)
    save_reference_lora(donor, tmp_path / "lora.safetensors")
    first, second = style_tensors(stock, 5), style_tensors(stock, 6, rank=3)
    pipeline = style_pipeline()
    if order == "reference_first":
        pipeline.load_reference_lora(tmp_path / "lora.safetensors")
    pipeline.load_lora_weights(dict(first), adapter_name="first")
    pipeline.load_lora_weights(dict(second), adapter_name="second")
    pipeline.set_adapters(["first", "second"], [0.5, 2.0])
    if order == "style_first":
        pipeline.load_reference_lora(tmp_path / "lora.safetensors")
    matrices = naive.lora_matrices(reference), naive.lora_matrices(first), naive.lora_matrices(second)

    def twin(*styles: tuple[int, float]) -> Tensor:
        with torch.no_grad():
            return naive.NaiveFlux(stock, matrices[0], [(matrices[i], w) for i, w in styles])(**batch.inputs).velocity

    assert close(run(pipeline.transformer, batch), twin((1, 0.5), (2, 2.0)))
    pipeline.set_adapters("second", 1.5)
    assert close(run(pipeline.transformer, batch), twin((2, 1.5)))
    pipeline.disable_lora()
    assert close(run(pipeline.transformer, batch), twin())
    pipeline.enable_lora()
    assert close(run(pipeline.transformer, batch), twin((2, 1.5)))
    pipeline.load_reference_lora(tmp_path / "lora.safetensors")  # replaced by itself: the active style stays active
    assert close(run(pipeline.transformer, batch), twin((2, 1.5)))
    pipeline.unload_lora_weights()
    assert close(run(pipeline.transformer, batch), twin())
    assert set(pipeline.transformer.peft_config) == {"reference"}


def test_unloading_the_reference_keeps_the_style(batch: tiny.Batch) -> None:
    pipeline, stock = style_pipeline(), tiny.build_transformer(stock=True)
    style = style_tensors(stock)
    pipeline.load_lora_weights(dict(style), adapter_name="style")
    styled = run(pipeline.transformer, batch)
    tiny.attach_random_lora(pipeline.transformer)
    assert not close(run(pipeline.transformer, batch), styled)
    pipeline.unload_reference_lora()
    torch.testing.assert_close(run(pipeline.transformer, batch), styled, atol=3e-5, rtol=1e-4)
    assert set(pipeline.transformer.peft_config) == {"style"}
    pipeline.unload_lora_weights()
    assert not lora_layers(pipeline.transformer)
    assert close(run(pipeline.transformer, batch), naive.NaiveFlux(stock, {})(**batch.inputs).velocity)


def test_a_reference_file_is_no_style(tmp_path: Path) -> None:
    pipeline = style_pipeline()
    parameters = tiny.attach_random_lora(pipeline.transformer)
    ours = {key: value.detach().clone() for key, value in parameters.items()}
    save_reference_lora(pipeline.transformer, tmp_path / "lora.safetensors")
    save_file(ours, tmp_path / "published.safetensors")  # known by its modules, without metadata
    partial = {key: value for key, value in ours.items() if "x_embedder" not in key}
    save_file(partial, tmp_path / "partial.safetensors", metadata={"mosaic": '{"adapter": "reference"}'})  # known by its metadata
    pipeline.unload_reference_lora()
    for name in ("lora", "published", "partial"):
        with pytest.raises(
            ValueError, match=rf"{name}\.safetensors' is a reference LoRA, not a style LoRA: load it with load_reference_lora"
        ):
            pipeline.load_lora_weights(tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match="is a reference LoRA"):
            pipeline.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors")
    with pytest.raises(ValueError, match="the given state dict is a reference LoRA"):
        pipeline.load_lora_weights(ours)
    assert not lora_layers(pipeline.transformer)


def test_the_name_of_the_reference_lora_is_taken() -> None:
    pipeline = style_pipeline()
    style = style_tensors(tiny.build_transformer(stock=True))
    with pytest.raises(ValueError, match="adapter_name 'reference' is taken"):
        pipeline.load_lora_weights(style, adapter_name="reference")
    assert not lora_layers(pipeline.transformer)


def test_fusing_is_refused_beside_a_reference_lora() -> None:
    pipeline = style_pipeline()
    pipeline.load_lora_weights(style_tensors(tiny.build_transformer(stock=True)), adapter_name="style")
    tiny.attach_random_lora(pipeline.transformer)
    with pytest.raises(ValueError, match=r"fuse_lora\(\) would apply style LoRAs to reference tokens too"):
        pipeline.fuse_lora()
