"""Stage 4: editors of three classes and none, what edits are measured by, and which try becomes the reference."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image

from mosaic.config.schema import FieldError
from mosaic.evaluation.detection import Box, Detection
from mosaic.evaluation.encoders import Provenance, load_image_encoder
from preprocess.construct.candidates import Candidate, picture_name, seed_of
from preprocess.construct.references.editors import KINDS, CutOuts, PipelineEditor, editor_of, fit, load_editor
from preprocess.construct.references.judge import EditJudge
from preprocess.construct.references.measures import border, contrast
from preprocess.construct.references.settings import Instructions, ReferencesJudge, ReferencesLimits, ReferencesSettings, ViewChoices
from preprocess.construct.references.stage import ReferencesWorker, chosen_edits, instruction, missed, reasons, references_stage
from preprocess.construct.rows import Edit, Found, PromptRow, ReferencesRow, SegmentationRow, Subject
from preprocess.construct.segmentation.cutouts import cut_out
from tests import tiny, tiny_extractors
from tests.construct import tiny_editors
from tests.evaluation import toys

CPU = torch.device("cpu")
SUBJECTS = (Subject(phrase="a red cat", name="cat", kind="animal"), Subject(phrase="The mug", name="mug", kind="object"))
FREE = ReferencesLimits(min_similarity=None, max_similarity=None, min_border=None, min_contrast=None)
MASKS = (np.s_[4:20, 2:14], np.s_[6:16, 20:30])


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_extractors.save_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.write_dino(tmp_path_factory.mktemp("dino"))


def settings_of(model: Path | str = "", **values: Any) -> ReferencesSettings:
    given = {"model": str(model) or "a/b", "size": (16, 24), "num_inference_steps": 1, "encoder": None, "limits": FREE} | values
    return ReferencesSettings(**given)


def candidate(number: int, root: Path, found: Sequence[bool] = (True, True)) -> Candidate:
    """One with a picture of two subjects and their masks."""
    folders = {name: root / name for name in ("synthesis", "segmentation", "references")}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    toys.picture(number, 32, 24).save(folders["synthesis"] / picture_name(number))
    for k, part in enumerate(MASKS):
        mask = np.zeros((24, 32), np.uint8)
        mask[part] = 255
        Image.fromarray(mask).save(folders["segmentation"] / picture_name(number, f"mask{k}"))
    one = Found(box=(0, 0, 9, 9), score=0.5, number_found=1, area=0.2, truncated=0, overlap=0)
    row = SegmentationRow(number=number, subjects=tuple(one if there else None for there in found))
    prompt = PromptRow(number=number, prompt="a red cat and The mug", caption="", subjects=SUBJECTS, seed=number)
    return Candidate(number, folders, prompt, segmentation=row)


def fitted(one: Candidate, k: int, size: tuple[int, int]) -> Image.Image:
    picture = toys.picture(one.number, 32, 24)
    mask = np.zeros((24, 32), bool)
    mask[MASKS[k]] = True
    return fit(cut_out(picture, mask), size)


def made(one: Candidate, k: int, j: int) -> np.ndarray:
    with Image.open(one.folders["references"] / picture_name(one.number, f"ref{k}_{j}")) as file:
        return np.asarray(file)


def tried(*tries: dict[str, float], other: Sequence[dict[str, float]] = ()) -> Candidate:
    """A candidate whose tries have scores, those of a second subject if there are any."""
    subjects = [tries, other] if other else [tries]
    row = ReferencesRow(number=0, subjects=tuple(tuple(Edit(seed=0, instruction="", scores=s) for s in each) for each in subjects))
    prompt = PromptRow(number=0, prompt="", caption="", subjects=SUBJECTS[: len(subjects)], seed=0)
    return Candidate(0, {}, prompt, references=row)


class FakeEditor:
    """Paints by a rule."""

    tries = None

    def __init__(self, paint: Any) -> None:
        self.provenance: dict[str, Any] = {"model": "fake"}
        self.paint = paint

    def edit(self, cut_outs: Sequence[Image.Image], instructions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return [self.paint(*each) for each in zip(cut_outs, instructions, seeds, strict=True)]


def test_kontext_edits_each_try_by_its_own_seed(flux: Path, dino: Path, tmp_path: Path) -> None:
    settings = settings_of(
        flux, editor="kontext", encoder=str(dino), tries=2, max_sequence_length=tiny.TEXT_LENGTH, limits=FREE.replace(min_similarity=0.0)
    )
    stage = references_stage(settings, 7)
    worker = stage.load(CPU)
    ones = [candidate(number, tmp_path) for number in (3, 4)]
    rows = list(worker(ones, tmp_path / "references"))
    assert [row.number for row in rows] == [3, 4]
    edits = [(row.number, k, j, edit) for row in rows for k, tries in enumerate(row.subjects) for j, edit in enumerate(tries)]
    assert [where[:3] for where in edits] == [(n, k, j) for n in (3, 4) for k in (0, 1) for j in (0, 1)]
    assert [edit.seed for *_, edit in edits] == [seed_of(7, "references", n, k, j, 0) for n, k, j, _ in edits]
    pictures = [made(ones[n - 3], k, j).tobytes() for n, k, j, _ in edits]
    assert len(set(pictures)) == len(edits)
    pipeline = FluxKontextPipeline.from_pretrained(flux)
    encoder = load_image_encoder(str(dino), "--dino")
    edit = rows[1].subjects[1][0]
    given = fitted(ones[1], 1, (16, 24))
    call = {"height": 16, "width": 24, "max_area": 384, "_auto_resize": False, "num_inference_steps": 1, "guidance_scale": 2.5}
    call |= {"max_sequence_length": tiny.TEXT_LENGTH, "generator": torch.Generator().manual_seed(edit.seed)}
    expected = pipeline(image=given, prompt=edit.instruction, **call).images[0]
    assert np.array_equal(made(ones[1], 1, 0), np.asarray(expected))
    likeness = float(torch.dot(*encoder.images([expected, given])))
    assert edit.scores == pytest.approx({"border": border(expected), "contrast": contrast(expected), "similarity": likeness}, abs=1e-6)
    assert worker.provenance["editor"]["pipeline"] == "FluxKontextPipeline"
    assert worker.provenance["encoder"]["model"] == dino.name
    before = pictures[-1]
    assert list(worker([ones[1]], tmp_path / "references")) == [rows[1]]  # whoever stands beside it in the chunk
    assert made(ones[1], 1, 1).tobytes() == before
    assert seed_of(8, "references", 3, 0, 0, 0) != edits[0][3].seed


def test_a_batch_has_the_edits_of_single_calls(flux: Path, tmp_path: Path) -> None:
    ones = [candidate(number, tmp_path) for number in range(2)]
    rows, pictures = [], []
    for size in (1, 3):
        settings = settings_of(flux, editor="kontext", tries=1, batch_size=size, max_sequence_length=tiny.TEXT_LENGTH)
        rows.append(list(references_stage(settings, 7).load(CPU)(ones, tmp_path / "references")))
        pictures.append([made(one, k, 0).astype(int) for one in ones for k in range(2)])
    for first, second in zip(*pictures, strict=True):
        assert np.abs(first - second).max() <= 1  # rounding
    assert [[edit.seed for tries in row.subjects for edit in tries] for row in rows[0]] == [
        [edit.seed for tries in row.subjects for edit in tries] for row in rows[1]
    ]


def test_klein_is_known_by_its_index_and_edits_one_at_a_time(tmp_path: Path) -> None:
    folder = tiny_editors.save_klein(tmp_path / "klein")
    settings = settings_of(folder, size=(64, 72), guidance_scale=None, max_sequence_length=16)
    assert editor_of(settings) == "flux2-klein"
    editor = load_editor(settings, CPU, torch.float32)
    given = [toys.picture(seed, 72, 64) for seed in (1, 2)]
    found = editor.edit(given, ["a cat", "a cat"], [5, 5])
    assert {picture.size for picture in found} == {(72, 64)}
    assert np.array_equal(np.asarray(editor.edit(given[1:], ["a cat"], [5])[0]), np.asarray(found[1]))
    assert not np.array_equal(*map(np.asarray, found))  # it sees the cut-out
    assert isinstance(editor, PipelineEditor)
    with pytest.raises(FieldError, match=r"references\.true_cfg_scale is none of the arguments of Flux2KleinPipeline"):
        PipelineEditor(editor.pipeline, editor.kind, settings.replace(true_cfg_scale=2.0), {})


def test_qwen_edits_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 56 * 56)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 32 * 32)
    settings = settings_of(size=(16, 24), guidance_scale=None, negative_prompt="there", true_cfg_scale=2.0)
    editor = PipelineEditor(tiny_editors.build_qwen(), KINDS["qwen-image-edit"], settings, {})
    editor.pipeline.set_progress_bar_config(disable=True)
    given = [toys.picture(seed, 24, 16) for seed in (1, 2)]
    found = editor.edit(given, ["a cat", "a cat"], [5, 5])
    assert {picture.size for picture in found} == {(24, 16)}
    assert not np.array_equal(*map(np.asarray, found))
    plain = PipelineEditor(editor.pipeline, editor.kind, settings.replace(negative_prompt=None, true_cfg_scale=None), {})
    assert not np.array_equal(np.asarray(plain.edit(given[:1], ["a cat"], [5])[0]), np.asarray(found[0]))


def test_models_of_no_known_class_and_sizes_that_cannot_be_made(flux: Path) -> None:
    with pytest.raises(FieldError, match=r"references\.editor must be given: .* is a FluxPipeline, none of FluxKontextPipeline"):
        load_editor(settings_of(flux), CPU, torch.float32)
    with pytest.raises(FileNotFoundError, match=r"references\.model: model 'nowhere'"):
        load_editor(settings_of("nowhere"), CPU, torch.float32)
    odd = load_editor(settings_of(flux, editor="kontext", size=(18, 24), max_sequence_length=tiny.TEXT_LENGTH), CPU, torch.float32)
    with pytest.raises(FieldError, match=r"references\.size must be a size that FluxKontextPipeline makes; asked for 18 x 24, it gave 16"):
        odd.edit([toys.picture(0, 24, 18)], ["a cat"], [0])


def test_none_is_the_cut_out_once(dino: Path, tmp_path: Path) -> None:
    settings = settings_of("nowhere", editor="none", tries=3, encoder=str(dino), limits=ReferencesLimits(min_border=None))
    stage = references_stage(settings, 0)
    one = candidate(0, tmp_path, found=(True, False))
    row = next(iter(stage.load(CPU)([one], tmp_path / "references")))
    assert [len(tries) for tries in row.subjects] == [1, 0]
    edit = row.subjects[0][0]
    assert edit.instruction == ""
    assert edit.scores["similarity"] == pytest.approx(1, abs=1e-5)
    assert np.array_equal(made(one, 0, 0), np.asarray(fitted(one, 0, (16, 24))))
    done = Candidate(0, one.folders, one.prompt, references=row)
    assert chosen_edits(settings, done) == (0, None)  # a copy, which is what is asked for
    assert stage.reasons(done) == []
    assert chosen_edits(settings.replace(editor="kontext"), done) == (None, None)
    assert isinstance(load_editor(settings, CPU, torch.float32), CutOuts)


def test_a_blanked_edit_is_dropped_and_named(dino: Path, tmp_path: Path) -> None:
    settings = settings_of(encoder=str(dino), tries=2, limits=ReferencesLimits(min_similarity=None, max_similarity=None))
    painted = FakeEditor(lambda cut, text, seed: Image.new("RGB", cut.size, "black"))
    worker = ReferencesWorker(settings, 0, painted, load_image_encoder(str(dino), "--dino"))
    one = candidate(0, tmp_path)
    row = next(iter(worker([one], tmp_path / "references")))
    assert all(edit.scores["contrast"] == 0 and edit.scores["border"] == 0 for tries in row.subjects for edit in tries)
    done = Candidate(0, one.folders, one.prompt, references=row)
    assert chosen_edits(settings, done) == (None, None)
    assert reasons(settings, done) == ["min_border", "min_contrast"]


def test_what_is_measured_by_hand() -> None:
    picture = np.full((64, 32, 3), 255, np.uint8)
    assert (border(Image.fromarray(picture)), contrast(Image.fromarray(picture))) == (1, 0)
    picture[:2, :] = (239, 255, 255)  # the rim's upper two rows are not nearly white
    assert border(Image.fromarray(picture)) == pytest.approx(1 - 2 * 32 / (64 * 32 - 60 * 30))
    picture[:2, :] = 240
    picture[10:20, 10:20] = 0  # what is inside is no matter
    assert border(Image.fromarray(picture)) == 1
    halves = np.zeros((8, 8, 3), np.uint8)
    halves[:4, :, 1] = 255
    assert contrast(Image.fromarray(halves)) == 0.5


def test_cut_outs_are_fitted_not_stretched() -> None:
    cut = Image.new("RGB", (10, 5), "red")
    found = np.asarray(fit(cut, (40, 20)))
    assert found.shape == (40, 20, 3)
    assert (found[15:25] == (255, 0, 0)).all()
    assert (found[:15] == 255).all()
    assert (found[25:] == 255).all()
    assert fit(cut, (5, 10)).tobytes() == cut.tobytes()


def test_the_most_similar_try_within_the_limits_is_chosen() -> None:
    settings = settings_of(
        encoder="a/b", limits=FREE.replace(min_similarity=0.6, max_similarity=0.9, min_border=0.5), judge=None, editor="kontext"
    )
    whole = {"border": 1.0}
    tries = [whole | {"similarity": value} for value in (0.59, 0.7, 0.9, 0.9, 0.91)] + [{"border": 0.4, "similarity": 0.9}]
    assert chosen_edits(settings, tried(*tries)) == (2,)  # both ends belong to the band; of equals the first
    assert [missed(settings, edit) for edit in tried(*tries).references.subjects[0]] == [
        ["min_similarity"],
        [],
        [],
        [],
        ["max_similarity"],
        ["min_border"],
    ]
    bad = tried(tries[0], other=[tries[1]])
    assert chosen_edits(settings, bad) == (None, 0)
    assert reasons(settings, bad) == []
    strict = settings.replace(limits=settings.limits.replace(min_references=2))
    assert reasons(strict, bad) == ["min_similarity"]
    nearest = tried({"border": 0.4, "similarity": 0.2}, {"border": 0.4, "similarity": 0.8}, other=[tries[4]])
    assert reasons(settings, nearest) == ["max_similarity", "min_border"]  # what the best tries miss
    assert reasons(strict, tried(tries[1])) == ["min_references"]
    unmeasured = settings_of(limits=FREE.replace(min_border=0.5))
    assert chosen_edits(unmeasured, tried({"border": 0.4}, {"border": 0.5}, {"border": 0.9})) == (1,)
    judged = settings_of(judge=ReferencesJudge(model="a/b"), detector="a/b", limits=FREE.replace(min_judge=0.5, min_detector=0.3))
    assert missed(judged, Edit(seed=0, instruction="", scores={"judge": 0.4, "detector": 0.2})) == ["min_detector", "min_judge"]
    assert missed(judged, Edit(seed=0, instruction="", scores={"judge": 0.5, "detector": 0.3})) == []


class Chat:
    """Answers what it is told and keeps what it was asked."""

    provenance = Provenance("judge", "1", "PNG")

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), list[Sequence[Any]]()

    def __call__(self, parts: Sequence[Any]) -> str:
        self.asked.append(parts)
        answer = self.answers.pop(0)
        return answer if isinstance(answer, str) else json.dumps(answer)


class Detections:
    """Says what it was asked for."""

    provenance = Provenance("detector", "1", "")

    def __init__(self) -> None:
        self.asked: list[str] = []

    def detections(self, picture: Image.Image, phrase: str) -> list[Detection]:
        self.asked.append(phrase)
        return [Detection(Box(0, 0, 4, 4), score) for score in (0.25, 0.5)] if phrase == "cat" else []


def test_judge_and_detector_see_the_edit_beside_its_cut_out(tmp_path: Path) -> None:
    yes = {"same": True, "complete": True, "single": False, "remark": " two\nof it "}
    chat = Chat(yes, "nonsense", yes | {"same": False}, "nonsense", "nonsense", yes | {"single": True, "remark": ""})
    detector = Detections()
    one = candidate(0, tmp_path)
    painted = FakeEditor(lambda cut, text, seed: Image.new("RGB", cut.size, "blue"))
    worker = ReferencesWorker(settings_of(tries=2), 0, painted, None, detector, EditJudge(chat))
    row = next(iter(worker([one], tmp_path / "references")))
    edits = [edit for tries in row.subjects for edit in tries]
    assert [edit.scores["judge"] for edit in edits] == pytest.approx([2 / 3, 0, 0, 1])
    assert edits[0].remarks == {"judge": "two of it"}
    assert edits[2].remarks["judge"].startswith("no answer: judge: answers with something else than EditOpinion")
    assert edits[3].remarks == {}
    assert [edit.scores["detector"] for edit in edits] == [0.5, 0.5, 0, 0]
    assert detector.asked == ["cat", "cat", "mug", "mug"]
    cut, edit, question = chat.asked[0][:3]
    assert cut.tobytes() == fitted(one, 0, (16, 24)).tobytes()
    assert edit.tobytes() == Image.new("RGB", (24, 16), "blue").tobytes()
    assert "a red cat" in question
    assert "The mug" in chat.asked[-1][2]
    assert set(worker.provenance) == {"editor", "detector", "judge"}


def test_instructions_are_of_the_kind_and_draw_a_view() -> None:
    views = {"human": ("front",), "animal": ("left", "right"), "object": ("front",)}
    words = {"human": "{phrase}", "animal": "the same {phrase}, a {name}, {view}", "object": "a {phrase}"}
    settings = settings_of(instructions=Instructions(**words), views=ViewChoices(**views))
    assert instruction(settings, SUBJECTS[0], 4) == "the same red cat, a cat, left"
    assert instruction(settings, SUBJECTS[0], 5) == "the same red cat, a cat, right"
    assert instruction(settings, SUBJECTS[1], 5) == "a mug"
    assert instruction(settings, Subject(phrase="Anna", name="woman", kind="human"), 0) == "Anna"
    texts = {instruction(settings_of(), SUBJECTS[1], seed) for seed in range(8)}
    assert len(texts) == 4
    assert all(text.startswith("Show the same mug from a ") for text in texts)


def test_a_try_draws_its_own_view(tmp_path: Path) -> None:
    painted = FakeEditor(lambda cut, text, seed: cut)
    row = next(iter(ReferencesWorker(settings_of(tries=12), 0, painted)([candidate(0, tmp_path)], tmp_path / "references")))
    for tries in row.subjects:
        assert len({edit.instruction for edit in tries}) > 2


def test_settings_say_what_does_not_fit() -> None:
    with pytest.raises(FieldError, match=r"references\.instructions\.animal may hold \{phrase\}, \{name\} and \{view\} .* got \{colour\}"):
        Instructions(animal="a {colour} {name}")
    with pytest.raises(FieldError, match=r"references\.instructions\.object must be a text with words in braces"):
        Instructions(object="a {phrase")
    with pytest.raises(FieldError, match=r"references\.limits\.min_similarity needs references\.encoder, which is null"):
        ReferencesSettings(encoder=None)
    ReferencesSettings(encoder=None, editor="none")
    with pytest.raises(FieldError, match=r"references\.limits\.min_judge needs references\.judge"):
        settings_of(limits=FREE.replace(min_judge=0.5))
    with pytest.raises(FieldError, match=r"min_similarity must be less than max_similarity 0\.5, got 0\.7"):
        settings_of(encoder="a/b", limits=FREE.replace(min_similarity=0.7, max_similarity=0.5))


def test_encoders_are_told_apart_by_their_config(dino: Path, tmp_path: Path) -> None:
    assert type(load_image_encoder(str(dino), "--x")).__name__ == "DinoEncoder"
    assert type(load_image_encoder(str(toys.write_clip(tmp_path / "clip")), "--x")).__name__ == "ClipEncoder"
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"--x: .*bert must be a model of one of the types clip, vit, dinov2, got one of the type bert"):
        load_image_encoder(str(tmp_path / "bert"), "--x")
