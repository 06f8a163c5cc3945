"""Stage 3: who is given what, which pixels, what is measured of it, what the limits drop; and each kind of model through the stage."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from mosaic.config.schema import FieldError
from mosaic.evaluation.detection import Box, Detection
from mosaic.evaluation.encoders import Provenance
from preprocess.construct.candidates import Candidate, picture_name, picture_path, read_stage_picture
from preprocess.construct.rows import Found, PromptRow, SegmentationRow, Subject
from preprocess.construct.segmentation import clipseg, detected, masks
from preprocess.construct.segmentation.assignment import assign
from preprocess.construct.segmentation.cutouts import cut_out
from preprocess.construct.segmentation.protocol import Instance
from preprocess.construct.segmentation.sam3 import Sam3Segmenter
from preprocess.construct.segmentation.settings import SegmentationLimits, SegmentationSettings
from preprocess.construct.segmentation.stage import SegmentationWorker, find_subjects, load_segmenter, reasons, segmentation_stage
from tests.evaluation import tiny_models, toys

SIDE = 24
CPU = torch.device("cpu")


def patch(left: int, top: int, right: int, bottom: int, score: float, confidence: float = 0.9) -> Instance:
    values = np.zeros((SIDE, SIDE), np.float32)
    values[top:bottom, left:right] = confidence
    return Instance(values, score)


class Drawn:
    """Finds what it was told, for each phrase by itself; notes what it was asked."""

    def __init__(self, **found: list[Instance]) -> None:
        self.found, self.asked = {name.replace("_", " "): instances for name, instances in found.items()}, []
        self.provenance = {"segmenter": Provenance("drawn", "1", "none")}

    def find(self, picture: Image.Image, phrases: Sequence[str]) -> list[list[Instance]]:
        self.asked.append(list(phrases))
        return [self.found[phrase] for phrase in phrases]


def random_world(rng: np.random.Generator) -> tuple[Drawn, list[str]]:
    """One to six subjects of one to three phrases, and more or fewer things than these, of any confidence."""
    names = ["cat", "red_cat", "mug"][: rng.integers(1, 4)]
    found: dict[str, list[Instance]] = {name: [] for name in names}
    for _ in range(rng.integers(0, 7)):
        left, top = rng.integers(0, SIDE - 6, 2)
        confidence = rng.uniform(0.5, 1, (SIDE, SIDE)).astype(np.float32)
        confidence *= patch(left, top, left + rng.integers(3, 7), top + rng.integers(3, 7), 1, 1).confidence
        for name in names:
            if rng.random() < 0.6:
                found[name].append(Instance(confidence, float(rng.uniform(0.3, 1))))
    texts = [names[rng.integers(len(names))].replace("_", " ") for _ in range(rng.integers(1, 7))]
    return Drawn(**found), texts


def test_masks_part_the_picture_and_subjects_may_come_in_any_order() -> None:
    picture, rng = Image.new("RGB", (SIDE, SIDE)), np.random.default_rng(0)
    for _ in range(60):
        world, texts = random_world(rng)
        found = find_subjects(world, picture, texts)
        assert world.asked == [list(dict.fromkeys(texts))]  # each phrase once, in the subjects' order
        shown = np.array([one[1] for one in found if one], dtype=int).reshape(-1, SIDE, SIDE)
        assert (shown.sum(axis=0) <= 1).all()
        given = assign(texts, {text: world.found[text] for text in texts})
        union = np.any([one.instance.mask for one in given if one.instance] or [np.zeros((SIDE, SIDE), bool)], axis=0)
        assert np.array_equal(shown.any(axis=0), union)  # nothing is lost, nothing is added
        order = rng.permutation(len(texts))
        again = find_subjects(world, picture, [texts[k] for k in order])
        for text in set(texts):  # subjects of one phrase are no order, but that of their places
            own = [one for one, other in zip(found, texts, strict=True) if other == text]
            permuted = [one for one, k in zip(again, order, strict=True) if texts[k] == text]
            for one, other in zip(own, permuted, strict=True):
                assert (one is None) == (other is None)
                assert one is None or other is None or (one[0] == other[0] and np.array_equal(one[1], other[1]))


def test_no_thing_is_given_twice_and_scores_decide_together() -> None:
    left, right = patch(2, 2, 8, 8, 0.9), patch(12, 2, 18, 8, 0.5)
    assert [one.instance for one in assign(["cat", "cat"], {"cat": [right, left]})] == [left, right]
    found = {"red cat": [patch(2, 2, 8, 8, 0.8), patch(12, 2, 18, 8, 0.7)], "cat": [patch(2, 3, 8, 8, 0.9)]}
    red, any_cat = assign(["red cat", "cat"], found)  # alone each would have the left one
    assert red.instance is found["red cat"][1]
    assert any_cat.instance is found["cat"][0]
    assert (red.number_found, any_cat.number_found, red.rival, any_cat.rival) == (2, 1, 0, 0)
    again = assign(["cat", "cat"], {"cat": [left, patch(2, 3, 8, 8, 0.4)]})
    assert (again[0].instance, again[1].instance, again[0].number_found, again[0].rival) == (left, None, 1, 0)
    most = assign(["cat"], {"cat": [right, left, patch(2, 12, 8, 18, 0.7)]})[0]
    assert (most.instance, most.number_found, most.rival) == (left, 3, 0.7)
    assert assign(["cat"], {"cat": [patch(0, 0, 0, 0, 0.9)]}) == [(None, 0, 0.0)]


def test_what_is_known_of_a_mask() -> None:
    world = Drawn(cat=[patch(0, 4, 8, 16, 0.8, 0.7)], mug=[patch(6, 8, 16, 20, 0.6, 0.9)], dog=[patch(7, 9, 9, 11, 0.9, 0.8)])
    cat, mug, dog = find_subjects(world, Image.new("RGB", (SIDE, SIDE)), ["cat", "mug", "dog"])
    assert cat
    assert mug
    assert dog is None
    assert cat[1].sum() == 8 * 12 - 2 * 8
    assert mug[1].sum() == 10 * 12
    assert cat[0] == Found(
        box=(0, 4, 8, 16), score=0.8, number_found=1, area=80 / SIDE**2, truncated=12 / 35, overlap=16 / (96 + 120 - 16), rival=0
    )
    assert mug[0].truncated == 0
    alike = [patch(0, 0, 8, 8, 0.6), patch(4, 0, 12, 8, 0.8)]  # equally sure of the pixels that they share: the surer thing has them
    assert [int(mask.sum()) for mask in masks.exclusive(alike)] == [32, 64]
    assert [int(mask.sum()) for mask in masks.exclusive(alike[::-1])] == [64, 32]
    full = np.ones((5, 7), bool)
    assert masks.truncated(full) == 1
    full[0] = False
    assert masks.truncated(full) == pytest.approx((7 + 2 * 3) / (2 * 7 + 2 * 2))
    assert masks.mask_box(full) == Box(0, 1, 7, 5)
    corner = np.eye(4, dtype=bool)
    corner[0, 1] = True
    assert [int(piece.sum()) for piece in masks.pieces(corner)] == [3, 1, 1]  # corners do not connect


def found(**values: Any) -> Found:
    return Found(
        **{"box": (0, 0, 9, 9), "score": 0.3, "number_found": 1, "area": 0.5, "truncated": 0.2, "overlap": 0.3, "rival": 0.3} | values
    )


def candidate(folder: Path, *texts: str, subjects: tuple[Found | None, ...] | None = None) -> Candidate:
    names = tuple(Subject(phrase=text, name=text.split()[-1], kind="animal") for text in texts)
    row = None if subjects is None else SegmentationRow(number=3, subjects=subjects)
    prompt = PromptRow(number=3, prompt=" and ".join(texts), caption="", subjects=names, seed=0)
    return Candidate(3, {"synthesis": folder / "synthesis", "segmentation": folder / "segmentation"}, prompt, segmentation=row)


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"score": 0.29}, ["min_score"]),
        ({"area": 0.019}, ["min_area"]),
        ({"area": 0.71}, ["max_area"]),
        ({"truncated": 0.21}, ["max_truncated"]),
        ({"overlap": 0.31}, ["max_overlap"]),
        ({"rival": 0.31}, ["max_rival"]),
        ({"rival": 0.9, "score": 0.1}, ["min_score", "max_rival"]),
    ],
)
def test_each_limit_drops_what_misses_it(tmp_path: Path, changed: dict, missed: list[str]) -> None:
    settings = SegmentationSettings()
    assert reasons(settings, candidate(tmp_path, "a cat", "a mug", subjects=(found(), found(**changed)))) == missed
    none = SegmentationSettings(limits=dict.fromkeys(SegmentationLimits.model_fields))
    assert reasons(none, candidate(tmp_path, "a cat", subjects=(found(**changed),))) == []
    assert reasons(none, candidate(tmp_path, "a cat", "a mug", subjects=(found(**changed), None))) == ["not_found"]
    assert reasons(settings, candidate(tmp_path, "a cat", "a mug", subjects=(found(**changed), None))) == ["not_found", *missed]


def test_a_detector_is_named_for_sam2_alone() -> None:
    with pytest.raises(FieldError, match=r'segmentation\.detector must be a detector for "sam2", got null'):
        SegmentationSettings(detector=None)
    with pytest.raises(FieldError, match=r'segmentation\.detector must be null, for "clipseg" finds things by itself, got IDEA'):
        SegmentationSettings(kind="clipseg")
    with pytest.raises(FieldError, match=r"segmentation\.limits\.max_area must be .* at most 1"):
        SegmentationSettings(limits={"max_area": 70.0})


def test_the_settings_text_is_asked_for_and_masks_are_written(tmp_path: Path) -> None:
    (tmp_path / "synthesis").mkdir()
    (tmp_path / "segmentation").mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "synthesis" / picture_name(3))
    one = candidate(tmp_path, "a red cat", "a blue cat", "a mug")
    cats = [patch(12, 2, 18, 8, 0.5), patch(2, 2, 8, 8, 0.9)]
    for settings, world in (
        (SegmentationSettings(), Drawn(a_red_cat=cats[:1], a_blue_cat=cats[1:], a_mug=[])),
        (SegmentationSettings(text="name"), Drawn(cat=cats, mug=[])),
    ):
        (row,) = SegmentationWorker(settings, world)([one], tmp_path / "segmentation")
        assert isinstance(row, SegmentationRow)
        assert row.number == 3
        assert row.subjects[2] is None
        lefts = [int(subject.box[0]) for subject in row.subjects if subject]
        assert lefts == ([12, 2] if settings.text == "phrase" else [2, 12])
        for k, left in enumerate(lefts):
            mask = read_stage_picture(one, "segmentation", f"mask{k}")
            expected = np.zeros((SIDE, SIDE), np.uint8)
            expected[2:8, left : left + 6] = 255
            assert mask.mode == "L"
            assert np.array_equal(np.asarray(mask), expected)
        assert not picture_path(one, "segmentation", "mask2").exists()


def test_boxes_are_cut_at_the_frame_and_come_once() -> None:
    picture = Image.new("RGB", (100, 50))
    given = [Detection(Box(-5, -5, 120, 60), 0.9), Detection(Box(0, 1, 100, 50), 0.8), Detection(Box(99.5, 0, 120, 50), 0.7)]
    given += [Detection(Box(0, 0, 30, 50), 0.6)]
    assert detected.once(detected.inside(given, picture)) == [Detection(Box(0, 0, 100, 50), 0.9), Detection(Box(0, 0, 30, 50), 0.6)]


def test_clipsegs_largest_pieces_are_the_surest() -> None:
    shares = np.full((SIDE, SIDE), 0.5, np.float32)
    shares[2:10, 2:10], shares[2:8, 14:20], shares[20:22, 2:4], shares[20, 20] = 0.8, 0.9, 0.95, 0.99
    found = clipseg.things(shares, 0.5)
    assert [int(one.mask.sum()) for one in found] == [64, 36, 4]  # one pixel is noise
    assert [one.score for one in found] == pytest.approx([0.8, 0.9 * 36 / 64, 0.95 * 4 / 64])
    assert clipseg.things(np.full((4, 4), 0.5), 0.5) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_clipseg_answers_as_transformers_class_does(folder: Path) -> None:
    path, picture = tiny_models.write_clipseg(folder / "clipseg"), toys.picture(1, 40, 30)
    segmenter = clipseg.ClipSegSegmenter(str(path), CPU, torch.float32, 0.5)
    model, processor = CLIPSegForImageSegmentation.from_pretrained(path).eval(), CLIPSegProcessor.from_pretrained(path)
    asked = processor(text=["a cat", "a mug"], images=[picture] * 2, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**asked).logits
    shares = F.interpolate(logits[None], (30, 40), mode="bilinear", align_corners=False)[0].sigmoid().numpy()
    for one, wanted in zip(segmenter.find(picture, ["a cat", "a mug"]), shares, strict=True):
        for got, expected in zip(one, clipseg.things(wanted, 0.5), strict=True):
            np.testing.assert_allclose(got.confidence, expected.confidence, atol=1e-5)


def test_sam3_gives_scores_of_things_that_are_there_and_masks_in_the_pictures_size(folder: Path) -> None:
    segmenter = Sam3Segmenter(str(tiny_models.write_sam3(folder / "sam3")), CPU, torch.float32, 0.5)
    picture = toys.picture(1, 40, 30)
    cat, mug = segmenter.find(picture, ["a cat", "a mug"])
    assert [one.score for one in cat] != [one.score for one in mug]
    assert [one.score for one in segmenter.find(picture, ["a mug"])[0]] == pytest.approx([one.score for one in mug], abs=1e-6)
    tokens = segmenter.tokenizer("a cat", padding="max_length", max_length=12, return_tensors="pt")
    resized = torch.from_numpy(np.array(picture.resize((112, 112), Image.Resampling.BILINEAR))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        raw = segmenter.model(pixel_values=resized, **tokens)
    scores = raw.pred_logits[0].sigmoid() * raw.presence_logits[0].sigmoid()
    sure = scores > 0.3
    assert 0 < len(cat) == int(sure.sum())
    assert [one.score for one in cat] == pytest.approx(scores[sure].tolist(), abs=1e-5)
    shares = F.interpolate(raw.pred_masks[:, sure].sigmoid(), (30, 40), mode="bilinear", align_corners=False)[0].numpy()
    for one, wanted in zip(cat, shares, strict=True):
        np.testing.assert_allclose(one.confidence, np.where(wanted > 0.5, wanted, 0), atol=2e-3)


MODELS: dict[str, Callable[[Path], dict[str, str]]] = {
    "grounding-dino": lambda folder: {"detector": str(tiny_models.write_grounding_dino(folder / "detector"))},
    "mm-grounding-dino": lambda folder: {"detector": str(tiny_models.write_grounding_dino(folder / "detector", mm=True))},
    "owlv2": lambda folder: {"detector": str(tiny_models.write_owlv2(folder / "detector"))},
    "sam3": lambda folder: {"kind": "sam3", "model": str(tiny_models.write_sam3(folder / "sam3"))},
    "clipseg": lambda folder: {"kind": "clipseg", "model": str(tiny_models.write_clipseg(folder / "clipseg"))},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_goes_through_the_stage(tmp_path: Path, folder: Path, name: str) -> None:
    values: dict[str, Any] = MODELS[name](tmp_path)
    if "kind" not in values:
        sam2 = folder / "sam2"
        values["model"] = str(sam2 if sam2.exists() else tiny_models.write_sam2(sam2))
    else:
        values["detector"] = None
    (tmp_path / "synthesis").mkdir()
    (tmp_path / "segmentation").mkdir()
    toys.picture(1, 160, 120).save(tmp_path / "synthesis" / picture_name(3))
    one = candidate(tmp_path, "a cat", "a mug")
    stage = segmentation_stage(SegmentationSettings(**values), 0, torch.float32)
    worker = stage.load(CPU)
    (row,) = worker([one], tmp_path / "segmentation")
    assert isinstance(row, SegmentationRow)
    assert any(row.subjects)
    assert set(worker.provenance) == ({"detector", "segmenter"} if values["detector"] else {"segmenter"})
    for k, subject in enumerate(row.subjects):
        if subject is not None:
            mask = np.asarray(read_stage_picture(one, "segmentation", f"mask{k}")) > 0
            assert mask.shape == (120, 160)
            assert mask.mean() == pytest.approx(subject.area)
            assert masks.mask_box(mask) == subject.box
    cat, mug = worker.segmenter.find(toys.picture(1, 160, 120), ["a cat", "a mug"])  # type: ignore[attr-defined]
    again = worker.segmenter.find(toys.picture(1, 160, 120), ["a mug", "a cat"])  # type: ignore[attr-defined]
    for found, other in ((mug, again[0]), (cat, again[1])):
        assert [one.score for one in found] == pytest.approx([one.score for one in other], abs=1e-5)


def test_a_detector_without_scores_is_refused(folder: Path) -> None:
    florence = tiny_models.write_florence(folder / "florence", [(0, 0, 500, 500)])
    with pytest.raises(ValueError, match=r"segmentation\.detector: .*florence must say how sure it is of a box, .*FlorenceDetector"):
        load_segmenter(SegmentationSettings(detector=str(florence), model=str(folder)), CPU, torch.float32)


def test_cut_outs_stand_on_white_in_the_middle_of_a_square() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[3:5, 4:20] = mask[4:9, 6] = True  # 16 x 6 px
    shown = np.asarray(cut_out(Image.fromarray(pixels), mask, margin=0.1))
    expected = np.full((20, 20, 3), 255, np.uint8)
    expected[7:13, 2:18][mask[3:9, 4:20]] = pixels[3:9, 4:20][mask[3:9, 4:20]]
    assert np.array_equal(shown, expected)
    assert np.array_equal(np.asarray(cut_out(Image.fromarray(pixels), mask, margin=0)), expected[2:18, 2:18])
    assert cut_out(Image.fromarray(pixels), mask, side=64).size == (64, 64)
    with pytest.raises(ValueError, match="must not be empty"):
        cut_out(Image.fromarray(pixels), mask & False)
    with pytest.raises(ValueError, match="must be as large as the picture, 30 x 20 px, got 20 x 30"):
        cut_out(Image.fromarray(pixels), mask.T)
