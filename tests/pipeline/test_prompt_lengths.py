"""Prompts and captions that are longer than the model reads: which words are lost is said before work, and nowhere in a progress bar."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import inference
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.pipeline.prompt_lengths import TextWindow, cut_captions
from tests import runs, tiny

LONG = "a cat on the beach and " * 3 + "a mug"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write_world(tmp_path_factory.mktemp("world"))
    (folder / "config.json").write_text(json.dumps(runs.settings(folder, folder / "unused")))
    return folder


def read_whole(tokenizer: Any, prompt: str, length: int) -> str:
    """What T5 reads, by its own truncation."""
    return tokenizer.decode(tokenizer(prompt, truncation=True, max_length=length).input_ids, skip_special_tokens=True)


@pytest.mark.parametrize("length", [1, 2, 5, 9, 24])
def test_the_words_are_those_that_the_tokenizer_cuts_off(world: Path, length: int) -> None:
    """Kept and lost words are the whole prompt; half a word that is kept counts as lost."""
    tokenizer = tiny.tokenizers()[1]
    for prompt in ("a cat", "a cat and a mug on the beach", "a zebra, and a cat", "  a   cat\non the beach ", LONG):
        for window in (TextWindow.of_model(str(world / "model"), length), TextWindow.of_tokenizer(tokenizer, length)):
            lost = window.lost(prompt)
            kept = read_whole(tokenizer, prompt, length).split()
            words = prompt.split()
            if lost is None:
                assert len(tokenizer(prompt).input_ids) <= length
                assert kept == words
                continue
            assert lost.num_tokens == len(tokenizer(prompt).input_ids) > length == lost.text_length
            count = len(lost.words.split())
            assert words[len(words) - count :] == lost.words.split()
            assert kept[: len(words) - count] == words[: len(words) - count]
            assert len(kept) - (len(words) - count) <= 1  # at most half a word more


def test_words_alone_find_what_is_lost_for_certain() -> None:
    window = TextWindow.of_words(4)
    assert window.lost("one two three") is None
    assert str(window.lost(" one two  three four five")) == (
        'has at least 6 tokens of T5, of which 4 are read: its last 2 words are lost: "four five"'
    )


def test_one_token_more_is_said_and_none_is_not(world: Path) -> None:
    total = len(tiny.tokenizers()[1]("a cat on the beach").input_ids)
    assert TextWindow.of_model(str(world / "model"), total).lost("a cat on the beach") is None
    lost = TextWindow.of_model(str(world / "model"), total - 1).lost("a cat on the beach")
    assert str(lost) == f'has {total} tokens of T5, of which {total - 1} are read: its last word is lost: "beach"'


def test_a_tokenizer_without_its_usual_file_is_read_by_its_class(world: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_2").mkdir()
    (tmp_path / "tokenizer_2/tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        TextWindow.of_model(str(tmp_path), 24)
    with pytest.raises(FileNotFoundError, match="has no folder tokenizer_2"):
        TextWindow.of_model(str(world), 24)


def test_the_check_the_run_and_the_manifest_say_it(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = world / "long.json"
    entries = [{"prompt": "a cat", "image_paths": ["reference_0.png"]}, {"prompt": LONG, "image_paths": ["reference_0.png"]}]
    path.write_text(json.dumps(entries))
    lost = TextWindow.of_model(str(world / "model"), runs.settings(world, world)["model"]["text_length"]).lost(LONG)
    assert lost is not None
    assert lost.words.endswith("mug")
    for more in (["--check"], [], []):
        assert inference.main(["--config", str(world / "config.json"), "--cases", str(path), "--output-dir", str(tmp_path), *more]) == 0
        err = capfd.readouterr().err
        assert f"note: {path}[1]: its prompt {lost} (model.text_length).\n" in err
        assert f"{path}[0]" not in err
        assert err.count(lost.words[-20:]) == 1
        assert "truncated" not in err
        assert "sequence length" not in err
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()] == []  # in the progress bar
    assert [row.get("lost_words") for row in rows] == [None, lost.words]
    assert "lost_words" not in rows[0]


def test_a_call_warns_and_a_command_does_not(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = MosaicFluxPipeline.from_pretrained(world / "model")
    with caplog.at_level(logging.WARNING):
        pipeline.encoders.encode_prompts(["a cat", LONG], 12)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.name == "mosaic.pipeline.encoders"
    assert record.getMessage().startswith(f'prompt "{LONG[:70]}')
    assert "of which 12 are read: its last " in record.getMessage()
    assert record.getMessage().endswith('a mug"') or "..." in record.getMessage()


def test_captions_of_a_data_set(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window = TextWindow(Tokenizer.from_file(str(world / "model/tokenizer_2/tokenizer.json")).encode, 12)
    captions = [("one", "a cat"), ("two", LONG), ("three", "a mug"), (None, LONG)]
    found = cut_captions(window, captions)
    assert (found.looked_at, [name for name, _ in found.cut]) == (4, ["two", "sample 3"])
    assert str(found).startswith("2 of 4 captions are longer than model.text_length 12 and are cut, the longest has ")
    assert "two has " in str(found)
    assert str(cut_captions(window, captions[:1])) == "all 1 captions that were looked at are read whole."
    assert cut_captions(window, []).looked_at == 0
    monkeypatch.setattr("mosaic.pipeline.prompt_lengths.MOST_CAPTIONS", 2)
    assert cut_captions(window, captions).looked_at == 2
