"""The pocket FLUX: tokenizers, folder, layouts, and a training run that resumes."""

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.distill_pocket_base import parse_arguments as distillation_arguments
from scripts.pocket import base_data, model, runs, sampling
from scripts.pocket import distill_base as distill_pocket_base
from scripts.pocket import train_base as train_pocket_base
from scripts.pocket import train_vae as train_pocket_vae
from scripts.pocket.base_data import LAYOUTS, caption_ids, position_ids
from scripts.pocket.model import TOKEN_CHANNELS, build_pocket_flux, build_vae, save_pocket_flux
from scripts.pocket.tokenizers import TEXT_LENGTH, build_clip_tokenizer, build_t5_tokenizer, caption_words
from scripts.train_pocket_base import parse_arguments as base_arguments
from scripts.train_pocket_vae import parse_arguments as vae_arguments

CAPTIONS = [
    "a cat, two mugs and a fish on a beach",
    "three birds under a night sky",
    "a mug, a fish, a mushroom, a snail, a rocket and a bird under a night sky",
    "drawings of two cats and two cars",
]
SCENE = LAYOUTS[0]

#: Autocast meets float32 norm weights on a CPU: torch warns that it takes its slower path.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


@pytest.fixture(scope="module")
def components() -> dict:
    """A freshly initialised pocket FLUX."""
    return build_pocket_flux(0, caption_words(CAPTIONS))


@pytest.mark.parametrize("build", [build_clip_tokenizer, build_t5_tokenizer])
def test_tokenizers_give_one_token_per_word_and_survive_a_round_trip(build: Callable, tmp_path: Path) -> None:
    tokenizer = build(caption_words(CAPTIONS))
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.model_max_length == TEXT_LENGTH
    special = 2 if tokenizer.bos_token_id is not None and build is build_clip_tokenizer else 1
    for caption in CAPTIONS:
        ids = loaded(caption).input_ids
        assert ids == tokenizer(caption).input_ids
        assert len(ids) == len(caption.replace(",", " ,").split()) + special
        assert loaded.decode(ids, skip_special_tokens=True).replace(" ,", ",") == caption


@pytest.mark.parametrize("build", [build_clip_tokenizer, build_t5_tokenizer])
def test_unknown_words_are_spelt_out(build: Callable) -> None:
    tokenizer = build(caption_words(CAPTIONS))
    ids = tokenizer("a zebra").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a zebra"
    assert len(ids) > len(tokenizer("a cat").input_ids)


def test_a_caption_that_does_not_fit_is_refused() -> None:
    tokenizer = build_t5_tokenizer(caption_words(CAPTIONS), length=8)
    with pytest.raises(ValueError, match="the text length is 8"):
        caption_ids(tokenizer, [CAPTIONS[0]])


def test_the_folder_loads_in_a_stock_pipeline_and_draws(components: dict, tmp_path: Path) -> None:
    save_pocket_flux(components, tmp_path / "flux")
    pipeline = FluxPipeline.from_pretrained(tmp_path / "flux", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for name in train_pocket_base.TRAINED:
        for key, value in components[name].state_dict().items():
            torch.testing.assert_close(getattr(pipeline, name).state_dict()[key], value, rtol=0, atol=0)
    assert pipeline.scheduler.config.use_dynamic_shifting
    length = pipeline.tokenizer_2.model_max_length
    picture = pipeline(CAPTIONS[0], height=64, width=64, num_inference_steps=2, guidance_scale=3.5, max_sequence_length=length).images[0]
    assert picture.size == (64, 64)
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.old"))


def test_our_sampler_equals_the_stock_pipeline(components: dict, tmp_path: Path) -> None:
    torch.manual_seed(1)
    torch.nn.init.normal_(components["transformer"].proj_out.weight, std=0.05)
    pipeline = FluxPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 64, TOKEN_CHANNELS), generator=torch.Generator().manual_seed(5))
    length = components["tokenizer_2"].model_max_length
    settings = {"height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": length}
    stock = pipeline(CAPTIONS[0], latents=noise, output_type="np", **settings).images[0]
    ours = sampling.sample_pictures(components, SCENE, CAPTIONS[:1], seed=5, steps=3)[0]
    assert np.abs(stock * 255 - ours).mean() < 1.5  # ours runs in bfloat16


def test_the_time_embedding_gets_the_exact_time_under_autocast(components: dict) -> None:
    seen = []
    hook = components["transformer"].time_text_embed.time_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    ids = tuple(caption_ids(components[name], CAPTIONS[:1]) for name in ("tokenizer", "tokenizer_2"))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        sampling.predict_velocity(components, SCENE, torch.zeros(1, SCENE.tokens, TOKEN_CHANNELS), torch.tensor([0.7013]), ids)
    hook.remove()
    torch.testing.assert_close(seen[0], torch.tensor([701.3]))


