"""Stage 1: what is drawn for a candidate, how it is put into words, and what is refused."""

import json
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mosaic.config.schema import FieldError
from mosaic.evaluation.encoders import Provenance
from preprocess.construct import chats
from preprocess.construct.candidates import Candidate
from preprocess.construct.prompts import stage as stage_module
from preprocess.construct.prompts.drawing import Drawer
from preprocess.construct.prompts.settings import PromptChat, PromptsSettings
from preprocess.construct.prompts.sources import ChatSource, request
from preprocess.construct.prompts.stage import prompts_stage
from preprocess.construct.prompts.templates import read_templates
from preprocess.construct.prompts.validation import normalised, problem_of, spans_of
from preprocess.construct.rows import PromptRow
from scripts.pocket import scenes
from tests.evaluation import tiny_models

POCKET = "preprocess/construct/prompts/templates_pocket.json"
CPU = torch.device("cpu")
URL = "http://localhost:8000/v1"


def candidates(numbers: Sequence[int]) -> list[Candidate]:
    return [Candidate(number, {}, PromptRow(number=number, prompt="", caption="", subjects=(), seed=0)) for number in numbers]


def rows(numbers: Sequence[int], base_seed: int = 0, **values: Any) -> list[PromptRow]:
    stage = prompts_stage(PromptsSettings(**values), base_seed)
    return [row for row in stage.load(CPU)(candidates(numbers), Path()) if isinstance(row, PromptRow)]


def test_prompts_and_captions_of_the_shipped_file() -> None:
    found = rows(range(250), hide_looks=True, num_subjects=[1] * 6, twins=0.5)
    assert not any(row.problem for row in found)
    assert all(not problem_of(row.prompt, row.caption, [subject.phrase for subject in row.subjects]) for row in found)
    looks = [look for kind in read_templates("preprocess/construct/prompts/templates.json").looks.values() for look in kind]
    assert all(any(look in row.prompt for look in looks) and not any(look in row.caption for look in looks) for row in found)
    assert all(subject.name in subject.phrase for row in found for subject in row.subjects)
    assert len({row.prompt for row in found}) == len({row.seed for row in found}) == 250
    told = rows(range(200), twins=0.5)
    assert all(row.caption == row.prompt and not row.problem for row in told)
    assert all(any(look in subject.phrase for look in looks) for row in told for subject in row.subjects)
    assert all(sum(row.prompt.count(look) for look in looks) == len({look for look in looks if look in row.prompt}) for row in told)
    plain = rows(range(50), looks=0.0)
    assert not any(look in row.prompt for row in plain for look in looks)
    names = [[subject.name for subject in row.subjects] for row in told]
    doubled = sum(len(set(each)) < len(each) for each in names)
    assert all(len(each) - len(set(each)) <= 1 for each in names)
    assert 20 < doubled < 80  # half of those with two of one kind
    assert all(len(set(each)) == len(each) for each in ([subject.name for subject in row.subjects] for row in plain))


def test_a_row_depends_on_its_number_alone() -> None:
    whole = rows(range(40))
    assert rows([39, 7]) == [whole[39], whole[7]]
    assert rows(range(40), base_seed=1) != whole
    assert prompts_stage(PromptsSettings(), 0).load(CPU).provenance.keys() == {"templates"}


def test_pocket_prompts_are_the_captions_of_the_world() -> None:
    found = rows(range(300), templates=POCKET, num_subjects=[1] * 6)
    classes, backgrounds = Counter(), Counter()
    for row in found:
        identities = [scenes.Identity(subject.name, "", "", "") for subject in row.subjects]
        places = [background for background in scenes.BACKGROUNDS if row.prompt.endswith(background)]
        assert row.prompt == row.caption == f"{scenes.count_phrase(identities)} {places[0]}"
        classes.update(subject.name for subject in row.subjects)
        backgrounds.update(places)
    assert (set(classes), set(backgrounds)) == (set(scenes.CLASSES), set(scenes.BACKGROUNDS))


@pytest.mark.parametrize("base_seed", [0, 1])
def test_every_prefix_is_balanced(base_seed: int) -> None:
    shares = (2.0, 4.0, 2.0)
    settings = PromptsSettings(num_subjects=shares, kinds={"AH": 3, "OO": 1, "AAH": 1})
    drawer = Drawer(settings, read_templates(settings.templates), base_seed)
    wanted = {"H": 1 / 12, "A": 1 / 12, "O": 1 / 12, "HA": 3 / 8, "OO": 1 / 8, "HAA": 1 / 4}
    letters, counts, worst, orders = {"human": "H", "animal": "A", "object": "O"}, Counter(), 0.0, Counter()
    for number in range(1000):
        word = "".join(letters[subject.kind] for subject in drawer(number).subjects)
        orders[word] += 1
        counts["".join(sorted(word, key="HAO".index))] += 1
        worst = max(worst, *(abs(counts[each] - (number + 1) * share) for each, share in wanted.items()))
    assert set(counts) == set(wanted)
    assert worst < 3
    assert min(orders["HA"], orders["AH"]) > 120  # in either order


