"""Stage 2: pictures of prompts, by pipelines of several classes, and what measures them."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline, QwenImagePipeline, StableDiffusionPipeline
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageFilter
from transformers import AutoTokenizer, CLIPTextModel

from mosaic.config.schema import FieldError
from mosaic.evaluation.detection import Box
from mosaic.evaluation.encoders import Provenance, SiglipFit, load_picture_text
from preprocess.construct.candidates import Candidate, picture_name, seed_of
from preprocess.construct.rows import PromptRow, Subject, SynthesisRow
from preprocess.construct.synthesis.criteria import Contrast, Scored, Sharpness, Uniformity, WrittenText
from preprocess.construct.synthesis.judge import SubjectJudge
from preprocess.construct.synthesis.settings import SynthesisJudge, SynthesisLimits, SynthesisSettings
from preprocess.construct.synthesis.stage import SynthesisWorker, synthesis_stage
from tests import tiny, tiny_extractors
from tests.construct import tiny_editors
from tests.evaluation import tiny_models, toys

CPU = torch.device("cpu")
SIZES = ((24, 16), (16, 24))
SUBJECTS = (Subject(phrase="a cat", name="cat", kind="animal"), Subject(phrase="a mug", name="mug", kind="object"))


def candidate(number: int, prompt: str = "a cat and a mug", **scores: float) -> Candidate:
    row = PromptRow(number=number, prompt=prompt, caption=prompt, subjects=SUBJECTS, seed=number)
    made = SynthesisRow(number=number, seed=0, height=8, width=8, scores=scores) if scores else None
    return Candidate(number, {}, row, made)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_extractors.save_flux(tmp_path_factory.mktemp("flux"))


def settings_of(folder: Path, **values: Any) -> SynthesisSettings:
    given = {"model": str(folder), "sizes": SIZES, "num_inference_steps": 1, "max_sequence_length": tiny.TEXT_LENGTH} | values
    return SynthesisSettings(**given)


def made(worker: Any, numbers: Sequence[int], folder: Path) -> tuple[list[SynthesisRow], list[bytes]]:
    folder.mkdir()
    rows = list(worker([candidate(number) for number in numbers], folder))
    return rows, [(folder / picture_name(number)).read_bytes() for number in numbers]


def test_pictures_depend_on_their_number_and_are_measured(flux: Path, tmp_path: Path) -> None:
    stage = synthesis_stage(settings_of(flux), 7)
    worker = stage.load(CPU)
    rows, files = made(worker, range(6), tmp_path / "a")
    assert made(worker, [4, 1], tmp_path / "b") == ([rows[4], rows[1]], [files[4], files[1]])
    assert len(set(files)) == 6
    assert {(row.height, row.width) for row in rows} == set(SIZES)
    assert [row.seed for row in rows] == [seed_of(7, "synthesis", number) for number in range(6)]
    pipeline = FluxPipeline.from_pretrained(flux)
    row = rows[2]
    call = {"num_inference_steps": 1, "max_sequence_length": tiny.TEXT_LENGTH, "height": row.height, "width": row.width}
    expected = pipeline("a cat and a mug", generator=torch.Generator().manual_seed(row.seed), **call).images[0]
    with Image.open(tmp_path / "a" / picture_name(2)) as picture:
        assert picture.size == (row.width, row.height)
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
        assert row.scores == {each.name: each.score(expected, candidate(2)).value for each in (Contrast(), Uniformity(), Sharpness())}
    assert worker.provenance["pipeline"] == "FluxPipeline"
    other = synthesis_stage(settings_of(flux), 8).load(CPU)
    assert not set(made(other, range(3), tmp_path / "c")[1]) & set(files)


def test_a_batch_is_of_one_size_and_its_pictures_are_those_of_single_calls(flux: Path, tmp_path: Path) -> None:
    single, batched = (synthesis_stage(settings_of(flux, batch_size=size), 7).load(CPU) for size in (1, 2))
    sizes: list[tuple[int, int, int]] = []
    whole = batched.pipeline

    def count(prompt: list[str], **arguments: Any) -> Any:
        sizes.append((len(prompt), arguments["height"], arguments["width"]))
        return whole(prompt=prompt, **arguments)

    batched.pipeline = count
    rows, _ = made(batched, range(6), tmp_path / "a")
    expected, _ = made(single, range(6), tmp_path / "b")
    assert [row.number for row in rows] == list(range(6))
    assert sum(count for count, *_ in sizes) == 6
    assert len(sizes) < 6
    for number in range(6):
        with Image.open(tmp_path / "a" / picture_name(number)) as a, Image.open(tmp_path / "b" / picture_name(number)) as b:
            assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1  # rounding
    assert [(row.seed, row.height) for row in rows] == [(row.seed, row.height) for row in expected]


def save_stable_diffusion(folder: Path) -> Path:
    """A whole pipeline of a tiny Stable Diffusion."""
    parts = tiny_extractors.save_stable_diffusion(folder / "parts")
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(parts / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(parts / "unet"),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["Flux2KleinPipeline", "QwenImagePipeline"])
def test_further_classes(kind: str, tmp_path: Path) -> None:
    if kind == "Flux2KleinPipeline":
        tiny_editors.save_klein(tmp_path / "model")
    else:
        parts = tiny_editors.build_qwen().components
        del parts["processor"]
        QwenImagePipeline(**parts).save_pretrained(tmp_path / "model")
    settings = settings_of(tmp_path / "model", sizes=((16, 24),), max_sequence_length=16, batch_size=2)
    worker = synthesis_stage(settings, 0).load(CPU)
    assert worker.provenance["pipeline"] == kind
    rows, files = made(worker, range(3), tmp_path / "out")
    assert len(set(files)) == 3
    assert all((row.height, row.width) == (16, 24) and row.scores["contrast"] > 0 for row in rows)


def test_another_class_and_arguments_that_it_does_not_take(flux: Path, tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "sd")
    plain = settings_of(folder, max_sequence_length=None, sizes=((64, 64),), guidance_scale=5.0, num_inference_steps=2, batch_size=2)
    worker = synthesis_stage(plain, 0).load(CPU)
    assert worker.provenance["pipeline"] == "StableDiffusionPipeline"

    def with_settings(**changes: Any) -> SynthesisWorker:
        return SynthesisWorker(worker.pipeline, [], plain.replace(**changes), 0, {})  # type: ignore[attr-defined]

    workers = [worker, with_settings(negative_prompt="a mug"), with_settings(guidance_scale=1.5)]
    files = {file for k, each in enumerate(workers) for file in made(each, range(2), tmp_path / str(k))[1]}
    assert len(files) == 6
    with pytest.raises(FieldError, match=r"synthesis\.max_sequence_length is none of the arguments of StableDiffusionPipeline"):
        with_settings(max_sequence_length=8)
    with pytest.raises(FieldError, match=r"synthesis\.sizes must hold sizes that FluxPipeline makes; asked for 26 x 16, it gave 24 x 16"):
        made(synthesis_stage(settings_of(flux, sizes=((26, 16),)), 0).load(CPU), [0], tmp_path / "odd")
    with pytest.raises(FieldError, match=r"synthesis\.quantization needs a pipeline with a transformer"):
        worker_with_quantization(plain)


def worker_with_quantization(settings: SynthesisSettings) -> None:
    from preprocess.construct import pipelines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines, "check_quantization", lambda quantization, place: None)
        synthesis_stage(settings.replace(quantization="int8"), 0).load(CPU)


def test_pictures_are_told_apart_by_numbers() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    sharp, flat, black = Image.fromarray(noise), Image.new("RGB", (64, 80), (200, 40, 90)), Image.new("RGB", (80, 64))
    halves = Image.fromarray(np.repeat(np.array([0, 255], np.uint8), 32)[:, None, None].repeat(64, 1).repeat(3, 2))

    def values(criterion: Any, *pictures: Image.Image) -> list[float]:
        return [criterion.score(picture, candidate(0)).value for picture in pictures]

    turned = halves.transpose(Image.Transpose.ROTATE_90)
    assert values(Contrast(), flat, black, halves, turned) == pytest.approx([0, 0, 0.5, 0.5])
    assert values(Uniformity(), flat, black, halves) == [1, 1, 0.5]
    assert values(Uniformity(), sharp)[0] < 0.01
    assert values(Uniformity(), Image.new("RGB", (4, 4), (16, 0, 0)))[0] == 1
    red = Image.fromarray(np.stack([noise[..., 0], *[np.zeros((64, 80), np.uint8)] * 2], axis=2))
    assert values(Contrast(), red)[0] > 0.25
    blurred = sharp.filter(ImageFilter.GaussianBlur(2))
    assert values(Sharpness(), black, flat) == [0, 0]
    assert values(Sharpness(), sharp)[0] > 10 * values(Sharpness(), blurred)[0] > 0
    ramp = Image.fromarray((np.add.outer(np.arange(256), np.zeros(256)) % 256).astype(np.uint8)).convert("RGB")
    assert values(Sharpness(), ramp)[0] == 0  # a Laplacian, no gradient
    corner = np.full((256, 256, 3), 0, np.uint8)
    corner[100, 100] = 100
    laplacian = np.zeros(254 * 254)
    laplacian[:5] = [-400, 100, 100, 100, 100]
    assert values(Sharpness(), Image.fromarray(corner))[0] == pytest.approx(laplacian.var())


def test_models_measure_and_are_named(flux: Path, tmp_path: Path) -> None:
    siglip, head = tiny_models.write_siglip(tmp_path / "siglip"), tmp_path / "head.pth"
    torch.save(tiny_models.head_state(), head)
    both = tiny_models.write_siglip_pair(tmp_path / "pair")
    detector = tiny_models.write_grounding_dino(tmp_path / "dino")
    judge = SynthesisJudge(model=str(tiny_models.write_llava(tmp_path / "llava")), max_tokens=8)
    stage = synthesis_stage(
        settings_of(
            flux, siglip=str(siglip), aesthetic_head=str(head), prompt_fit=str(both), text_detector=str(detector), judge=judge,
            sizes=((128, 128),), limits={"min_judge": 0.5},
        ),
        0,
    )  # fmt: skip
    worker = stage.load(CPU)
    [row], _ = made(worker, [3], tmp_path / "out")
    assert row.scores.keys() == {"contrast", "uniformity", "sharpness", "aesthetics", "prompt_fit", "text", "judge"}
    assert 0 < row.scores["prompt_fit"] < 1
    assert 0.3 <= row.scores["text"] <= 1
    assert row.remarks["text"] in ("text", "watermark")
    assert row.scores["judge"] == 0
    assert row.remarks["judge"].startswith("no answer: llava: answers with something else")
    assert {"aesthetics", "prompt_fit", "text", "judge"} < worker.provenance.keys()
    json.dumps(worker.provenance)
    florence = tiny_models.write_florence(tmp_path / "florence", [])
    with pytest.raises(ValueError, match=r"synthesis\.text_detector: .*florence does not say how sure it is"):
        synthesis_stage(settings_of(flux, text_detector=str(florence)), 0).load(CPU)
    assert stage.reasons(Candidate(3, {}, candidate(3).prompt, row)) == ["min_judge"]


@pytest.mark.parametrize("flexible", [False, True])
def test_siglip_gives_the_probability_of_its_own_processor(flexible: bool, tmp_path: Path) -> None:
    folder, picture = tiny_models.write_siglip_pair(tmp_path / "pair", flexible), toys.picture(3, 60, 44)
    encoder = load_picture_text(str(folder), "--fit")
    assert isinstance(encoder, SiglipFit)
    tokens = encoder.tokenizer(["a cat on"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    processor = tiny_models.siglip_processor(flexible)
    pixels = processor(picture, return_tensors="pt")
    with torch.no_grad():
        expected = torch.sigmoid(encoder.model(input_ids=tokens, **pixels).logits_per_image)[0, 0]
    assert encoder.fit(picture, "A cat on") == pytest.approx(float(expected), abs=1e-5)
    assert encoder.fit(picture, "the mug") != pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(ValueError, match="--fit: .* must be a model of one of the types clip, siglip, siglip2, got one of the type dinov2"):
        load_picture_text(str(tiny_models.write_dinov2(tmp_path / "dinov2")), "--fit")


def test_clip_gives_the_cosine() -> None:
    encoder, picture = load_picture_text("assets/pocket/clip", "--fit"), toys.picture(1)
    cosine = float(encoder.images([picture])[0] @ encoder.texts(["a cat"])[0])  # type: ignore[attr-defined]
    assert encoder.fit(picture, "a cat") == pytest.approx(cosine)
    assert encoder.fit(picture, "a mug") != pytest.approx(cosine)


def test_text_is_the_surest_of_all_words() -> None:
    found = {"text": [0.4, 0.5], "watermark": [0.7]}
    detector: Any = SimpleNamespace(
        provenance=Provenance("d", "1", "none"),
        detections=lambda picture, word: [SimpleNamespace(box=Box(0, 0, 1, 1), score=score) for score in found[word]],
    )
    criterion = WrittenText(detector, ("text", "watermark"))
    assert criterion.score(toys.picture(0), candidate(0)) == Scored(0.7, "watermark")
    found.update(text=[], watermark=[])
    assert criterion.score(toys.picture(0), candidate(0)) == Scored(0.0)


def opinion(*answers: str, remark: str = "") -> dict[str, Any]:
    """An answer about subjects, each in four letters of y and n."""
    names = ("present", "single", "complete", "distinct")
    return {"subjects": [{name: letter == "y" for name, letter in zip(names, each, strict=True)} for each in answers], "remark": remark}


def test_the_judge_counts_yes_and_is_asked_again() -> None:
    asked: list[Sequence[Any]] = []

    def judge(*answers: Any) -> SubjectJudge:
        left = list(answers)

        def chat(parts: Sequence[Any]) -> str:
            asked.append(parts)
            return left.pop(0) if isinstance(left[0], str) else json.dumps(left.pop(0))

        chat.provenance = Provenance("j", "1", "none")  # type: ignore[attr-defined]
        return SubjectJudge(chat)  # type: ignore[arg-type]

    picture = toys.picture(0)
    assert judge(opinion("yyyy", "ynyn", remark="two\nmugs")).score(picture, candidate(0)) == Scored(0.75, "two mugs")
    assert "a cat, a mug" in asked[0][1]
    assert asked[0][0] is picture
    assert judge("nonsense", opinion("yyyy", "yyyy")).score(picture, candidate(0)) == Scored(1.0)
    assert "refused: j: answers with something else" in asked[2][1]
    value, remark = judge(opinion("yyyy"), opinion("yyyy")).score(picture, candidate(0))
    assert (value, remark) == (0.0, "no answer: there must be 2 subjects, got 1")


def test_each_limit_drops() -> None:
    good = {
        "contrast": 0.2, "uniformity": 0.5, "sharpness": 50.0, "aesthetics": 6.0, "prompt_fit": 0.3, "text": 0.0, "judge": 1.0,
    }  # fmt: skip
    limits = {
        "min_contrast": 0.2, "max_uniformity": 0.5, "min_sharpness": 50.0, "min_aesthetics": 6.0, "min_prompt_fit": 0.3, "max_text": 0.0,
        "min_judge": 1.0,
    }  # fmt: skip
    judge = SynthesisJudge(model="a/b")
    models = {"siglip": "a/b", "aesthetic_head": "head", "prompt_fit": "a/b", "text_detector": "a/b", "judge": judge}
    strict = synthesis_stage(SynthesisSettings(limits=SynthesisLimits(**limits), **models), 0)
    assert strict.reasons(candidate(0, **good)) == []
    for limit in limits:
        end, _, name = limit.partition("_")
        worse = good | {name: good[name] + (-0.1 if end == "min" else 0.1)}
        assert strict.reasons(candidate(0, **worse)) == [limit]
    nothing = SynthesisSettings(limits=SynthesisLimits(**dict.fromkeys(limits)))
    assert synthesis_stage(nothing, 0).reasons(candidate(0, **dict.fromkeys(good, -1.0))) == []
    usual = synthesis_stage(SynthesisSettings(), 0)
    assert usual.reasons(candidate(0, contrast=0.0, uniformity=1.0, sharpness=0.0)) == ["min_contrast", "max_uniformity"]
    for limit, model in (
        ("min_aesthetics", "siglip"),
        ("min_prompt_fit", "prompt_fit"),
        ("max_text", "text_detector"),
        ("min_judge", "judge"),
    ):
        with pytest.raises(FieldError, match=rf"synthesis\.limits\.{limit} needs synthesis\.{model}"):
            SynthesisSettings(limits=SynthesisLimits(**{limit: 0.5}))
    with pytest.raises(FieldError, match=r"synthesis\.aesthetic_head and synthesis\.siglip must be given together"):
        SynthesisSettings(siglip="a/b")


def test_what_is_no_number_is_the_worst() -> None:
    class Broken:
        name, provenance = "sharpness", {}

        def score(self, picture: Image.Image, candidate: Candidate) -> Scored:
            return Scored(float("nan"))

    worker = SynthesisWorker(SimpleNamespace(__call__=lambda num_inference_steps: None), [Broken()], SynthesisSettings(), 0, {})
    row = worker._row(candidate(0), Image.new("RGB", (8, 8)), (8, 8))
    assert (row.scores, row.remarks) == ({"sharpness": 0.0}, {"sharpness": "no number"})
