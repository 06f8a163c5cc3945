"""IP-Sim: which instances count and how they are shown, what they count for, and the models that find them."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Sam2Model

from mosaic.evaluation.assignment import assigned, best
from mosaic.evaluation.detection import Box, ScoringDetector, load_detector
from mosaic.evaluation.encoders import Dinov2Encoder, Provenance
from mosaic.evaluation.entries import Entry, Subject
from mosaic.evaluation.instances import InstanceFinder, cut_out, inside, is_large, overlap, places
from mosaic.evaluation.ip_sim import InstanceSimilarity
from mosaic.evaluation.segmentation import Sam2Segmenter
from tests.evaluation import tiny_models, toys


def test_small_instances_are_left_out() -> None:
    def large(width: int, height: int) -> bool:
        return is_large(Box(5, 7, 5 + width, 7 + height), 768)  # m = 38, m // 4 = 9

    assert large(38, 38)
    assert not large(38, 37)
    assert large(9, 161)
    assert not large(9, 160)  # 1440 < 38^2 = 1444
    assert not large(8, 700)
    assert not large(700, 8)
    assert not is_large(Box(3, 3, 3, 9), 10)  # nothing in it
    assert inside(Box(-3.7, 4.9, 99.5, 200), Image.new("RGB", (80, 60))) == (0, 4, 80, 60)


def test_instances_stand_on_white_squares() -> None:
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    mask = np.zeros((6, 8), dtype=bool)
    mask[2, 2:6] = True
    shown = np.asarray(cut_out(pixels, mask, Box(1, 2, 7, 4)))
    assert shown.shape == (6, 6, 3)
    assert np.array_equal(shown[2, 1:5], pixels[2, 2:6])
    shown = shown.copy()
    shown[2, 1:5] = 255
    assert (shown == 255).all()


def test_boxes_at_one_place_are_one_instance() -> None:
    one = Box(0, 0, 10, 10)
    assert overlap(one, Box(0, 5, 10, 15)) == pytest.approx(1 / 3)
    assert places([one, Box(20, 0, 30, 10), Box(0, 2, 10, 10), Box(0, 6, 10, 16)]) == [0, 1, 0, 2]
    similarities = np.array([[90.0, np.nan], [80.0, 70.0], [np.nan, np.nan]])
    assert best(similarities) == [90, 80, 0]
    assert assigned(similarities) == [90, 70, 0]


class Boxes:
    """Finds given boxes by name, everything in them, and embeds what it sees by its mean colour without white."""

    provenance = Provenance("boxes", "1", "none")

    def __init__(self, **found: list[Box]) -> None:
        self.found, self.asked = found, 0

    def boxes(self, picture: Image.Image, phrase: str) -> list[Box]:
        self.asked += 1
        return self.found[phrase]

    def masks(self, picture: Image.Image, boxes: Sequence[Box]) -> np.ndarray:
        return np.ones((len(boxes), picture.height, picture.width), dtype=bool)

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = [torch.from_numpy(np.array(picture)).double().flatten(0, 1) for picture in pictures]
        means = torch.stack([part[part.min(dim=1).values < 255].mean(dim=0) for part in pixels])
        return torch.nn.functional.normalize(means, dim=-1).float()


def test_each_subject_has_the_instance_most_like_it(tmp_path: Path) -> None:
    for name, colour in (("cat", (200, 0, 0)), ("mug", (200, 100, 0)), ("man", (0, 0, 9))):
        Image.new("RGB", (30, 40), colour).save(tmp_path / f"{name}.png")
    subjects = tuple(
        Subject(name, (tmp_path / f"{name}.png",), kind) for name, kind in (("cat", "animal"), ("mug", "object"), ("man", "human"))
    )
    picture = Image.new("RGB", (200, 100), (0, 200, 0))
    picture.paste((200, 0, 0), (50, 0, 100, 100))
    green, red = Box(0, 0, 50, 100), Box(50, 0, 100, 100)
    case = [Entry(tmp_path, "0", 0, "", subjects)]

    def scores(boxes: Boxes, metric: str = "ip_sim") -> dict[tuple[str, str | None], float]:
        finder = InstanceFinder(boxes, boxes)
        measures = [InstanceSimilarity(name, boxes, finder) for name in (metric, "again")]
        values = [measure(case, [picture]) for measure in measures]
        assert values[0] == values[1]
        assert boxes.asked == 2  # once a name, whatever is measured, and no humans
        return {(key.metric, key.subject): value for key, value in zip(measures[0].keys(case), values[0], strict=True)}

    found = scores(Boxes(cat=[green, red], mug=[Box(52, 0, 100, 100)]))
    assert found.keys() == {(metric, name) for metric in ("ip_sim", "ip_sim_assigned") for name in ("cat", "mug")}
    like_red = 100 * 2 / 5**0.5
    assert found["ip_sim", "cat"] == pytest.approx(100, abs=1e-4)
    assert found["ip_sim", "mug"] == pytest.approx(like_red, abs=0.1)
    assert found["ip_sim_assigned", "cat"] == pytest.approx(100, abs=1e-4)
    assert found["ip_sim_assigned", "mug"] == 0  # its only instance is the cat's
    late = scores(Boxes(cat=[green, Box(0, 0, 1, 1), green, green, red], mug=[]))
    assert late["ip_sim", "cat"] == pytest.approx(0, abs=1e-4)  # the red one is the fourth that is large enough
    assert late["ip_sim", "mug"] == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_florence_and_grounding_dino_give_boxes_in_pixels(folder: Path) -> None:
    picture = toys.picture(1, 160, 120)
    florence = load_detector(str(tiny_models.write_florence(folder / "florence", [(100, 200, 600, 900), (0, 0, 500, 500)])))
    assert np.abs(np.array(florence.boxes(picture, "cat")) - [[16, 24, 96, 108], [0, 0, 80, 60]]).max() < 1
    grounding: Any = load_detector(str(tiny_models.write_grounding_dino(folder / "grounding")))
    boxes = np.array(grounding.boxes(picture, "Cat"))
    asked = grounding.processor(images=picture, text="cat.", return_tensors="pt")
    raw = grounding.model(**asked)
    sure = raw.logits[0].sigmoid().max(dim=1).values
    order = sure.argsort(descending=True, stable=True)[: int((sure > 0.3).sum())]
    x, y, width, height = (raw.pred_boxes[0][order] * torch.tensor([160, 120, 160, 120])).T
    assert len(boxes) > 1
    np.testing.assert_allclose(boxes, torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1), atol=1e-3)
    with pytest.raises(ValueError, match="--detector: .* florence2, .*got one of the type vit"):
        load_detector(str(toys.write_dino(folder / "dino")))


@pytest.mark.parametrize("kind", ["mm-grounding-dino", "owlv2"])
def test_detections_are_the_surest_boxes_first(folder: Path, kind: str) -> None:
    picture, path = toys.picture(1, 160, 120), folder / kind
    write: Any = tiny_models.write_owlv2 if kind == "owlv2" else functools.partial(tiny_models.write_grounding_dino, mm=True)
    detector: Any = load_detector(str(write(path)))
    found = detector.detections(picture, "a mug")
    assert isinstance(detector, ScoringDetector)
    assert len(found) > 1
    assert detector.boxes(picture, "a mug") == [one.box for one in found]
    text = [["a photo of a mug"]] if kind == "owlv2" else "a mug."
    raw = detector.model(**detector.processor(images=picture, text=text, return_tensors="pt"))
    sure = raw.logits[0].sigmoid().max(dim=1).values
    order = sure.argsort(descending=True, stable=True)[: len(found)]
    assert len(found) == (sure > (0.1 if kind == "owlv2" else 0.3)).sum()
    np.testing.assert_allclose([one.score for one in found], sure[order].tolist(), atol=1e-5)
    # OWLv2 sees the picture as the upper left of a square.
    x, y, width, height = (raw.pred_boxes[0][order] * torch.tensor([160, 160 if kind == "owlv2" else 120] * 2)).T
    corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1)
    np.testing.assert_allclose([one.box for one in found], corners.detach(), atol=1e-3)
    back = torch.stack([corners[:, ::2].mean(1), corners[:, 1::2].mean(1), corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1]])
    torch.testing.assert_close(back, torch.stack([x, y, width, height]), atol=1e-3, rtol=0)


def test_sam2_gives_a_mask_per_box_in_the_pictures_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, boxes = tiny_models.write_sam2(folder / "sam2"), [Box(10, 10, 100, 100), Box(60, 20, 80, 110)]
    segmenter, picture = Sam2Segmenter(str(path)), toys.picture(1, 160, 120)
    seen: dict[str, Tensor] = {}
    forward = segmenter.model.forward
    monkeypatch.setattr(segmenter.model, "forward", lambda **given: seen.update(given) or forward(**given))
    masks = segmenter.masks(picture, boxes)
    assert (masks.shape, masks.dtype) == ((2, 120, 160), bool)
    model = Sam2Model.from_pretrained(path).eval()
    resized = torch.from_numpy(np.array(picture.resize((128, 128), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    pixels = (resized - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    scaled = torch.tensor([[[8.0, 10 * 128 / 120, 80, 100 * 128 / 120]]])
    torch.testing.assert_close(seen["input_boxes"][:, :1], scaled)  # a random model hardly heeds boxes
    with torch.no_grad():
        logits = model(pixel_values=pixels[None].float(), input_boxes=scaled, multimask_output=False).pred_masks[0]
    wanted = torch.nn.functional.interpolate(logits, (120, 160), mode="bilinear")[0, 0] > 0
    assert (masks[0] == wanted.numpy()).mean() > 0.999
    assert 0 < masks[0].mean() < 1


def test_dinov2_is_prepared_as_dino(folder: Path) -> None:
    encoder = Dinov2Encoder(str(tiny_models.write_dinov2(folder / "dinov2")))
    assert (encoder.prepare.short_side, encoder.prepare.side) == (256, 224)
    embeddings = encoder.images([toys.picture(1), toys.picture(1), toys.picture(2, 90, 30)])
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    assert float(embeddings[0] @ embeddings[1]) == pytest.approx(1, abs=1e-5)
    assert float(embeddings[0] @ embeddings[2]) < 0.999
