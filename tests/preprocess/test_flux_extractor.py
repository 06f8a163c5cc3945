"""The extractor `flux` on a tiny random FLUX folder, against whole passes of the stock transformer."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor, nn

from mosaic.method.grids import Grid
from mosaic.weights.frozen import call_loader
from preprocess.extractors import build_extractor, extractor_spec, flux
from preprocess.extractors.flux import Flux, standardised
from preprocess.extractors.protocol import picture_tensor
from tests import tiny_extractors as tiny

SIZE = 32  # px along the long side, 8 tokens
WIDE = tiny.picture(64, 128)  # 4 x 8 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With guidance embedded, as FLUX.1-dev."""
    return tiny.save_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without, as FLUX.1-schnell."""
    return tiny.save_flux(tmp_path_factory.mktemp("plain"), guidance_embeds=False)


def build(folder: Path, **options: object) -> Flux:
    extractor = build_extractor(extractor_spec("flux", {"model": str(folder), "size": SIZE, "ensemble": 1} | options))
    assert isinstance(extractor, Flux)
    return extractor


def whole_passes(folder: Path, seed: int, options: dict) -> Tensor:
    """The features of `WIDE` by diffusers' own pipeline and passes that are not cut short, [C, 4, 8]."""
    pipeline = FluxPipeline.from_pretrained(folder)
    transformer, vae, states = pipeline.transformer, pipeline.vae, []
    blocks: list[nn.Module] = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    hook = blocks[options["block"]].register_forward_hook(lambda module, inputs, output: states.append(output[1]))
    generator, t = torch.Generator().manual_seed(seed), options["timestep"]
    with torch.inference_mode():
        embeds, pooled, text_ids = pipeline.encode_prompt(
            options["prompt"], None, max_sequence_length=pipeline.tokenizer_2.model_max_length
        )
        mean = vae.encode(picture_tensor(WIDE, (SIZE // 2, SIZE))).latent_dist.mean
        latents = (mean - vae.config.shift_factor) * vae.config.scaling_factor
        packed = pipeline._pack_latents(latents, 1, *latents.shape[1:])
        image_ids = pipeline._prepare_latent_image_ids(1, 4, 8, "cpu", torch.float32)
        for noise in torch.randn(options["ensemble"], *packed.shape[1:], generator=generator):
            transformer(
                (1 - t) * packed + t * noise,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=torch.tensor([t]),
                img_ids=image_ids,
                txt_ids=text_ids,
                guidance=torch.ones(1) if transformer.config.guidance_embeds else None,
            )
    hook.remove()
    tokens = torch.cat(states).mean(dim=0)
    return ((tokens - tokens.mean(dim=0)) / tokens.std(dim=0, correction=0)).T.reshape(-1, 4, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"block": 0, "timestep": 0.3, "ensemble": 3, "prompt": ""},
        {"block": 1, "timestep": 0.7, "ensemble": 1, "prompt": "a cat"},
        {"block": 2, "timestep": 0.0, "ensemble": 1, "prompt": ""},
        {"block": 3, "timestep": 0.3, "ensemble": 3, "prompt": "a cat"},
    ],
)
def test_features_are_those_of_whole_passes(folder: Path, options: dict) -> None:
    """Block, noise, prompt, the mean over draws and the channels' scale; draws in two parts, of which one is smaller."""
    torch.testing.assert_close(build(folder, **options, batch_size=2)(WIDE, 7), whole_passes(folder, 7, options), atol=1e-4, rtol=1e-4)


def test_models_without_guidance(plain_folder: Path) -> None:
    options = {"block": 2, "timestep": 0.3, "ensemble": 1, "prompt": ""}
    torch.testing.assert_close(build(plain_folder, **options)(WIDE, 7), whole_passes(plain_folder, 7, options), atol=1e-4, rtol=1e-4)


def test_blocks_and_parts_of_the_draws(folder: Path) -> None:
    """Of four blocks the third is the usual one, and others describe differently; how many draws a pass holds changes nothing."""
    image = tiny.picture()
    usual = build(folder, ensemble=3)(image, 1)
    assert usual.shape == (32, 8, 8)
    torch.testing.assert_close(build(folder, ensemble=3, batch_size=3, block=2)(image, 1), usual, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(build(folder, ensemble=3, block=3)(image, 1), usual, atol=0.1)


def test_only_what_is_needed_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither text encoders nor the blocks after the chosen one."""
    encoders = []

    def watched(cls: type, *args: object, **arguments: object) -> object:
        loaded = call_loader(cls, *args, **arguments)
        if isinstance(loaded, FluxPipeline):
            encoders.extend([weakref.ref(loaded.text_encoder), weakref.ref(loaded.text_encoder_2)])
        return loaded

    monkeypatch.setattr(flux, "call_loader", watched)
    extractor = build(folder, block=1)
    gc.collect()
    assert [one() for one in encoders] == [None, None]
    assert [len(extractor.transformer.transformer_blocks), len(extractor.transformer.single_transformer_blocks)] == [2, 0]


def test_channels_weigh_alike() -> None:
    """A channel as huge and as constant as those of diffusion transformers neither drowns the others nor divides by nothing."""
    tokens = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    huge = torch.cat([tokens * 3 + 1, 1e4 + tokens[:, :1], torch.full((64, 1), 7.0)], dim=1)
    found = standardised(huge)
    torch.testing.assert_close(found[:, :5], standardised(tokens), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.square().mean(dim=0), torch.tensor([1.0] * 6 + [0.0]), atol=1e-3, rtol=0)
    assert found.mean(dim=0).abs().max() < 1e-3


def test_places_are_known_to_the_features(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved tokens have not their features moved; they would, if all had one position. A picture of one colour is no fault."""
    extractor, grid = build(folder, block=3), Grid(4, 8)
    tokens = torch.randn(1, grid.num_tokens, 16, generator=torch.Generator().manual_seed(0))

    def moved() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return extractor.hidden_states(tokens.roll(1, dims=1), grid), extractor.hidden_states(tokens, grid).roll(1, dims=1)

    found, expected = moved()
    assert not torch.allclose(found, expected, atol=0.01)
    monkeypatch.setattr(flux, "position_ids", lambda grid, device: torch.zeros(grid.num_tokens, 3))
    torch.testing.assert_close(*moved(), atol=1e-4, rtol=1e-4)
    assert extractor(Image.new("RGB", (128, 128), "white"), 0).isfinite().all()


def test_other_models_are_refused_before_their_weights_are_read(folder: Path, tmp_path: Path) -> None:
    """A FLUX that wants a mask beside the picture, and a transformer of another kind."""
    for changed, message in (
        ({"in_channels": 24}, "of 24 channels"),
        ({"_class_name": "Flux2Transformer2DModel"}, "got a Flux2Transformer2D"),
    ):
        other = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folder / "vae", other / "vae")
        config = json.loads((folder / "transformer" / "config.json").read_text()) | changed
        (other / "transformer").mkdir()
        (other / "transformer" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"flux.model: .* must be a FLUX.1 that makes pictures of text.*16 channels.*{message}"):
            build(other)