def test_shares_that_a_file_cannot_give_are_refused() -> None:
    for values, match in (
        ({"num_subjects": [0, 0]}, r"prompts\.num_subjects must hold a share above 0"),
        ({"kinds": {"HX": 1}}, r"prompts\.kinds must name combinations .* got 'HX'"),
        ({"templates": POCKET, "kinds": {"H": 1}}, r"prompts\.kinds names H, for which .*pocket\.json has too few subjects"),
        ({"kinds": {"H": 0}}, r"prompts\.num_subjects asks for 1 subjects"),
        ({"source": "chat"}, r"prompts\.chat must name a model"),
        ({"chat": PromptChat(model="a/b")}, r"prompts\.chat must name a model where .* null elsewhere"),
    ):
        with pytest.raises(FieldError, match=match):
            prompts_stage(PromptsSettings(**values), 0)


@pytest.mark.parametrize(("change", "match"), [
    ({"forms": ["{subjects}"]}, "a form must hold {subjects} and {scene} once each"),
    ({"forms": ["{subjects} {scene} {more}"]}, "no other braces"),
    ({"subjects": [{"name": "cat", "kind": "animal"}, {"name": "Cat", "kind": "object"}]}, "names 'cat' twice"),
    ({"subjects": [{"name": "cat", "kind": "plant"}]}, r"subjects\.0\.kind: "),
    ({"scenes": []}, "scenes: "), ({"more": 1}, "more: "),
])  # fmt: skip
def test_other_templates_are_refused(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text(json.dumps(json.loads(Path(POCKET).read_text()) | change))
    with pytest.raises(ValueError, match=match):
        read_templates(str(file))
    with pytest.raises(FileNotFoundError, match=r"prompts\.templates: file not found"):
        read_templates(str(tmp_path / "none.json"))


def test_what_a_prompt_must_be() -> None:
    text = "a cat with a hat and a cat-like mug on a mat"
    assert spans_of(text, ["a cat with a hat", "a cat"]) == [(0, 16), (21, 26)]
    assert spans_of(text, ["a ca"]) is spans_of(text, ["at with"]) is None
    assert spans_of("a cat", ["a cat", "cat"]) is None  # one place is not two subjects
    good = ("a cat and a mug", "the cat: a cat, a mug", ["a cat", "a mug"])
    assert problem_of(*good) == ""
    for place, value, match in (
        (0, "a mug and a cat", "in the order"), (0, "A cat and a mug", "letter by letter in the prompt"), (1, "a cat", "in the caption"),
        (2, ["a cat", "A  cat"], "differ"), (2, [], "one to 6"), (2, ["a cat"] * 7, "one to 6"), (0, " ", "one line"),
        (1, "a cat\na mug", "the caption must be one line"), (0, "a cat and a mug" + " on" * 700, "one line"), (2, ["a cat", ""], "letter by"),
    ):  # fmt: skip
        assert match in problem_of(*(value if k == place else part for k, part in enumerate(good)))  # type: ignore[arg-type]
    assert normalised("A  Cat, and a MUG!\n") == normalised("a cat and\ta mug") == "a cat and a mug"


class Scripted:
    """Answers with texts in turn; an exception is raised."""

    provenance = Provenance("scripted", "1", "none")

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), list[str]()

    def __call__(self, parts: Sequence[Any]) -> str:
        self.asked.append("\n".join(parts))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, str) else json.dumps(answer)


def written(row: Any, **changes: Any) -> dict[str, Any]:
    """A good answer for an assignment of the pocket file, which has no looks."""
    phrases = [f"the {subject.name}" for subject in row.subjects]
    text = f"{' beside '.join(phrases)} {row.scene}"
    return {"prompt": f"{text}, bright", "caption": text, "phrases": phrases} | changes


