"""Training from caches: losses, gradients and weights as with live encoders, dropout, what is not loaded, and stale caches."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from mosaic.data import BucketBatchSampler, CachedSamples, collate
from mosaic.data.cache.opening import text_encoding
from mosaic.data.cache.texts import TextCache
from mosaic.training import Trainer, train
from mosaic.training.encoding import encode_batch
from preprocess import cache
from tests import runs, semalign_set, tiny
from tests.semalign_set import needs_classic_zlib

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def build(config_file: Path, *flags: str) -> int:
    """Fill the caches that a config file names, in this process."""
    code = cache.main([str(config_file), "--device", "cpu", "--shard-size", "2", *flags])
    PartialState._reset_state()
    return code


def cached_settings(world: Path, output: Path, caches: Path, **changes: Any) -> dict[str, Any]:
    """Settings that name both caches."""
    values = runs.settings(world, output)
    values["data"] |= {"latent_cache": str(caches / "latents"), "text_cache": str(caches / "text")}
    for name, value in changes.items():
        section, field = name.split("__")
        values[section][field] = value
    return values


def write_settings(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def caches(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both caches of the small world; not to be changed."""
    folder = tmp_path_factory.mktemp("caches")
    assert build(write_settings(folder / "config.json", cached_settings(world, folder / "run", folder))) == 0
    return folder


def live_and_cached(world: Path, tmp_path: Path, caches: Path, **changes: Any) -> tuple[Trainer, Trainer]:
    live = Trainer(runs.make_config(world, tmp_path / "live", **changes))
    cached = {"data__latent_cache": str(caches / "latents"), "data__text_cache": str(caches / "text")}
    return live, Trainer(runs.make_config(world, tmp_path / "cached", **changes, **cached))


def assert_equal_steps(live: Trainer, cached: Trainer, batch_size: int, exactly: bool) -> None:
    """Losses and gradients of a batch of every kind."""
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 1e-6}
    for seed, indices in enumerate(BucketBatchSampler(live.dataset.batch_keys, batch_size, seed=3)):
        found = []
        for trainer in (live, cached):
            trainer.optimizer.zero_grad()
            loss = runs.step_loss(trainer, collate([trainer.dataset[index] for index in indices]), seed)
            loss.total.backward()
            found.append((loss, runs.gradients(trainer)))
        torch.testing.assert_close(found[1][0], found[0][0], **tolerance)
        torch.testing.assert_close(found[1][1], found[0][1], **tolerance)
        assert runs.total_norm(found[1][1]) > 0


@pytest.mark.parametrize("dropout", ["both_dropout", None])
def test_losses_and_gradients_equal_those_of_live_encoders(world: Path, tmp_path: Path, caches: Path, dropout: str | None) -> None:
    changes = {f"data__{dropout}": 0.5} if dropout else {}
    live, cached = live_and_cached(world, tmp_path, caches, **changes)
    assert_equal_steps(live, cached, batch_size=1, exactly=True)
    assert_equal_steps(live, cached, batch_size=2, exactly=False)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # RMSNorm under autocast: only not fused
def test_bfloat16(world: Path, tmp_path: Path) -> None:
    """Kept as it was computed: bit by bit the same, at half the size."""
    options = {"model__dtype": "bfloat16", "training__mixed_precision": "bf16"}
    assert build(write_settings(tmp_path / "config.json", cached_settings(world, tmp_path / "run", tmp_path, **options))) == 0
    live, cached = live_and_cached(world, tmp_path, tmp_path, **options)
    sample = cached.dataset[0]
    assert sample.posteriors.target.dtype == sample.posteriors.references.dtype == sample.text.prompt_embeds.dtype == torch.bfloat16
    assert_equal_steps(live, cached, batch_size=1, exactly=True)