def test_positions_put_column_k_where_reference_k_will_sit() -> None:
    sheet = next(layout for layout in LAYOUTS if layout.name == "sheet2")
    ids = position_ids(sheet)
    assert ids.shape == (sheet.tokens, 3)
    assert ids.dtype == torch.float32
    assert ids[:64].tolist() == [[0, row, column] for row in range(8) for column in range(8)]
    starts = ids[64::16].tolist()
    assert starts == [[0, 0, -4], [0, 4, -4], [0, 0, -8], [0, 4, -8]]
    strip = position_ids(LAYOUTS[-1])
    assert strip[::16].tolist() == [[0, 0, 4 * k] for k in range(4)]


def test_cutting_finds_the_scene_right_and_the_first_column_next_to_it() -> None:
    sheet = next(layout for layout in LAYOUTS if layout.name == "sheet2")
    picture = np.zeros((1, 64, 128, 3), np.uint8)
    picture[:, :, 64:], picture[:, :32, 32:64], picture[:, 32:, 32:64] = 1, 2, 3
    picture[:, :32, :32], picture[:, 32:, :32] = 4, 5
    scenes, panels = base_data.cut(sheet, picture)
    assert (scenes == 1).all()
    assert [int(panels[0, k].mean()) for k in range(4)] == [2, 3, 4, 5]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_encoding_and_decoding_keep_every_part_in_its_place(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # With a lossless stand-in for the VAE (pixels as tokens), decoding must give back the picture.
    monkeypatch.setattr(base_data, "encode_pictures", lambda _, part: _as_tokens(part))
    monkeypatch.setattr(base_data, "decode_tokens", lambda _, tokens: _as_pictures(tokens))
    size = (64, 64 + 32 * layout.columns) if layout.scene else (32, 128)
    picture = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    tokens = base_data.encode_samples(None, layout, picture)
    assert tokens.shape[1] == layout.tokens
    np.testing.assert_array_equal(base_data.decode_samples(None, layout, tokens), picture)


def _as_tokens(pictures: np.ndarray) -> torch.Tensor:
    count, side = pictures.shape[:2]
    grid = pictures.reshape(count, side // 8, 8, side // 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    return torch.from_numpy(grid.reshape(count, (side // 8) ** 2, -1).copy())


def _as_pictures(tokens: torch.Tensor) -> np.ndarray:
    count, side = len(tokens), round(tokens.shape[1] ** 0.5)
    grid = tokens.numpy().reshape(count, side, side, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(count, side * 8, side * 8, 3)


def test_time_shift_follows_the_formula_and_keeps_the_ends() -> None:
    mu = sampling.shift_exponent(256)
    assert mu == pytest.approx(0.5)
    assert sampling.shift_exponent(4096) == pytest.approx(1.15)
    assert sampling.shift_exponent(64) == pytest.approx(0.5 - 192 * 0.65 / 3840)
    time = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.0, np.exp(mu) / (np.exp(mu) + 3.0), 1.0], dtype=torch.float64)
    torch.testing.assert_close(sampling.time_shift(time, 256), expected)


class Operations(TorchDispatchMode):
    """Collects the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        self.names.add(function.name())
        return function(*arguments, **(settings or {}))


def test_explicit_attention_equals_the_fused_one() -> None:
    """It has two matmuls and a softmax, in the dtype given, and no fused kernel."""
    exact = torch.randn(3, 2, 6, 4, 8)
    query, key, value = exact.bfloat16()
    with Operations() as fused:
        expected, rounded = dispatch_attention_fn(*exact), dispatch_attention_fn(query, key, value)
    with sampling.explicit_attention():
        torch.testing.assert_close(dispatch_attention_fn(*exact), expected)
        with Operations() as explicit:
            found = dispatch_attention_fn(query, key, value)
    torch.testing.assert_close(found, rounded, atol=0.02, rtol=0.0)
    assert any("scaled_dot_product" in name for name in fused.names)
    assert "aten::bmm" in explicit.names
    assert not any("scaled_dot_product" in name or "_to_copy" in name for name in explicit.names)  # nor float32
    with Operations() as after:
        dispatch_attention_fn(query, key, value)
    assert any("scaled_dot_product" in name for name in after.names)
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


def test_learning_rate_warms_up_holds_and_decays() -> None:
    factors = [runs.learning_rate(step, step / 100, warmup=10, decay_from=0.5) for step in range(101)]
    assert [factors[i] for i in (0, 30, 75, 100)] == pytest.approx([0.1, 1.0, 0.01 + 0.99 * 0.5, 0.01])


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with a random VAE and a few random tokens per layout."""
    folder = tmp_path / "run"
    (folder / "tokens").mkdir(parents=True)
    build_vae(0).save_pretrained(folder / "vae")
    (folder / "words.txt").write_text("\n".join(caption_words(CAPTIONS)))
    generator = torch.Generator().manual_seed(0)
    for layout in LAYOUTS:
        tokens = torch.randn((8, layout.tokens, TOKEN_CHANNELS), generator=generator).half()
        file = folder / "tokens" / f"{layout.name}-000.safetensors"
        save_file({"tokens": tokens}, file, metadata={"captions": json.dumps(CAPTIONS * 2)})
    return folder


def test_a_share_of_sheets_is_that_of_the_batches(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = base_data.layout_weights()
    assert usual == [layout.weight for layout in LAYOUTS]
    assert base_data.layout_weights(0.4) == pytest.approx(usual)
    assert base_data.layout_weights(1.0) == pytest.approx([0, *(weight / 0.4 for weight in usual[1:])])
    with pytest.raises(ValueError, match=r"--sheets-share must lie in \[0, 1\], got 1.5"):
        base_data.layout_weights(1.5)
    monkeypatch.setattr(model, "DOUBLE_BLOCKS", 1)
    monkeypatch.setattr(model, "SINGLE_BLOCKS", 1)
    monkeypatch.setattr(train_pocket_base.BaseTraining, "loss", lambda self, *_: self.parameters["transformer.proj_out.weight"].sum())
    for share, names in (("0", {"scene"}), ("1", {layout.name for layout in LAYOUTS[1:]})):
        training = train_pocket_base.BaseTraining(
            base_arguments(["--run-dir", str(run_folder), "--steps", "9", "--batch-size", "1", "--sheets-share", share])
        )
        assert {training.step()[0] for _ in range(8)} <= names


def test_a_resumed_run_equals_an_uninterrupted_one(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In float32, because Adam's first steps turn the rounding of tiny gradients into whole steps.
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **settings: contextlib.nullcontext())

    def train(stops: list[int]) -> tuple[list[tuple[str, float]], torch.Tensor, list[int]]:
        (run_folder / "checkpoint.pt").unlink(missing_ok=True)
        steps = []
        for stop in stops:
            arguments = ["--run-dir", str(run_folder), "--steps", "3", "--batch-size", "2", "--warmup", "1"]
            training = train_pocket_base.BaseTraining(base_arguments(arguments))
            while training.clock.step < stop:
                steps.append(training.step())
            training.save()
        adam = training.optimizer.state_dict()["state"][0]["step"]
        return steps, training.average.values["transformer.proj_out.weight"], [training.average.count, int(adam)]

    (whole_steps, whole, counts), (resumed_steps, resumed, resumed_counts) = train([3]), train([2, 3])
    assert counts == resumed_counts == [3, 3]
    assert [name for name, _ in whole_steps] == [name for name, _ in resumed_steps]
    for (_, loss), (_, again) in zip(whole_steps, resumed_steps, strict=True):
        assert again == pytest.approx(loss, rel=1e-3)
    assert (whole - resumed).norm() < 0.4 * whole.norm()  # the output layer starts at zero


def test_export_writes_a_loadable_folder_in_bfloat16(run_folder: Path, tmp_path: Path) -> None:
    arguments = base_arguments(["--run-dir", str(run_folder), "--steps", "1"])
    train_pocket_base.BaseTraining(arguments).save()
    assert train_pocket_base.export(run_folder, tmp_path / "flux") == 0
    pipeline = FluxPipeline.from_pretrained(tmp_path / "flux", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(CAPTIONS[0], height=64, width=64, num_inference_steps=1, max_sequence_length=TEXT_LENGTH)
    weights = load_file(tmp_path / "flux" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert sum(file.stat().st_size for file in (tmp_path / "flux").rglob("*") if file.is_file()) < 25e6


def test_a_run_can_start_from_exported_weights(run_folder: Path, tmp_path: Path) -> None:
    arguments = ["--run-dir", str(run_folder), "--steps", "1", "--batch-size", "2"]
    first = train_pocket_base.BaseTraining(base_arguments([*arguments, "--seed", "5"]))
    first.save()
    train_pocket_base.export(run_folder, tmp_path / "flux")
    (run_folder / "checkpoint.pt").unlink()
    arguments += ["--start-from", str(tmp_path / "flux")]
    second = train_pocket_base.BaseTraining(base_arguments(arguments))
    for name, value in first.parameters.items():
        torch.testing.assert_close(second.parameters[name], value, rtol=0.01, atol=1e-4)  # stored in bfloat16
    (run_folder / "words.txt").write_text("other\nwords\n")
    with pytest.raises(ValueError, match="has words that this run's captions lack"):
        train_pocket_base.BaseTraining(base_arguments(arguments))


def test_a_start_reads_captions_as_before_when_words_are_added(components: dict, tmp_path: Path) -> None:
    """Tokens have other numbers then; a new word keeps the fresh embedding."""
    save_pocket_flux(components, tmp_path / "flux")
    words = sorted([*caption_words(CAPTIONS), "aardvark", "five", "six"])
    larger = build_pocket_flux(3, words)
    fresh = larger["text_encoder_2"].state_dict()["shared.weight"].clone()
    train_pocket_base.load_start(larger, tmp_path / "flux")
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        before, after = (parts[encoder](caption_ids(parts[tokenizer], CAPTIONS)).last_hidden_state for parts in (components, larger))
        torch.testing.assert_close(after, before)
    new, old = (larger["tokenizer_2"].convert_tokens_to_ids(word) for word in ("\u2581five", "\u2581cat"))
    embedding = larger["text_encoder_2"].state_dict()["shared.weight"]
    assert torch.equal(embedding[new], fresh[new])
    assert not torch.equal(embedding[old], fresh[old])


def test_guidance_is_distilled(run_folder: Path, components: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student starts as its teacher at every guidance and is saved with its embedding."""
    monkeypatch.setattr(train_pocket_base, "sample_pictures", partial(sampling.sample_pictures, steps=1))
    save_pocket_flux(components, tmp_path / "teacher")
    layout, generator = SCENE, torch.Generator().manual_seed(0)
    training = distill_pocket_base.GuidanceDistillation(
        distillation_arguments(["--run-dir", str(run_folder), "--teacher", str(tmp_path / "teacher"), "--steps", "1", "--batch-size", "4"])
    )
    teacher = training.teacher
    torch.nn.init.normal_(teacher["transformer"].proj_out.weight, generator=generator)
    training.components["transformer"].load_state_dict(teacher["transformer"].state_dict(), strict=False)
    noisy, time = torch.randn(2, layout.tokens, TOKEN_CHANNELS, generator=generator), torch.tensor([0.3, 0.9])
    ids = tuple(caption_ids(components[name], CAPTIONS[:2]) for name in ("tokenizer", "tokenizer_2"))
    noisy = train_pocket_base.NoisyBatch(noisy, torch.zeros_like(noisy), time, ids)
    with torch.no_grad():
        captioned, uncaptioned = (sampling.predict_velocity(teacher, layout, noisy.tokens, time, given) for given in (ids, training.empty))
        student = sampling.predict_velocity(training.components, layout, noisy.tokens, time, ids, torch.tensor([1.0, 3.5]))
        direction = distill_pocket_base.guidance_direction(teacher, layout, noisy, training.empty)
    torch.testing.assert_close(student, captioned)
    torch.testing.assert_close(direction, captioned - uncaptioned, rtol=1e-3, atol=1e-5)
    assert direction.abs().max() > 1e-3
    before = training.components["text_encoder"].state_dict()["embeddings.token_embedding.weight"].clone()
    training.run()
    assert torch.equal(before, training.components["text_encoder"].state_dict()["embeddings.token_embedding.weight"])
    student = FluxPipeline.from_pretrained(run_folder / "distilled/export", local_files_only=True).transformer
    assert student.config.guidance_embeds
    assert student.time_text_embed.guidance_embedder.linear_2.bias.abs().max() > 0


def test_the_vae_learns_and_its_latent_statistics_are_set() -> None:
    rng = np.random.default_rng(0)
    scenes = np.repeat(np.repeat(rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8), 4, 1), 4, 2)
    vae = build_vae(0)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    batch = base_data.to_unit(scenes)
    generator = torch.Generator().manual_seed(0)
    losses = [train_pocket_vae.train_step(vae, optimizer, batch, generator)[0] for _ in range(8)]
    assert losses[-1] < losses[0]
    panels = scenes[:, :32, :32]
    train_pocket_vae.set_latent_statistics(vae.eval(), scenes, panels)
    tokens = torch.cat([base_data.encode_pictures(vae, part).float().flatten()[:4096] for part in (scenes, panels)])
    assert abs(tokens.mean()) < 0.2
    assert abs(tokens.std() - 1.0) < 0.2


def test_shares_of_regimes_reach_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def render_all(*arguments: object) -> None:
        raise InterruptedError(arguments)

    monkeypatch.setattr(base_data, "render_all", render_all)
    flags = ["--run-dir", str(tmp_path), "--twins-share", "0.4", "--mixed-share", "0.1"]
    with pytest.raises(InterruptedError, match=r"RegimeShares\(twins=0.4, mixed=0.1\)"):
        train_pocket_vae.run(vae_arguments(flags))
