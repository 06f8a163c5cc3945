"""Reference strength against a readable masked softmax in float64, and what 0 and 1 mean."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import inference
from mosaic.model.attention import BlockReferences, Layout, branch_attention
from mosaic.model.strength import ABSENT, log_strength
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.rendering.recipe import read_recipe
from tests import naive, runs, tiny
from tests.tiny import noise, run

TEXT, TARGET, REFERENCE, HEADS, WIDTH = 3, 8, 5, 2, 16
MAIN = TEXT + TARGET
MODES = ["target", "joint", "isolated"]
STRENGTHS = torch.tensor([[1.0, 0.5, 0.0], [10.0, 1.0, 1e-3]])  # of two samples with three references


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)


def masked(query: Tensor, key: Tensor, value: Tensor, strengths: Tensor, mode: str) -> Tensor:
    """Softmax over the visible keys, each times its reference's strength, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    num_references = strengths.shape[1]
    owner = torch.tensor([-1] * MAIN + [k for k in range(num_references) for _ in range(REFERENCE)])
    weight = torch.ones(len(strengths), 1, 1, len(owner), dtype=torch.float64)
    for k in range(num_references):
        weight[..., owner == k] = strengths[:, k].double().clamp(min=1e-60)[:, None, None, None]  # a row of zeros has no softmax
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / WIDTH**0.5
    terms = logits.exp() * naive.attention_mask(owner, mode) * weight
    return torch.einsum("bhqk,bkhd->bqhd", terms / terms.sum(dim=-1, keepdim=True), value)


def draw(generator: torch.Generator, num_references: int = 3) -> list[Tensor]:
    return [torch.randn(2, MAIN + num_references * REFERENCE, HEADS, WIDTH, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_masked_softmax(generator: torch.Generator, mode: str) -> None:
    inputs = draw(generator)
    output = branch_attention(*inputs, Layout(3, REFERENCE, mode, log_strength(STRENGTHS)), attend)
    found, want = torch.cat([output.main, output.references], dim=1), masked(*inputs, STRENGTHS, mode)
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-5)
    plain = branch_attention(*inputs, Layout(3, REFERENCE, mode), attend)
    assert (plain.main - output.main).abs().max() > 0.1


def test_kept_references_have_strengths_too(generator: torch.Generator) -> None:
    query, key, value = draw(generator)
    kept = BlockReferences(key[:, MAIN:], value[:, MAIN:])
    layout = Layout(3, REFERENCE, "isolated", log_strength(STRENGTHS), kept)
    found = branch_attention(query[:, :MAIN], key[:, :MAIN], value[:, :MAIN], layout, attend)
    assert found.references is None
    torch.testing.assert_close(found.main.double(), masked(query, key, value, STRENGTHS, "isolated")[:, :MAIN], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_strength(dtype: torch.dtype) -> None:
    # Equal keys, and values that tell references from text and target: what is left is the references' share, exactly known.
    query, key, value = (torch.zeros(1, MAIN + 3 * REFERENCE, HEADS, WIDTH, dtype=dtype) for _ in range(3))
    value[:, MAIN:] = 1

    def attend_exactly(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        assert query.dtype == key.dtype == value.dtype == dtype
        return attend(query.float(), key.float(), value.float(), scale)

    for strength in (0.0, 0.03, 0.31, 0.71, 1.9):
        layout = Layout(3, REFERENCE, "isolated", log_strength(torch.tensor([[strength, 0.01, strength]])))
        share = (2 * strength + 0.01) * REFERENCE / (MAIN + (2 * strength + 0.01) * REFERENCE)
        found = branch_attention(query, key, value, layout, attend_exactly).main
        torch.testing.assert_close(found, torch.full_like(found, share), atol=1e-6, rtol=1e-4)


def test_the_logarithm() -> None:
    found = log_strength(torch.tensor([[0.0, 1.0, 0.5]], dtype=torch.float64))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[ABSENT, 0.0, -0.6931472]]))


# ---- the whole model


