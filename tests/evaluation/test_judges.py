"""Models that judge a picture as a whole: those that answer questions, and the aesthetic score."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from mosaic.evaluation.aesthetics import AestheticMeasure, SiglipAesthetic, load_head
from mosaic.evaluation.answering import load_answerer, plain
from mosaic.evaluation.dpg import DpgScore
from mosaic.evaluation.encoders import Provenance
from mosaic.evaluation.entries import Entry, Question, Subject
from tests.evaluation import tiny_models, toys


def case_of(runs: int, *questions: Question) -> list[Entry]:
    return [Entry(Path(f"{run}.png"), "0", run, "", (Subject("cat", ()),), questions, place=f"line {run}") for run in range(runs)]


def test_answerers_of_all_kinds(tmp_path: Path) -> None:
    picture, questions = toys.picture(1), ["is there a cat?", "is the cat on the mug?"]
    for says in ("yes", "no"):
        judge = load_answerer(str(tiny_models.write_blip(tmp_path / says, says)))
        assert judge.answers(picture, questions) == [says] * 2
        assert judge.provenance.model == says
    vilt = load_answerer(str(tiny_models.write_vilt(tmp_path / "vilt")))
    assert set(vilt.answers(picture, questions)) <= {"yes", "no"}  # "Yes" among its answers
    chat = load_answerer(str(tiny_models.write_llava(tmp_path / "llava")))
    assert chat.answers(picture, questions) == ["yes"] * 2  # it writes "Yes. no"
    assert "yes or no" in chat.provenance.preprocessing
    assert [plain(answer) for answer in (" Yes.", "NO\n", "yes")] == ["yes", "no", "yes"]


class Judge:
    """Says yes to questions by their texts, and that it is a picture of a size."""

    provenance = Provenance("judge", "1", "none")

    def answers(self, picture: Image.Image, questions: list[str]) -> list[str]:
        return ["yes" if text in {"a", "c"} else "Yes" if text == "d" else "no" for text in questions]

    def scores(self, pictures: list[Image.Image]) -> list[float]:
        return [picture.width + (picture.getpixel((0, picture.height - 1)) or (0,))[0] / 100 for picture in pictures]


def test_dpg_of_a_picture_is_the_share_of_its_questions() -> None:
    measure = DpgScore(Judge())
    case = case_of(2, Question("a"), Question("b", (0,)), Question("c", (1,)), Question("d"))
    keys, values = measure.keys(case), measure(case, [toys.picture(0)] * 2)
    found = {(key.metric, key.run, key.subject): value for key, value in zip(keys, values, strict=True)}
    assert found["dpg", 1, None] == 25  # b is no, c hangs on it, d is not "yes" letter by letter
    assert found["dpg_cascading", 1, None] == 25
    assert [found["dpg_answer", 0, text] for text in ("1. a", "2. b", "3. c", "4. d")] == [100, 0, 100, 0]


def test_the_aesthetic_head_is_affine_and_sees_directions_only(tmp_path: Path) -> None:
    state = tiny_models.head_state()
    torch.save(state, tmp_path / "head.pth")
    head = load_head(tmp_path / "head.pth", 16)
    bias = head(torch.zeros(1, 16))
    folded = head(torch.eye(16)) - bias  # one vector and a number
    embeddings = torch.nn.functional.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    torch.testing.assert_close(head(embeddings), embeddings @ folded + bias)
    by_hand = embeddings
    for place in (0, 2, 4, 6, 8):
        by_hand = by_hand @ state[f"scoring_head.{place}.weight"].float().T + state[f"scoring_head.{place}.bias"].float()
    torch.testing.assert_close(head(embeddings), by_hand.squeeze(1))
    folder, picture = tiny_models.write_siglip(tmp_path / "siglip"), toys.picture(3, 60, 44)
    scorer = SiglipAesthetic(str(folder), tmp_path / "head.pth")
    model = SiglipVisionModel.from_pretrained(folder).eval()
    pixels = SiglipImageProcessorPil(size={"height": 32, "width": 32})(picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        pooled = model(pixels).pooler_output
        assert scorer.scores([picture])[0] == pytest.approx(float(head(pooled / pooled.norm())), abs=1e-4)
    with pytest.raises(ValueError, match=r"--aesthetic .*scoring_head\.0\.weight must have the shape \[12, 99\]"):
        load_head(tmp_path / "head.pth", 99)
    torch.save({"scoring_head.0.weight": torch.zeros(3, 16)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="must hold scoring_head"):
        load_head(tmp_path / "bad.pth", 16)


def test_aes_looks_at_four_pictures_as_one() -> None:
    measure = AestheticMeasure(Judge())
    pictures = [Image.new("RGB", (30, 20), (run, 0, 0)) for run in range(4)]
    case = case_of(4)
    assert [(key.metric, key.run) for key in measure.keys(case)] == [("aes", None), *(("aes_picture", run) for run in range(4))]
    assert measure(case, pictures) == pytest.approx([600.2, 300, 300.1, 300.2, 300.3])  # run 2 is at the lower left
    assert [key.metric for key in measure.keys(case_of(3))] == ["aes_picture"] * 3
    with pytest.raises(ValueError, match=r"line 3: 3\.png must have the size of 0\.png"):
        measure(case, [*pictures[:3], Image.new("RGB", (20, 20))])
