"""The judge that looks: what it is asked, how answers are read, and that it goes on where it stopped."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from PIL import Image

from mosaic.evaluation import chat as chat_module
from mosaic.evaluation.chat import EndpointChat, LocalChat, LocalTextChat, ask
from mosaic.evaluation.encoders import Provenance
from mosaic.evaluation.judging import Judge, Opinion
from mosaic.evaluation.records import Key
from mosaic.evaluation.scoring import score
from scripts.bench import models as bench_models
from scripts.bench.command import main
from tests.evaluation import tiny_models, toys
from tests.evaluation.test_scoring import listed_at

GOOD = {"prompt_following": 7, "subjects": [{"present": True, "fidelity": 4}]}


class Scripted:
    """Answers from a list, and keeps what it was asked."""

    provenance = Provenance("scripted", "1", "none")

    def __init__(self, *answers: object) -> None:
        self.answers, self.asked = list(answers), []

    def __call__(self, parts: list[Any]) -> str:
        self.asked.append(parts)
        answer = self.answers.pop(0)
        return answer if isinstance(answer, str) else json.dumps(answer)


def two(**changes: Any) -> dict:
    return {"prompt_following": 9, "subjects": [{"present": True, "fidelity": 8}, {"present": False, "fidelity": 0}]} | changes


@pytest.mark.usefixtures("fresh_accelerator")
def test_points_become_records_and_are_kept(tmp_path: Path) -> None:
    lines = toys.write_benchmark(tmp_path)
    listed = listed_at(lines)
    scripted = Scripted(*[GOOD] * 6, two())  # the last case has two subjects, and is stopped before its second picture
    with pytest.raises(IndexError):
        score(listed.entries, [Judge(scripted)], tmp_path / "s", PartialState(cpu=True))
    again = Scripted(two(), two())
    values = {record.key: record.value for record in score(listed.entries, [Judge(again)], tmp_path / "s", PartialState(cpu=True))}
    assert len(again.asked) == 2  # what was known was not asked again
    case = listed.entries[-1].case
    assert values[Key("judge_prompt", case, 1)] == 90
    assert (values[Key("judge_fidelity", case, 1, "cat")], values[Key("judge_present", case, 1, "mug")]) == (80, 0)
    text, *pictures, form = again.asked[0]
    assert "1: cat, 2: mug" in text
    assert listed.entries[-1].prompt in text
    assert [picture.size for picture in pictures] == [(40, 40)] * 3
    assert "prompt_following" in form


@pytest.mark.parametrize("answer", [
    "no JSON", "{", GOOD | {"prompt_following": 11}, GOOD | {"prompt_following": 7.5}, GOOD | {"more": 1}, GOOD | {"subjects": []}, '["a"]',
])  # fmt: skip
def test_other_answers_are_refused(answer: object) -> None:
    with pytest.raises(ValueError, match="scripted: answers with something else than Opinion"):
        ask(Scripted(answer), ["?"], Opinion)


def test_an_answer_in_prose_is_read() -> None:
    assert ask(Scripted(f"Here it is:\n```json\n{json.dumps(GOOD)}\n```"), ["?"], Opinion).prompt_following == 7


def test_answers_about_other_subjects_are_refused(tmp_path: Path) -> None:
    [entry, *_] = listed_at(toys.write_benchmark(tmp_path)).entries
    with pytest.raises(ValueError, match=r"pictures\.jsonl:1: scripted was asked about 1 subjects and answers about 2"):
        Judge(Scripted(two()))([entry], [toys.picture(1)])


def test_an_endpoint_is_asked_with_pictures_at_temperature_0(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def answer(messages: list[dict], **options: Any) -> SimpleNamespace:
        asked.update(options, content=messages[0]["content"])
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=json.dumps(GOOD)))])

    chat = EndpointChat("http://localhost:8000/v1", "judge", "secret")
    monkeypatch.setattr(chat.client, "chat_completion", answer)
    assert ask(chat, ["look", toys.picture(1)], Opinion).subjects[0].fidelity == 4
    assert (asked["model"], asked["temperature"]) == ("judge", 0)
    assert [part["type"] for part in asked["content"]] == ["text", "image_url", "text"]
    assert asked["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert "secret" not in str(chat.provenance)


def test_a_model_of_transformers_answers_after_the_prompt(tmp_path: Path) -> None:
    chat = LocalChat(str(tiny_models.write_llava(tmp_path / "llava")), dtype=torch.float32)
    assert chat(["a cat", Image.new("RGB", (20, 20)), toys.picture(2)]) == "Yes . no"


def test_a_model_of_texts_answers_after_the_prompt(tmp_path: Path) -> None:
    chat = LocalTextChat(str(tiny_models.write_llama(tmp_path / "llama")), dtype=torch.float32)
    assert chat(["a cat", "is there"]) == "Yes . no"
    with pytest.raises(ValueError, match="llama: reads texts only"):
        chat(["a cat", toys.picture(2)])
    tokenizer = tmp_path / "llama" / "chat_template.jinja"
    tokenizer.unlink()
    with pytest.raises(ValueError, match="--model: .*llama has no chat template"):
        LocalTextChat(str(tmp_path / "llama"))


def failing(status: int | None, text: str) -> Exception:
    error = RuntimeError(text)
    if status is not None:
        error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(("status", "tries"), [(None, 4), (503, 4), (429, 4), (401, 1), (400, 1)])
def test_an_endpoint_that_fails_is_asked_again_and_its_key_is_not_told(
    status: int | None, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(chat_module.time, "sleep", waited.append)
    chat, asked = EndpointChat("http://localhost:8000/v1", "judge", "secret"), []

    def fail(*arguments: Any, **options: Any) -> None:
        asked.append(options)
        raise failing(status, f"{'x' * 280} no such key: secret")

    monkeypatch.setattr(chat.client, "chat_completion", fail)
    with pytest.raises(OSError, match="endpoint http://localhost:8000/v1 failed") as caught:
        chat(["?"])
    assert (len(asked), waited) == (tries, [2, 8, 32][: tries - 1])
    assert "secr" not in str(caught.value)
    assert caught.value.__cause__ is None
    monkeypatch.setattr(chat.client, "chat_completion", lambda *_, **__: SimpleNamespace(choices=[]))
    assert chat(["?"]) == ""


def test_an_endpoint_without_a_key_is_not_sent_that_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sent = []
    chat = EndpointChat("http://localhost:8000/v1", "judge")

    def post(request: Any, **options: Any) -> bytes:
        sent.append(str(request.headers))
        return json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode()

    monkeypatch.setattr(chat.client, "_inner_post", post)
    assert chat(["?"]) == "yes"
    assert "hf_secret" not in sent[0]


@pytest.mark.usefixtures("fresh_accelerator")
def test_the_command_asks_an_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    keys: list[str | None] = []

    def build(url: str, model: str, key: str | None) -> Scripted:
        keys.append(key)
        return Scripted(*[GOOD] * 6, two(), two())

    monkeypatch.setattr(bench_models, "EndpointChat", build)
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    flags = ["--pictures", str(toys.write_benchmark(tmp_path)), "--metrics", "dino", "--dino", str(toys.write_dino(tmp_path / "dino"))]
    command = ["score", "dreambench", *flags, "--output", str(tmp_path / "s"), "--device", "cpu", "--judge-url", "http://localhost"]
    assert main(command) == 2
    assert "--judge-url needs --judge" in capsys.readouterr().err
    assert main([*command, "--judge", "model"]) == 0
    written = "".join(path.read_text() for path in (tmp_path / "s").iterdir())
    scores = json.loads((tmp_path / "s" / "scores.json").read_text())
    # of the blocks cat, mug and cat+mug
    assert scores["judge_prompt"] == pytest.approx((70 + 70 + 90) / 3)
    assert scores["judge_present"] == pytest.approx((100 + 100 + 50) / 3)
    assert scores["models"]["judge_fidelity"]["model"] == "scripted"
    assert (keys, "secret" in written) == (["secret"], False)