def test_the_tensors_are_those_of_the_encoders(world: Path, tmp_path: Path, caches: Path) -> None:
    """Bit by bit, drawn from the posterior with one generator and as its mode; the prompts' embeddings too."""
    live, cached = live_and_cached(world, tmp_path, caches)
    for index in range(len(live.dataset)):
        batches = [collate([trainer.dataset[index]]) for trainer in (live, cached)]
        for seed in (None, 7):
            found = []
            for trainer, batch in zip((live, cached), batches, strict=True):
                generator = None if seed is None else torch.Generator().manual_seed(seed)
                found.append(encode_batch(trainer.pipeline.encoders, batch, batch.prompts, tiny.TEXT_LENGTH, generator, CPU))
            for name in ("latents", "references", "prompt_embeds", "pooled"):
                assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name
    batch = collate([cached.dataset[0], cached.dataset[2]])
    mixed = encode_batch(cached.pipeline.encoders, batch, ["", batch.prompts[1]], tiny.TEXT_LENGTH, None, CPU)
    empty = encode_batch(live.pipeline.encoders, collate([live.dataset[0]]), [""], tiny.TEXT_LENGTH, None, CPU)
    assert torch.equal(mixed.prompt_embeds[:1], empty.prompt_embeds)
    assert torch.equal(mixed.pooled[:1], empty.pooled)
    assert not torch.equal(mixed.prompt_embeds[1], mixed.prompt_embeds[0])


def test_a_run_ends_at_the_same_weights(world: Path, tmp_path: Path, caches: Path) -> None:
    options = {"training__batch_size": 1, "training__max_steps": 4, "data__text_dropout": 0.3, "data__image_dropout": 0.3}
    paths = []
    for name, extra in (("live", {}), ("cached", {"data__num_workers": 1})):
        values = cached_settings(world, tmp_path / name, caches, **options, **extra)
        if name == "live":
            values["data"] |= {"latent_cache": None, "text_cache": None}
        paths.append(train(runs.from_dict(values)))
    runs.assert_same_tensors(*(load_file(path) for path in paths))


