"""Extractors on tiny random models of the real classes: grids, taps, noise, adapters, and files that must be refused."""

import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from mosaic.method.grids import Grid
from preprocess.extractors import EXTRACTORS, build_extractor, extractor_spec
from preprocess.extractors.aggregation import AggregationNetwork, load_aggregation
from preprocess.extractors.geoaware import free_u, tile_starts
from preprocess.extractors.hooks import outputs_until
from preprocess.extractors.protocol import fitted_grid, picture_tensor
from preprocess.matching.matching import match_features
from tests import tiny_extractors as tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and adapters of every kind."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save_stable_diffusion(folder / "sd")
    tiny.save_flux(folder / "flux")
    tiny.save_dinov2(folder / "dinov2")
    tiny.save_dinov3(folder / "dinov3")
    tiny.save_aggregation(folder / "diysc.pth", [tiny.DINO_WIDTH])
    tiny.save_aggregation(folder / "best.PTH", [tiny.WIDTHS[1], tiny.WIDTHS[-1], tiny.WIDTHS[-1], tiny.DINO_WIDTH])
    state = load_file(folder / "sd/unet/diffusion_pytorch_model.safetensors")
    save_file({name: tensor * 0.9 for name, tensor in state.items()}, folder / "clean.safetensors")
    return folder


def build(name: str, folder: Path, **options: object) -> object:
    """An extractor on the tiny models."""
    return build_extractor(extractor_spec(name, defaults(name, folder) | options))


@cache
def usual(name: str, folder: Path) -> object:
    """The extractor without options, made once: a picture leaves nothing behind in it."""
    return build(name, folder)


def defaults(name: str, folder: Path) -> dict[str, object]:
    options = {
        "dift": {"model": str(folder / "sd"), "size": 128, "ensemble": 3, "batch_size": 2},
        "cleandift": {"model": str(folder / "sd"), "size": 128, "weights": str(folder / "clean.safetensors")},
        "geoaware": {"model": str(folder / "sd"), "dino": str(folder / "dinov2"), "size": 128, "weights": str(folder / "best.PTH")},
        "dinov2": {"model": str(folder / "dinov2"), "size": 112},
        "dinov2_diysc": {"model": str(folder / "dinov2"), "size": 112, "weights": str(folder / "diysc.pth")},
        "dinov3": {"model": str(folder / "dinov3"), "size": 128},
        "flux": {"model": str(folder / "flux"), "size": 32, "ensemble": 3, "batch_size": 2},
        "vae": {"model": str(folder / "sd"), "size": 64},
        "pixels": {"cells": 8},
    }
    return options[name]


@pytest.mark.parametrize("name", EXTRACTORS)
def test_every_extractor_keeps_its_protocol(name: str, folder: Path) -> None:
    """The stated grid, float32, the same numbers for the same seed, and rows from rows: a wide picture has a wide map."""
    extractor = usual(name, folder)
    shapes = {}
    for height, width in ((128, 128), (64, 128), (128, 64)):
        image = tiny.picture(height, width)
        features = extractor(image, 5)
        assert features.dtype == torch.float32
        assert features.isfinite().all()
        assert features.shape[1:] == tuple(extractor.grid(height, width))
        assert torch.equal(features, extractor(image, 5))
        shapes[height, width] = Grid(*features.shape[1:])
    assert shapes[128, 128] == Grid(8, 8)
    assert (shapes[64, 128], shapes[128, 64]) == (Grid(4, 8), Grid(8, 4))
    assert isinstance(extractor.provenance, dict)


@pytest.mark.parametrize("name", ["dift", "dinov2", "flux", "geoaware", "pixels", "vae"])
def test_a_picture_matches_itself(name: str, folder: Path) -> None:
    features = usual(name, folder)(tiny.picture(), 5)
    assert match_features(features, features).index.tolist() == list(range(64))


def test_seeds_change_noised_pictures_only(folder: Path) -> None:
    image = tiny.picture()
    for name in ("dift", "flux"):
        assert not torch.equal(usual(name, folder)(image, 1), usual(name, folder)(image, 2)), name
    for name in ("cleandift", "geoaware", "dinov2"):
        assert torch.equal(usual(name, folder)(image, 1), usual(name, folder)(image, 2)), name