def test_a_model_is_asked_again_when_its_answer_is_none() -> None:
    settings = PromptsSettings(
        source="chat", chat=PromptChat(model="a/b"), templates=POCKET, num_subjects=[0, 1], hide_looks=True, max_attempts=4
    )
    drawer = Drawer(settings, read_templates(POCKET), 0)
    drawn = drawer(5)
    names = [subject.name for subject in drawn.subjects]
    bad = [
        "nonsense",
        written(drawn, phrases=["the dog", "the mug"]),
        written(drawn, caption="nobody"),
        written(drawn, phrases=["bright", names[1]]),
    ]
    chat = Scripted(*bad[:3], written(drawn))
    row = ChatSource(settings, chat)(5, drawn)
    assert (row.attempts, row.problem, row.seed) == (4, "", drawn.seed)
    assert [subject.name for subject in row.subjects] == names
    assert [subject.phrase for subject in row.subjects] == [f"the {name}" for name in names]
    assert (row.prompt, row.caption) == (f"{row.caption}, bright", f"the {names[0]} beside the {names[1]} {drawn.scene}")
    assert len(set(chat.asked)) == 4  # a model that answers the likeliest must be asked in other words
    assert "refused: each phrase must stand letter by letter in the prompt" in chat.asked[2]
    assert all(f"1. {names[0]}" in text and drawn.scene in text for text in chat.asked)
    row = ChatSource(settings, Scripted(*bad))(5, drawn)
    assert (row.attempts, row.prompt) == (4, "")
    assert row.problem
    assert prompts_stage(PromptsSettings(), 0).reasons(Candidate(5, {}, row)) == ["invalid_prompt"]
    with pytest.raises(OSError, match="gone"):
        ChatSource(settings, Scripted(OSError("gone")))(5, drawn)
    told = Drawer(PromptsSettings(), read_templates(PromptsSettings().templates), 0)(0)
    phrases = [f"a {subject.name}" for subject in told.subjects]
    text = " and ".join(f"{phrase} {look}" for phrase, look in zip(phrases, told.looks, strict=True))
    answer = {"prompt": text, "caption": text, "phrases": phrases}
    row = ChatSource(settings, Scripted(*[answer] * 4))(0, told)
    assert "the caption must not tell looks" in row.problem
    row = ChatSource(settings.replace(hide_looks=False), Scripted(answer | {"caption": "other"}))(0, told)
    assert (row.problem, row.caption) == ("", text)


def test_endpoints_are_asked_side_by_side_and_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    drawer = Drawer(PromptsSettings(templates=POCKET), read_templates(POCKET), 0)
    keys: list[str | None] = []
    together = threading.Barrier(4, timeout=20)

    class Endpoint(Scripted):
        def __init__(self, url: str, model: str, key: str | None, max_tokens: int) -> None:
            keys.append(key)

        def __call__(self, parts: Sequence[Any]) -> str:
            together.wait()
            number = next(n for n in range(8) if request(drawer(n)) == parts[0])
            return json.dumps(written(drawer(number)))

    monkeypatch.setattr("mosaic.evaluation.chat.EndpointChat", Endpoint)
    chat = PromptChat(model="m", url=URL, key_variable="SOME_KEY")
    settings = PromptsSettings(source="chat", chat=chat, templates=POCKET, parallel=4)
    with pytest.raises(FieldError, match=r"prompts\.chat\.key_variable names SOME_KEY, which is not set"):
        prompts_stage(settings, 0)
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    worker = prompts_stage(settings, 0).load(CPU)
    found = list(worker(candidates(range(8)), Path()))
    assert [row.number for row in found] == list(range(8))
    assert keys == ["sk-secret"]
    assert "secret" not in repr((found, worker.provenance, settings.model_dump_json()))
    for values in ({"key_variable": "sk-secret"}, {"url": "http://me:sk-secret@host/v1"}, {"url": "http://host/v1?key=sk-secret"}):
        with pytest.raises(FieldError) as caught:
            PromptChat(model="m", **values)
        assert "secret" not in str(caught.value)


def test_a_model_of_texts_is_loaded(tmp_path: Path) -> None:
    chat = PromptChat(model=str(tiny_models.write_llama(tmp_path / "llama")), max_tokens=8)
    found = rows([0], source="chat", chat=chat, max_attempts=2)
    assert (found[0].attempts, "llama: answers with something else than Written" in found[0].problem) == (2, True)
    both = tiny_models.write_llava(tmp_path / "llava")
    assert type(chats.load_chat(PromptChat(model=str(both)), CPU, torch.float32, pictures=False)).__name__ == "LocalChat"


def test_the_stage_is_named_as_its_section() -> None:
    assert prompts_stage(PromptsSettings(), 0).name == stage_module.NAME == PromptsSettings.path
