"""The storage of caches: what is written is read, damage is named, sizes are as stated."""

from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import safe_open
from torch import Tensor

from mosaic.data.cache.latents import cached_latent_bytes, picture_key
from mosaic.data.cache.tensors import TensorCache, content_key, is_finished, shard_path, write_index, write_shard
from mosaic.data.cache.texts import cached_text_bytes, distinct_prompts
from mosaic.pipeline.latents import draw_latents

ENCODING = {"dtype": "float32"}
DESCRIPTION = '{"kind": "latents", "version": 1, "encoding": {"dtype": "float32"}}'


def random_entries(seed: int, count: int) -> dict[bytes, dict[str, Tensor]]:
    """Entries of two shapes and two tensors each, in bfloat16, one of them under a key that ends in zeros."""
    generator = torch.Generator().manual_seed(seed)
    entries = {}
    for index in range(count):
        shape = (2, 3 + index % 2)
        key = bytes(14) + bytes([seed + 1, 0]) if index == 1 else content_key(f"{seed} {index}".encode())
        entries[key] = {name: torch.randn(shape, generator=generator).bfloat16() for name in ("a.b", "c")}
    return entries


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "cache.json").write_text(DESCRIPTION)
    for shard in range(3):
        write_shard(shard_path(tmp_path, shard), [f"{shard}-x", None], [f"{shard}-x"], random_entries(shard, 5))
    write_index(tmp_path, 3)
    return tmp_path


def opened(folder: Path) -> TensorCache:
    return TensorCache(folder, "data.latent_cache", "latents", ENCODING)


def test_round_trip(folder: Path) -> None:
    cache = opened(folder)
    assert len(cache) == 15
    for shard in range(3):
        for key, tensors in random_entries(shard, 5).items():
            found = cache.read(key)
            assert found is not None
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert cache.read(content_key(b"other")) is None
    assert cache.read(bytes(16)) is None
    assert cache.read(b"\xff" * 16) is None


def test_equal_keys_are_found_once(folder: Path) -> None:
    write_shard(shard_path(folder, 3), ["again"], ["again"], random_entries(1, 5))
    write_index(folder, 4)
    assert len(opened(folder)) == 15


def test_names(folder: Path) -> None:
    cache = opened(folder)
    cache.check_names(["2-x", None, "0-x"], "samples")
    with pytest.raises(ValueError, match=r'lacks 2 of 3 samples, such as "y"\. The same command adds them: accelerate launch'):
        cache.check_names(["1-x", "y", "z"], "samples")
    assert cache.shard_of("1-x") == shard_path(folder, 1)
    assert cache.shard_of("y") is None


def test_a_shard_is_finished_whole_and_for_its_names_only(folder: Path) -> None:
    path = shard_path(folder, 0)
    assert is_finished(path, ["0-x", None])
    assert not is_finished(path, ["0-x"])
    assert not is_finished(shard_path(folder, 9), [])
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_finished(path, ["0-x", None])


@pytest.mark.parametrize("damage", ["shard cut", "shard missing", "index cut", "names missing", "no description", "kind", "foreign index"])
def test_damage_is_named(folder: Path, damage: str) -> None:
    shard, index = shard_path(folder, 1), folder / "index.parquet"
    if damage == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "shard missing":
        shard.unlink()
    elif damage == "index cut":
        index.write_bytes(index.read_bytes()[:-9])
    elif damage == "names missing":
        (folder / "names.parquet").unlink()
    elif damage == "no description":
        (folder / "cache.json").unlink()
    elif damage == "kind":
        (folder / "cache.json").write_text(DESCRIPTION.replace("latents", "text"))
    else:
        index.write_bytes((folder / "names.parquet").read_bytes())
    message = {
        "shard cut": r"000001\.safetensors: cannot be read .* Remove the file and build it again: accelerate launch",
        "shard missing": r"000001\.safetensors: cannot be read",
        "index cut": r"index\.parquet: cannot be read .* Remove it; the same command writes it again",
        "names missing": "is not finished. The same command goes on with it",
        "no description": "data.latent_cache: there is no cache in .* Build it: accelerate launch",
        "kind": 'must describe a cache of kind "latents", version 1',
        "foreign index": "is no index of this version",
    }[damage]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        opened(folder)


def test_every_pixel_and_the_size_make_the_key() -> None:
    pixels = torch.randint(0, 256, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    picture = pixels.float() / 127.5 - 1
    keys = {picture_key(picture), picture_key(picture.reshape(3, 6, 4)), picture_key(picture.flip(0))}
    for index in range(pixels.numel()):
        changed = pixels.clone().flatten()
        changed[index] ^= 1
        keys.add(picture_key(changed.reshape(pixels.shape).float() / 127.5 - 1))
    assert len(keys) == 3 + pixels.numel()
    assert picture_key((pixels.double() / 127.5 - 1).float()) == picture_key(picture)


def test_latents_of_a_posterior_by_hand() -> None:
    mean, logvar = torch.tensor([1.0, -2.0]).reshape(1, 2, 1, 1), torch.tensor([0.0, 2.0]).reshape(1, 2, 1, 1)
    posterior = DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1))
    mode = draw_latents(posterior, 0.5, 2.0)
    assert mode.flatten().tolist() == [1.0, -5.0]
    noise = torch.randn(1, 2, 1, 1, generator=torch.Generator().manual_seed(4))
    drawn = draw_latents(posterior, 0.5, 2.0, torch.Generator().manual_seed(4))
    torch.testing.assert_close(drawn, (mean + torch.exp(logvar / 2) * noise - 0.5) * 2)


def test_sizes_as_stated(tmp_path: Path) -> None:
    """512 px and K = 2: three pictures of 2 x 16 x 64 x 64 numbers in bfloat16; and of a FLUX prompt 512 x 4096 + 768."""
    assert cached_latent_bytes((512, 512), 512, 2) == 768 * 1024
    assert cached_latent_bytes((1024, 1024), 512, 6) == (4 + 6) * 256 * 1024
    assert cached_latent_bytes((16, 24), 12, 1, scale_factor=2, channels=4, value_bytes=4) == (8 * 12 + 6 * 6) * 8 * 4
    assert cached_text_bytes() == 4 * 2**20 + 1536
    entries = {content_key(bytes([k])): {"moments": torch.zeros(32, 64, 64, dtype=torch.bfloat16)} for k in range(3)}
    path = tmp_path / "shard.safetensors"
    write_shard(path, ["a"], ["a"], entries)
    assert 1 <= path.stat().st_size / cached_latent_bytes((512, 512), 512, 2) < 1.001
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["0.key", "0.moments"]


def test_distinct_prompts_keep_their_order() -> None:
    """So that prompts of added samples come last and finished shards stay good."""
    assert distinct_prompts(["b", "a", "b"]) == ["", "b", "a"]
    assert distinct_prompts(["b", "a", "b", "c"])[:3] == ["", "b", "a"]