def test_dift_equals_whole_passes(folder: Path) -> None:
    """The mean over draws of a pass that is not cut short, noise drawn and added as DIFT does."""
    dift, image = build("dift", folder, prompt="a cat"), tiny.picture()
    unet, vae = dift.unet, dift.vae
    generator = torch.Generator().manual_seed(7)
    with torch.inference_mode():
        distribution = vae.encode(picture_tensor(image, (128, 128))).latent_dist
        latents = distribution.sample(generator) * vae.config.scaling_factor
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        found, maps = torch.randn(3, *latents.shape[1:], generator=generator), []
        for noise in found:
            noisy = scheduler.add_noise(latents, noise[None], torch.tensor([261]))
            hook = unet.up_blocks[1].register_forward_hook(lambda module, inputs, output: maps.append(output))
            unet(noisy, 261, encoder_hidden_states=dift.embedding)
            hook.remove()
        expected = torch.cat(maps).mean(dim=0)
    torch.testing.assert_close(dift(image, 7), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(usual("dift", folder)(image, 7), expected, atol=1e-5)  # another prompt


def test_noise_level() -> None:
    from preprocess.extractors.stable_diffusion import noise_latents

    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)[261]
    one = torch.ones(2, 1, 1, 1)
    expected = kept**0.5 * 1 + (1 - kept) ** 0.5 * 3
    torch.testing.assert_close(noise_latents(one[:1], 3 * one, 261), torch.full_like(one, expected))


def test_hooks_end_the_pass_and_leave_nothing_behind() -> None:
    reached = []
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    net[2].register_forward_hook(lambda module, inputs, output: reached.append(1))
    first, second = outputs_until([net[0], net[1]], lambda: net(torch.ones(1, 2)))
    assert (first.shape[1], second.shape[1], reached) == (3, 4, [])
    net(torch.ones(1, 2))
    assert reached == [1]
    assert not net[0]._forward_hooks
    pair = torch.nn.RNN(2, 3)
    assert [outputs_until([pair], lambda: pair(torch.ones(4, 1, 2)), k)[0].shape[0] for k in (0, 1)] == [4, 1]
    with pytest.raises(ZeroDivisionError):
        outputs_until([net[0]], lambda: 1 / 0)
    assert not net[0]._forward_hooks


# --- GeoAware


def test_tiles_cover_the_side_and_stay_inside() -> None:
    assert tile_starts(1024) == [0, 512]
    assert tile_starts(960) == [0, 448]
    assert tile_starts(512) == [0]
    assert tile_starts(320) == [0]


def test_overlapping_tiles_are_averaged_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With taps that only repeat the picture's mean colour per cell, tiling must give the map of the whole picture back."""
    geoaware = build("geoaware", folder, size=960)
    monkeypatch.setattr(geoaware, "taps", lambda pixels: [F.avg_pool2d(pixels, stride)[0] for stride in (16, 32, 64)])
    pixels = torch.rand(1, 3, 960, 576, generator=torch.Generator().manual_seed(0))
    for tap, stride in zip(geoaware.tiled_taps(pixels), (16, 32, 64), strict=True):
        torch.testing.assert_close(tap, F.avg_pool2d(pixels, stride)[0])