class StrengthenedTwin(naive.NaiveFlux):
    """The twin with log s added to the mask's columns."""

    strengths: Tensor

    def attention(self, query: Tensor, key: Tensor, value: Tensor, maps: list[Tensor]) -> Tensor:
        if self.mask.dtype == torch.bool:
            owner = self.token_reference
            columns = torch.where(owner < 0, torch.tensor(0.0), self.strengths.clamp(min=1e-30).log()[:, owner.clamp(min=0)])
            self.mask = torch.where(self.mask, columns[:, None, :], -torch.inf)[:, None]
        return super().attention(query, key, value, maps)


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_naive_twin(transformer: MosaicFluxTransformer2DModel, mode: str) -> None:
    batch, lora = tiny.build_batch(3), tiny.attach_random_lora(transformer)
    twin = StrengthenedTwin(tiny.build_transformer(stock=True), naive.lora_matrices(lora))
    twin.strengths = STRENGTHS
    with torch.no_grad():
        want = twin(**batch.inputs, reference_attention=mode).velocity
        found = transformer(**batch.inputs, reference_attention=mode, reference_strength=STRENGTHS).sample
        plain = transformer(**batch.inputs, reference_attention=mode).sample
    torch.testing.assert_close(found, want, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_strength_0_is_a_sequence_without_that_reference(transformer: MosaicFluxTransformer2DModel, mode: str) -> None:
    tiny.attach_random_lora(transformer)
    inputs, others = tiny.build_batch(3).inputs, [0, 2]
    fewer = inputs | {
        "reference_hidden_states": inputs["reference_hidden_states"][:, others],
        "reference_ids": inputs["reference_ids"].unflatten(0, (3, -1))[others].flatten(0, 1),  # the others stay where they are
    }
    strength = torch.tensor([1.0, 0.0, 1.0]).expand(2, -1)
    with torch.no_grad():
        found = transformer(**inputs, reference_attention=mode, reference_strength=strength).sample
        want = transformer(**fewer, reference_attention=mode).sample
        none = transformer(**inputs, reference_attention=mode, reference_strength=torch.zeros(2, 3)).sample
        bare = transformer(**tiny.without_references(inputs)).sample
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(none, bare, atol=1e-5, rtol=1e-5)


# ---- the pipeline


@pytest.fixture(scope="module")
def shared() -> MosaicFluxPipeline:
    return tiny.build_pipeline()


def test_strength_1_changes_no_bit(shared: MosaicFluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"prompt": "a cat", "reference_images": [tiny.picture(1), tiny.picture(2)], "latents": noise(1)}
    want = run(shared, **common)
    monkeypatch.setattr("mosaic.model.transformer.log_strength", None)  # no work is done for it
    for strength in (1, 1.0, [1, 1.0], None):
        assert torch.equal(run(shared, **common, reference_strength=strength), want)


def test_strengths_follow_their_pictures(shared: MosaicFluxPipeline) -> None:
    prompts = ["a cat", "two mugs", "a fish", "the beach"]
    pictures = [[tiny.picture(1), tiny.picture(2)], [], [tiny.picture(3)], [tiny.picture(4), tiny.picture(5)]]
    strengths = [[0.5, 2.0], [], [0.25], [1.0, 1.0]]
    common = {"num_images_per_prompt": 2, "image_guidance_scale": 1.5}
    start = noise(8)
    together = run(shared, prompt=prompts, reference_images=pictures, reference_strength=strengths, latents=start, **common)
    for index, prompt in enumerate(prompts):
        rows = slice(2 * index, 2 * index + 2)
        call = {"prompt": prompt, "reference_images": pictures[index], "latents": start[rows], **common}
        alone = run(shared, **call, reference_strength=strengths[index])
        torch.testing.assert_close(together[rows], alone, atol=1e-5, rtol=1e-5)
        changed = not torch.allclose(alone, run(shared, **call), atol=1e-4)
        assert changed == any(strength != 1 for strength in strengths[index])
    same = run(shared, prompt=prompts, reference_images=pictures, reference_strength=0.5, latents=start, **common)
    each = run(
        shared, prompt=prompts, reference_images=pictures, reference_strength=[[0.5] * len(x) for x in pictures], latents=start, **common
    )
    assert torch.equal(same, each)


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (-0.1, "reference_strength must be a number from 0 (absent) to 10, got -0.1."),
        (True, "reference_strength must be a number from 0 (absent) to 10, got True."),
        (float("nan"), "reference_strength must be a number from 0 (absent) to 10, got nan."),
        ([1, 11], "reference_strength[0][1] must be a number from 0 (absent) to 10, got 11."),
        ([1, "1"], "reference_strength[0][1] must be a number from 0 (absent) to 10, got '1'."),
        ([1], "reference_strength[0] must hold one number per reference of that prompt: 2, got 1."),
        ([[1, 1], [1]], "reference_strength must be a number, or one list of numbers per prompt: 1 lists, got [[1, 1], [1]]."),
    ],
)
def test_bad_strengths(shared: MosaicFluxPipeline, strength: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(shared, prompt="a cat", reference_images=[tiny.picture(1), tiny.picture(2)], reference_strength=strength)


# ---- cases


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_world(tmp_path_factory.mktemp("world"))


def render(world: Path, folder: Path, strength: float, *arguments: str, mode: str = "isolated") -> dict[str, Any]:
    """Recipe and file of the picture of a case whose references have that strength."""
    settings = runs.settings(world, folder / "pictures")
    settings["model"]["reference_attention"] = mode
    entry = json.loads((world / "cases.json").read_text())[0]
    paths = [str(world / path) for path in entry["image_paths"]]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    references = [{"path": path, "strength": strength} for path in paths]
    (folder / "cases.json").write_text(json.dumps([{"prompt": "a cat", "references": references}]))
    assert inference.main(["--config", str(folder / "config.json"), "--cases", str(folder / "cases.json"), *arguments]) == 0
    (picture,) = (folder / "pictures").glob("case_???.png")
    return {"recipe": read_recipe(picture), "picture": picture.read_bytes()}


def test_cases_have_strengths_and_their_recipes_say_so(world: Path, tmp_path: Path) -> None:
    plain, weak = (render(world, tmp_path / str(strength), strength) for strength in (1, 0.5))
    assert {entry["strength"] for entry in weak["recipe"]["references"]} == {0.5}
    assert plain["recipe"]["digest"] != weak["recipe"]["digest"]
    assert plain["picture"] != weak["picture"]


def test_flags_reach_the_recipe(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached = render(world, tmp_path / "cached", 1, "--reference-cache")["recipe"]
    stale = render(world, tmp_path / "stale", 1, "--refresh-references", "2", mode="target")["recipe"]
    assert (cached["reference_cache"], cached["refresh_references"]) == (True, None)
    assert (stale["reference_cache"], stale["refresh_references"]) == (False, 2)
    arguments = ["--config", str(tmp_path / "stale/config.json"), "--output-dir", str(tmp_path / "none"), "--reference-cache"]
    assert inference.main(arguments) == 2
    assert 'error: reference_cache needs reference_attention "isolated", got "target"' in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
