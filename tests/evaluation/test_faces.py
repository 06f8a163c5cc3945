"""ID-Sim: faces aligned by five points, ArcFace's backbone, and what a face counts for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from mosaic.evaluation.arcface import ArcFace, IrSe
from mosaic.evaluation.assignment import assigned, best
from mosaic.evaluation.detection import Box
from mosaic.evaluation.encoders import Provenance
from mosaic.evaluation.entries import Entry, Subject
from mosaic.evaluation.faces import TEMPLATE, Face, aligned, grown, similarity_transform
from mosaic.evaluation.id_sim import FaceSimilarity
from tests.tiny import randomise

COSINES = st.lists(st.floats(-100, 100), min_size=3, max_size=3)


def test_alignment_finds_turn_scale_and_shift() -> None:
    turn, scale, shift = 0.4, 3.0, np.array([50.0, 20.0])
    rotation = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    found = similarity_transform(TEMPLATE @ rotation.T + shift)
    back = np.linalg.inv(rotation)
    np.testing.assert_allclose(found, np.column_stack([back, -back @ shift]), atol=1e-9)
    mirrored = similarity_transform(TEMPLATE * [-1, 1])
    assert np.linalg.det(mirrored[:, :2]) > 0  # a face is turned, never mirrored


def test_aligned_faces_have_their_points_in_the_template() -> None:
    pixels = np.zeros((300, 400, 3), dtype=np.uint8)
    points = np.round(TEMPLATE @ np.array([[1.5, 0.5], [-0.5, 1.5]]) + [120, 60])
    for number, (x, y) in enumerate(points.astype(int)):
        pixels[y - 2 : y + 3, x - 2 : x + 3, number % 3] = 255 - 20 * number
    face = aligned(Image.fromarray(pixels), Face(Box(0, 0, 1, 1), points))
    assert face.size == (112, 112)
    shown = np.asarray(face).astype(float)
    for number, (x, y) in enumerate(TEMPLATE):
        around = shown[:, :, number % 3] * (np.hypot(*(np.indices((112, 112)) - np.array([y, x])[:, None, None])) < 6)
        middle = [(around * axis).sum() / around.sum() for axis in np.indices((112, 112))]
        assert np.hypot(middle[0] - y, middle[1] - x) < 0.5
    same = Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8))
    kept = np.asarray(aligned(same, Face(Box(0, 0, 1, 1), TEMPLATE))).astype(int)
    assert np.abs(kept - np.asarray(same)).max() <= 1  # no pixel moves where none has to


def test_boxes_grow_around_their_middle() -> None:
    picture = Image.new("RGB", (200, 100))
    assert grown(Box(50, 40, 90, 60), picture) == (44, 37, 96, 63)
    assert grown(Box(0, 0, 200, 100), picture) == (0, 0, 200, 100)


def test_arcface_has_the_parameters_and_names_of_ir_se50(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = IrSe()
    assert sum(parameter.numel() for parameter in model.parameters()) == 43_797_696
    state = model.state_dict()
    assert state["body.3.shortcut_layer.0.weight"].shape == (128, 64, 1, 1)
    assert state["body.23.res_layer.5.fc1.weight"].shape == (32, 512, 1, 1)
    assert state["output_layer.3.weight"].shape == (512, 512 * 7 * 7)
    stages = ((16, 1), (32, 2))
    small = IrSe(stages)
    randomise(small.parameters(), 3, 0.3)
    torch.save({name: tensor for name, tensor in small.state_dict().items() if "num_batches" not in name}, tmp_path / "small.pth")
    faces = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (112, 112, 3), dtype=np.uint8)) for k in range(2)]
    embeddings = ArcFace(tmp_path / "small.pth", stages=stages).images(faces)
    pixels = torch.stack([torch.from_numpy(np.array(face)).permute(2, 0, 1) / 127.5 - 1 for face in faces])
    torch.testing.assert_close(embeddings, torch.nn.functional.normalize(small.eval()(pixels)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"--arcface .*small\.pth: the file lacks body\."):
        ArcFace(tmp_path / "small.pth")


class Colours:
    """Finds a face in every column of 100 px that is not black, and embeds faces by their colour."""

    provenance = Provenance("colours", "1", "none")

    def faces(self, picture: Image.Image) -> list[Face]:
        found = []
        for left in range(0, picture.width, 100):
            column = picture.crop((left, 0, min(left + 100, picture.width), picture.height))
            if np.asarray(column).any():
                found.append(Face(Box(left + 20, 20, left + 80, 80), TEMPLATE / 112 * 60))
        return found

    def images(self, pictures: Any) -> Tensor:
        means = torch.stack([torch.from_numpy(np.array(picture)).double().mean(dim=(0, 1)) for picture in pictures])
        return torch.nn.functional.normalize(means, dim=-1).float()


def picture_of(*colours: tuple[int, int, int]) -> Image.Image:
    picture = Image.new("RGB", (100 * len(colours), 100))
    for number, colour in enumerate(colours):
        picture.paste(colour, (100 * number, 0, 100 * number + 100, 100))
    return picture


def test_each_human_has_the_face_most_like_it(tmp_path: Path) -> None:
    red, orange, green, black = (200, 0, 0), (200, 100, 0), (0, 200, 0), (0, 0, 0)
    for name, colour in (("red", red), ("orange", orange), ("dark", black)):
        picture_of(colour).save(tmp_path / f"{name}.png")
    subjects = [Subject(name, (tmp_path / f"{name}.png",), "human") for name in ("red", "orange", "dark")]
    measure = FaceSimilarity(Colours(), Colours())

    def scores(picture: Image.Image, *shown: Subject) -> dict[tuple[str, str | None], float]:
        case = [Entry(tmp_path, "0", 0, "", shown)]
        return {(key.metric, key.subject): value for key, value in zip(measure.keys(case), measure(case, [picture]), strict=True)}

    both = scores(picture_of(green, red), *subjects[:2])
    assert both["id_sim", "red"] == pytest.approx(100, abs=1e-4)
    assert both["id_sim", "orange"] == pytest.approx(100 * 2 / 5**0.5, abs=0.1)  # the same face counts twice,
    assert both["id_sim_assigned", "red"] == pytest.approx(100, abs=1e-4)
    assert both["id_sim_assigned", "orange"] == pytest.approx(100 / 5**0.5, abs=0.1)  # or the other one is taken
    assert set(scores(picture_of(black), *subjects[:2]).values()) == {0}  # no face
    assert set(scores(picture_of(red), subjects[2]).values()) == {0}  # nor in the reference
    assert measure.keys([Entry(tmp_path, "0", 0, "", (Subject("dog", (tmp_path,), "animal"),))]) == []
    alone = scores(picture_of(red), *subjects[:2])
    assert [alone["id_sim_assigned", name] > 0 for name in ("red", "orange")] == [True, False]  # one face for one human


@given(st.lists(COSINES, min_size=1, max_size=4), COSINES)
def test_more_faces_never_lower_a_score(columns: list[list[float]], further: list[float]) -> None:
    few, many = np.array(columns).T, np.array([*columns, further]).T
    assert all(after >= before for before, after in zip(best(few), best(many), strict=True))
    assert all(value >= row.mean() - 1e-9 for value, row in zip(best(few), few, strict=True))
    assert sum(assigned(many)) >= sum(assigned(few)) - 1e-9 or len(columns) < 3  # with fewer faces than humans some have 0
    assert best(np.zeros((2, 0))) == assigned(np.zeros((2, 0))) == [0, 0]