def test_taps_carry_the_gain_and_free_u_follows_the_width(folder: Path) -> None:
    """Hidden states before every residual block of the decoder, with hooks of the test's own."""
    geoaware = usual("geoaware", folder)
    unet, seen = geoaware.unet, []
    assert [block.resnets[0].in_channels for block in unet.up_blocks] == [128, 128, 96, 64]
    plain, gained = [], []
    x, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 50
    resnet = unet.up_blocks[0].resnets[0]  # its input is [64 hidden, 64 skip], and nothing before it is changed
    for stored, context in ((plain, None), (gained, free_u(unet))):
        if context:
            context.__enter__()
        hook = resnet.register_forward_pre_hook(lambda module, inputs, stored=stored: stored.append(inputs[0].clone()))
        with torch.inference_mode():
            unet(x, t, encoder_hidden_states=geoaware.embedding)
        hook.remove()
        if context:
            context.__exit__(None, None, None)
    torch.testing.assert_close(gained[0][:, :32], plain[0][:, :32] * 1.2)
    torch.testing.assert_close(gained[0][:, 32:64], plain[0][:, 32:64])
    spectrum = [torch.fft.fftshift(torch.fft.fftn(h[:, 64:], dim=(-2, -1)), dim=(-2, -1)) for h in (plain[0], gained[0])]
    middle = spectrum[0].shape[-1] // 2
    low = (..., slice(middle - 1, middle + 1), slice(middle - 1, middle + 1))
    torch.testing.assert_close(spectrum[1][low], spectrum[0][low] * 0.9)
    assert not any(r._forward_pre_hooks for block in unet.up_blocks for r in block.resnets)
    # The first half of every tap is larger than what its module put out under FreeU.
    with torch.inference_mode():
        taps = geoaware.taps(torch.zeros(1, 3, 128, 128))
        modules = [unet.up_blocks[0].resnets[1], unet.up_blocks[1].attentions[1], unet.up_blocks[2].attentions[1]]
        latents = geoaware.vae.encode(torch.zeros(1, 3, 128, 128)).latent_dist.mean * geoaware.vae.config.scaling_factor
        noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(42))[..., :16, :16]
        kept = float(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[50])
        noisy = kept**0.5 * latents + (1 - kept) ** 0.5 * noise
        with free_u(unet):
            seen = outputs_until(modules, lambda: unet(noisy, 50, encoder_hidden_states=geoaware.embedding))
    for tap, raw, gain in zip(taps, reversed(seen), (1.4, 1.2, 1.2), strict=True):
        half = len(tap) // 2
        torch.testing.assert_close(tap[:half], raw[0, :half] * gain, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(tap[half:], raw[0, half:], atol=1e-4, rtol=1e-4)
    assert [tuple(tap.shape) for tap in taps] == [(32, 8, 8), (64, 4, 4), (64, 2, 2)]


def test_aggregation_has_the_published_keys_shapes_and_size() -> None:
    network = AggregationNetwork([640, 1280, 1280, 768], 192, 768)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes["mixing_weights"] == (4,)
    assert shapes["bottleneck_layers.0.0.conv1.weight"] == (192, 640, 1, 1)
    assert shapes["bottleneck_layers.1.0.conv2.weight"] == (192, 192, 3, 3)
    assert shapes["bottleneck_layers.2.0.conv3.weight"] == (768, 192, 1, 1)
    assert shapes["bottleneck_layers.2.0.shortcut.weight"] == (768, 1280, 1, 1)
    assert shapes["bottleneck_layers.2.0.shortcut.norm.bias"] == (768,)
    assert shapes["bottleneck_layers.3.0.conv1.norm.weight"] == (192,)
    assert not any("3.0.shortcut" in name or name.endswith("conv1.bias") for name in shapes)
    assert sum(tensor.numel() for tensor in network.state_dict().values()) + 2 == 5_150_214  # two unused scalars
    one = {name: tuple(tensor.shape) for name, tensor in AggregationNetwork([768], 192, 768).state_dict().items()}
    assert one["mixing_weights"] == (1,)
    assert not any("shortcut" in name for name in one)


def test_aggregation_by_hand(tmp_path: Path) -> None:
    """One branch, written out with functional calls; the mix uses softmax weights and unit length."""
    written = tiny.save_aggregation(tmp_path / "two.pth", [48, 64])
    network = load_aggregation(str(tmp_path / "two.pth"), "weights", [48, 64], CPU, torch.float32)
    x, s = torch.randn(2, 112, 5, 6, generator=torch.Generator().manual_seed(1)), written.state_dict()

    def conv(name: str, y: torch.Tensor, padding: int = 0) -> torch.Tensor:
        return F.group_norm(F.conv2d(y, s[f"{name}.weight"], padding=padding), 32, s[f"{name}.norm.weight"], s[f"{name}.norm.bias"], 1e-5)

    branches = []
    for i, part in enumerate((x[:, :48], x[:, 48:])):
        name = f"bottleneck_layers.{i}.0"
        y = conv(f"{name}.conv3", F.relu(conv(f"{name}.conv2", F.relu(conv(f"{name}.conv1", part)), 1)))
        branches.append(F.relu(y + (part if i else conv(f"{name}.shortcut", part))))
    weights = s["mixing_weights"].exp() / s["mixing_weights"].exp().sum()
    mixed = weights[0] * branches[0] + weights[1] * branches[1]
    torch.testing.assert_close(network(x), mixed / mixed.norm(dim=1, keepdim=True))


# --- DINO


@pytest.mark.parametrize(("name", "prefix"), [("dinov2", 1), ("dinov3", 5)])
def test_dino_takes_patches_before_the_final_norm(name: str, prefix: int, folder: Path) -> None:
    extractor, image = usual(name, folder), tiny.picture(64, 128)
    patch, (rows, columns) = extractor.patch, extractor.grid(64, 128)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = torch.from_numpy(np.array(image.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    with torch.inference_mode():
        output = extractor.model((pixels - mean)[None] / std, output_hidden_states=True)
        norm = extractor.model.layernorm if name == "dinov2" else extractor.model.norm
        features = extractor(image, 0)
        tokens = features.flatten(1).T
        torch.testing.assert_close(norm(tokens), output.last_hidden_state[0, prefix:])
    first = build(name, folder, layer=1)(image, 0)
    assert not torch.allclose(first, features)
    torch.testing.assert_close(first.flatten(1).T, output.hidden_states[1][0, prefix:])


def test_diysc_is_the_adapter_on_dinov2(folder: Path) -> None:
    image, plain = tiny.picture(), usual("dinov2", folder)
    network = load_aggregation(str(folder / "diysc.pth"), "weights", [tiny.DINO_WIDTH], CPU, torch.float32)
    found = usual("dinov2_diysc", folder)(image, 0)
    with torch.inference_mode():
        torch.testing.assert_close(found, network(plain(image, 0)[None])[0])
    torch.testing.assert_close(found.norm(dim=0), torch.ones(8, 8))


# --- pixels, pictures


def test_pixels_of_a_mirrored_and_a_turned_picture() -> None:
    """Windows are symmetric, so features move with the pixels."""
    extractor, image = build_extractor(extractor_spec("pixels", {"cells": 16})), tiny.picture(96, 96)
    features = extractor(image, 0)
    mirrored = extractor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 0)
    turned = extractor(image.transpose(Image.Transpose.ROTATE_90), 0)
    torch.testing.assert_close(mirrored, features.flip(-1), atol=0.02, rtol=0)
    torch.testing.assert_close(turned, features.rot90(1, (-2, -1)), atol=0.02, rtol=0)
    assert match_features(mirrored, features).index.reshape(16, 16).flip(-1).tolist() == torch.arange(256).reshape(16, 16).tolist()


def test_fitted_grid() -> None:
    assert fitted_grid(512, 512, 64) == Grid(64, 64)
    assert fitted_grid(300, 600, 64) == Grid(32, 64)
    assert fitted_grid(600, 310, 64, 4) == Grid(64, 32)
    assert fitted_grid(1000, 1, 64, 4) == Grid(64, 4)


# --- what must be refused


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dinov22", {}, "Did you mean dinov2"),
        ("superglue", {}, "Known: dift"),
        ("dift", {"step": 3}, "dift.step is not a known setting"),
        ("dift", {"ensemble": 0}, "dift.ensemble must be an integer of at least 1"),
        ("flux", {"timestep": 1}, "flux.timestep must be a number of at least 0 and less than 1"),
        ("pixels", {"scales": "many"}, "pixels.scales must be an integer"),
    ],
)
def test_bad_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extractor_spec(name, options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dift", {"model": "no/such/folder/here"}, "dift.model: .*no such folder"),
        ("dift", {"size": 100}, "dift.size must be a multiple of 64 px, got 100. Nearest: 128"),
        ("dinov2", {"size": 100}, "dinov2.size must be a multiple of 14 px"),
        ("flux", {"model": "no/such/folder/here"}, "flux.model: .*no such folder"),
        ("flux", {"size": 30}, "flux.size must be a multiple of 4 px, got 30. Nearest: 32"),
        ("flux", {"block": 4}, "flux.block must be at most 3, the last of the 4 blocks of .*flux, got 4"),
        ("dinov2", {"layer": 3}, "dinov2.layer must be at most 2"),
        ("cleandift", {"weights": None}, "cleandift.weights must name"),
        ("geoaware", {"weights": None}, "geoaware.weights must name"),
        ("dinov2_diysc", {"weights": None}, "dinov2_diysc.weights must name"),
        ("geoaware", {"weights": "missing.PTH"}, "geoaware.weights: file not found: missing.PTH"),
    ],
)
def test_bad_models(name: str, options: dict, message: str, folder: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(name, folder, **options)


def test_a_folder_without_its_parts(folder: Path) -> None:
    with pytest.raises(ValueError, match="dift.model: the unet of .*dinov2 cannot be loaded"):
        build("dift", folder, model=str(folder / "dinov2"))
    with pytest.raises(ValueError, match="flux.model: the transformer of .*sd cannot be loaded"):
        build("flux", folder, model=str(folder / "sd"))
    with pytest.raises(ValueError, match="dinov2.model: .* cannot be loaded"):
        build("dinov2", folder, model=str(folder / "sd"))


class Exploit:
    """Would create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickled_and_damaged_adapters_are_refused(folder: Path, tmp_path: Path) -> None:
    good, mark = (folder / "best.PTH").read_bytes(), tmp_path / "executed"
    (tmp_path / "pickle.PTH").write_bytes(pickle.dumps({"a": Exploit(mark)}))
    torch.save({"mixing_weights": torch.ones(4), "a": Exploit(mark)}, tmp_path / "torch_pickle.PTH")
    torch.save([torch.ones(4)], tmp_path / "list.PTH")
    torch.save({"a": 3}, tmp_path / "numbers.PTH")
    (tmp_path / "empty.PTH").write_bytes(b"")
    (tmp_path / "half.PTH").write_bytes(good[: len(good) // 2])
    (tmp_path / "noise.PTH").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "half.safetensors").write_bytes((folder / "clean.safetensors").read_bytes()[:5000])
    for path in tmp_path.iterdir():
        name = "geoaware" if path.stem == "torch_pickle" else "dinov2_diysc"  # which has fewer models to load, for the same reader
        with pytest.raises(ValueError, match=rf"{name}.weights: .*(damaged|must hold)"):
            build(name, folder, weights=str(path))
    assert not mark.exists()


def test_flipped_bytes_never_crash(folder: Path, tmp_path: Path) -> None:
    """Wherever a byte of the file is wrong: a clear error, or numbers of the right shape (the format has no check sum for them)."""
    good, path, messages = (folder / "diysc.pth").read_bytes(), tmp_path / "damaged.pth", []
    generator = np.random.default_rng(0)
    for position in [*generator.integers(0, len(good), 40), *range(0, 200, 5), *range(len(good) - 100, len(good), 5)]:
        path.write_bytes(good[:position] + bytes([good[position] ^ 255]) + good[position + 1 :])
        try:
            load_aggregation(str(path), "weights", [tiny.DINO_WIDTH], CPU, torch.float32)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all(message.startswith("weights: ") for message in messages)


def test_adapters_of_other_models_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 branches, found 1"):
        build("geoaware", folder, weights=str(folder / "diysc.pth"))
    tiny.save_aggregation(tmp_path / "wide.pth", [64])
    with pytest.raises(ValueError, match=r"made for feature maps of \[64\] channels, but the models give \[32\]"):
        build("dinov2_diysc", folder, weights=str(tmp_path / "wide.pth"))
    state = torch.load(folder / "diysc.pth", weights_only=True)
    state.pop("bottleneck_layers.0.0.conv2.norm.bias")
    torch.save(state, tmp_path / "lacking.pth")
    with pytest.raises(ValueError, match="lacks bottleneck_layers.0.0.conv2.norm.bias"):
        build("dinov2_diysc", folder, weights=str(tmp_path / "lacking.pth"))
    state = load_file(folder / "clean.safetensors")
    state["conv_in.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"cleandift.weights: conv_in.weight must have the shape \[32, 4, 3, 3\], got \[1\]"):
        build("cleandift", folder, weights=str(tmp_path / "other.safetensors"))


def test_provenance_follows_the_weights(folder: Path, tmp_path: Path) -> None:
    first = usual("dinov2_diysc", folder).provenance
    state = torch.load(folder / "diysc.pth", weights_only=True)
    torch.save({name: tensor * 2 for name, tensor in state.items()}, tmp_path / "other.pth")
    assert build("dinov2_diysc", folder, weights=str(tmp_path / "other.pth")).provenance != first
    assert usual("cleandift", folder).provenance["weights_sha256"]