def test_encoders_are_not_loaded(world: Path, tmp_path: Path, caches: Path) -> None:
    """The pipeline holds None in their place, and the only network in it is the transformer."""
    encoders = {"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    live, cached = live_and_cached(world, tmp_path, caches)
    components = cached.pipeline.components
    assert {name for name, value in components.items() if value is None and live.pipeline.components[name] is not None} == encoders
    assert {name for name, value in components.items() if isinstance(value, nn.Module)} == {"transformer"}
    assert cached.pipeline.encoders.vae_scale_factor == live.pipeline.encoders.vae_scale_factor == 2
    only = Trainer(runs.make_config(world, tmp_path / "run", data__latent_cache=str(caches / "latents")))
    assert only.pipeline.vae is None
    assert only.pipeline.text_encoder_2 is not None
    only = Trainer(runs.make_config(world, tmp_path / "run", data__text_cache=str(caches / "text")))
    assert only.pipeline.vae is not None
    assert only.pipeline.text_encoder_2 is None
    only.optimizer_step([collate([only.dataset[0]])])


def test_validation_keeps_the_encoders(world: Path, tmp_path: Path, caches: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    values = cached_settings(world, tmp_path / "run", caches, validation__every=2, training__max_steps=2)
    trainer = Trainer(runs.from_dict(values))
    assert "validation.every=null leaves them out" in caplog.text
    assert trainer.pipeline.vae is not None
    trainer.pipeline.vae.encode = trainer.pipeline.encode_prompt = None  # what training does not use
    trainer.optimizer_step([collate([trainer.dataset[0]])])
    train(runs.from_dict(cached_settings(world, tmp_path / "other", caches, validation__every=2, training__max_steps=2)))
    assert (tmp_path / "other/validation/step_00000002/case_0.png").is_file()


def test_buckets(world: Path, tmp_path: Path) -> None:
    options = {
        "data__root": str(runs.write_aspects(tmp_path / "aspects")),
        "data__buckets": [list(size) for size in runs.ASPECT_SIZES],
        "data__image_size": [16, 16],
    }
    assert build(write_settings(tmp_path / "config.json", cached_settings(world, tmp_path / "run", tmp_path, **options))) == 0
    live, cached = live_and_cached(world, tmp_path, tmp_path, **options)
    assert {tuple(cached.dataset[index].posteriors.target.shape) for index in range(9)} == {(8, 8, 8), (8, 8, 16), (8, 16, 8)}
    assert_equal_steps(live, cached, batch_size=1, exactly=True)


@needs_classic_zlib
def test_semalign(world: Path, tmp_path: Path) -> None:
    semalign_set.write_set(tmp_path / "data", num_kept=3)
    options = {"data__format": "semalign", "data__root": str(tmp_path / "data"), "data__image_size": [64, 64], "data__reference_size": 32}
    options |= {"data__heldout_share": 0}
    assert build(write_settings(tmp_path / "config.json", cached_settings(world, tmp_path / "run", tmp_path, **options))) == 0
    live, cached = live_and_cached(world, tmp_path, tmp_path, **options)
    assert live.dataset.prompts() == [live.dataset[index].prompt for index in range(3)]
    assert_equal_steps(live, cached, batch_size=1, exactly=True)


def test_samples_left_out_are_left_out_of_the_cache(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(world / "data", tmp_path / "data")
    (tmp_path / "data/images/train-4_target.png").write_bytes(b"no picture")
    values = cached_settings(world, tmp_path / "run", tmp_path, data__root=str(tmp_path / "data"))
    assert build(write_settings(tmp_path / "config.json", values)) == 2
    assert "data.skip_invalid=true leaves such samples out" in capsys.readouterr().err
    assert build(tmp_path / "config.json", "--set", "data.skip_invalid=true") == 0
    assert "1 could not be read" in capsys.readouterr().out
    values["data"]["skip_invalid"] = True
    trainer = Trainer(runs.from_dict(values))
    assert isinstance(trainer.dataset, CachedSamples)
    assert len(trainer.dataset) == 8
    trainer.fit()


# ---- stale caches: refused before training, with the cure


def stale(world: Path, tmp_path: Path, caches: Path, **changes: Any) -> str:
    """What training says of a cache that does not fit, in one message."""
    values = cached_settings(world, tmp_path / "run", caches, **changes)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        Trainer(runs.from_dict(values))
    assert not (tmp_path / "run").exists()
    assert "accelerate launch preprocess/cache.py CONFIG" in str(caught.value)
    return str(caught.value)


def test_caches_made_otherwise_are_refused(world: Path, tmp_path: Path, caches: Path) -> None:
    assert "stale: target_sizes" in stale(world, tmp_path, caches, data__image_size=[16, 16])
    assert "stale: reference_size was 12 and is now 8" in stale(world, tmp_path, caches, data__reference_size=8)
    assert 'stale: dtype was "float32" and is now "bfloat16"' in stale(world, tmp_path, caches, model__dtype="bfloat16")
    found = stale(world, tmp_path, caches, model__text_length=4)
    assert found.startswith("data.text_cache: the cache in ")
    assert "text_length was 8 and is now 4" in found
    assert "there is no cache in" in stale(world, tmp_path, tmp_path / "nowhere")
    assert "data.latent_cache" in stale(world, tmp_path, caches, data__text_cache=None, data__latent_cache=str(tmp_path / "no"))


@pytest.mark.parametrize(("component", "setting"), [("vae", "data.latent_cache"), ("text_encoder_2", "data.text_cache")])
def test_other_weights_are_refused(world: Path, tmp_path: Path, caches: Path, component: str, setting: str) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    (path,) = (tmp_path / "model" / component).glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    found = stale(world, tmp_path, caches, model__pretrained=str(tmp_path / "model"))
    assert found.startswith(f"{setting}: the cache in ")
    assert f"{component}.revision" in found or f"stale: {component} was" in found


def test_new_samples_and_changed_pictures_are_refused(world: Path, tmp_path: Path) -> None:
    """A sample that came later, by its name; a picture that was changed, by its pixels; both cured as the message says."""
    shutil.copytree(world / "data", tmp_path / "data")
    values = cached_settings(world, tmp_path / "run", tmp_path, data__root=str(tmp_path / "data"))
    config = write_settings(tmp_path / "config.json", values)
    assert build(config) == 0
    path = tmp_path / "data/images/train-1_ref0.png"
    pixels = np.array(Image.open(path))
    pixels[5, 5, 0] ^= 1
    Image.fromarray(pixels).save(path)
    found = stale(world, tmp_path, tmp_path, data__root=str(tmp_path / "data"))
    assert 'does not hold the reference 0 of the sample "train-1" as it is now' in found
    shard = tmp_path / "latents/shards/000000.safetensors"
    assert f"Remove {shard} and build it again" in found
    shard.unlink()
    assert build(config) == 0
    Trainer(runs.from_dict(values))
    text = TextCache(tmp_path / "text", text_encoding(runs.from_dict(values)))
    other = SimpleNamespace(prompts=lambda: ["a cat and a mug", "a prompt that came later", "a cat and a mug"])
    with pytest.raises(ValueError, match=r"lacks 1 of 2 prompts, such as \"a prompt that came later\""):
        CachedSamples(other, None, text)
    assert "lacks 4 of 4 samples" in stale(world, tmp_path, tmp_path, data__root=str(tmp_path / "data"), data__split="heldout")
