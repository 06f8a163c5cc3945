"""The look at samples, caches, batches and checkpoint before a run: what it stops, training stops with the same words."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, PartialState

from mosaic.data import Manifest
from mosaic.planning.data_checks import DataFacts, look_at_data
from mosaic.planning.findings import NOTE, OK, STOP, Findings
from mosaic.planning.model_shape import FLUX_DEV_SHAPE, read_model_shape
from mosaic.training import Trainer, train
from preprocess import cache
from tests import runs

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def cached(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the world with both caches; not to be changed."""
    folder = Path(shutil.copytree(world, tmp_path_factory.mktemp("cached") / "world"))
    values = runs.settings(folder, folder / "run")
    values["data"] |= {"latent_cache": str(folder / "latents"), "text_cache": str(folder / "text")}
    (folder / "config.json").write_text(json.dumps(values))
    assert cache.main([str(folder / "config.json"), "--device", "cpu"]) == 0
    PartialState._reset_state()
    return folder


@pytest.fixture
def place(cached: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy that may be damaged, under the same path, since caches know their model by its files."""
    yield Path(shutil.copytree(cached, tmp_path / "world"))
    AcceleratorState._reset_state(reset_partial_state=True)


def look(place: Path, processes: int = 1, checkpoint: Path | None = None, **changes: Any) -> tuple[DataFacts, Findings]:
    config = runs.make_config(place, place / "run", **changes)
    return look_at_data(config, read_model_shape(config.model.pretrained), processes, checkpoint)


def caches_of(place: Path) -> dict[str, str]:
    return {"data__latent_cache": str(place / "latents"), "data__text_cache": str(place / "text")}


def test_all_is_well(place: Path) -> None:
    facts, findings = look(place, **caches_of(place), validation__every=2)
    subjects = ["data.root", "validation.split", "data.latent_cache", "data.text_cache", "points", "placement", "batches"]
    assert [(finding.level, finding.subject) for finding in findings] == [(OK, subject) for subject in subjects]
    assert facts == DataFacts(max_references=2, num_samples=9, num_prompts=2, steps_per_epoch=4)
    assert findings[0].message == '9 samples in the split "train", up to 2 references.'
    assert findings[-1].message == "4 steps per epoch."


def test_the_data_is_opened_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = runs.count_made(Manifest, monkeypatch)
    facts, findings = look(place, validation__every=2)
    assert (facts.num_samples, findings[1].message) == (9, '4 samples in the split "heldout", up to 2 references.')
    assert opened == [str(place / "data")]
    opened.clear()
    trainer = Trainer(runs.make_config(place, place / "run", validation__every=2))
    assert opened == [str(place / "data")]
    assert trainer.held_out is not None
    assert trainer.held_out.sample_ids() == list(Manifest(place / "data", "heldout").column("id"))
    assert len(trainer.dataset) == 9


def test_a_split_that_is_not_there_says_so_and_the_other_is_looked_at(place: Path) -> None:
    _, findings = look(place, validation__every=2, data__split="none")
    assert [finding.level for finding in findings] == [STOP, OK]
    assert 'has no sample of the split "none"' in findings[0].message
    _, findings = look(place, validation__every=2, validation__split="none")
    assert [finding.level for finding in findings][:2] == [OK, STOP]
    assert 'has no sample of the split "none"' in findings[1].message


def test_captions_that_are_cut_are_told_by_the_look_and_by_the_start(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ "a cat and a mug" has 6 tokens and its end, "two fish on the beach" one token a word and more."""
    _, findings = look(place, model__text_length=5)
    (found,) = [finding for finding in findings if finding.subject == "captions"]
    assert found.level == NOTE
    assert found.message.startswith("9 of 9 captions are longer than model.text_length 5 and are cut, the longest has ")
    assert 'train-0 has 6 tokens of T5, of which 5 are read: its last word is lost: "mug"' in found.message
    with caplog.at_level("WARNING"):
        Trainer(runs.make_config(place, place / "run", model__text_length=5))
    assert [record.getMessage() for record in caplog.records if "captions" in record.getMessage()] == [found.message]
    caplog.clear()
    Trainer(runs.make_config(place, place / "run"))
    assert "captions" not in caplog.text
    assert all(finding.subject != "captions" for finding in look(place)[1])


def remove_points(place: Path) -> None:
    shutil.rmtree(place / "data/points")


def unfinished(place: Path) -> None:
    (place / "latents/names.parquet").unlink()


def another_prompt(place: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = place / "data/manifest.parquet"
    table = pq.read_table(file)
    prompts = ["a fish at home", *table["prompt"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index("prompt"), "prompt", pa.array(prompts)), file)


def nothing(place: Path) -> None:
    pass


STOPPED: dict[str, tuple[Callable[[Path], None], dict[str, Any], bool, str, str]] = {
    "no data": (lambda place: shutil.rmtree(place / "data"), {}, False, "data.root", "there is no such folder"),
    "too many references": (nothing, {"data__max_references": 1}, False, "data.root", "must be at most 1"),
    "no points": (remove_points, {}, False, "points", "only 0 of 15 references"),
    "no cache": (lambda place: shutil.rmtree(place / "text"), {}, True, "data.text_cache", "there is no cache in"),
    "an unfinished cache": (unfinished, {}, True, "data.latent_cache", "is not finished"),
    "a stale cache": (nothing, {"model__text_length": 5}, True, "data.text_cache", "is stale"),
    "a prompt that is not cached": (another_prompt, {}, True, "data.text_cache", "lacks 1 of"),
    "a large batch": (nothing, {"training__batch_size": 10}, False, "batches", "must be at most the number of samples, 9, got 10"),
}


@pytest.mark.parametrize("kind", STOPPED)
def test_what_is_stopped(place: Path, kind: str) -> None:
    damage, changes, uses_caches, subject, message = STOPPED[kind]
    changes = changes | (caches_of(place) if uses_caches else {})
    damage(place)
    _, findings = look(place, **changes)
    (stopped,) = [finding for finding in findings if finding.level == STOP]
    assert stopped.subject == subject
    assert message in stopped.message
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        train(runs.make_config(place, place / "run", **changes))
    assert str(caught.value) == stopped.message


def test_the_processes_count(place: Path) -> None:
    assert look(place, processes=4)[1][-1].level == OK
    assert "x 5 processes must be at most the number of samples" in look(place, processes=5)[1][-1].message


def test_a_checkpoint_of_another_config(place: Path) -> None:
    train(runs.make_config(place, place / "run", training__max_steps=1))
    checkpoint = place / "run/checkpoints/step_00000001"
    assert look(place, checkpoint=checkpoint)[1][-1].message == "step_00000001 is of this config."
    for processes, changes, message in (
        (1, {"optimizer__learning_rate": 0.5}, "optimizer.learning_rate was 0.01, is 0.5"),
        (2, {}, "x processes was 2, is 4"),
        (1, {"data__split": "heldout"}, "the data set had 9 samples, has 4"),
    ):
        finding = look(place, processes, checkpoint, **changes)[1][-1]
        assert (finding.level, finding.subject) == (STOP, "--resume")
        assert message in finding.message
    assert look(place, 2, checkpoint, training__batch_size=1)[1][-1].level == OK


def test_samples_that_cannot_be_read_are_left_to_the_start(place: Path) -> None:
    facts, findings = look(place, data__skip_invalid=True)
    assert [finding.level for finding in findings] == [OK, NOTE]
    next((place / "data").rglob("train-3_target*")).write_bytes(b"no picture")
    train(runs.make_config(place, place / "run", data__skip_invalid=True, training__max_steps=1))
    facts, findings = look(place, checkpoint=place / "run/checkpoints/step_00000001", data__skip_invalid=True)
    assert [finding.level for finding in findings] == [OK] * 6
    assert findings[1].message == "8 can be read."
    assert facts.steps_per_epoch == 3


def test_a_model_that_is_not_at_hand(place: Path) -> None:
    """Caches are then held against the samples and the config, not against the model."""
    hub = {"model__pretrained": "black-forest-labs/FLUX.1-dev", "data__image_size": [64, 64], "data__reference_size": 32}
    file = place / "latents/cache.json"
    description = json.loads(file.read_text())

    def levels(**changes: Any) -> dict[str, str]:
        config = runs.make_config(place, place / "run", **caches_of(place), **hub, **changes)
        return {finding.subject: finding.level for finding in look_at_data(config, FLUX_DEV_SHAPE, 1, None)[1]}

    assert levels()["data.latent_cache"] == STOP  # of other sizes
    description["encoding"] |= {"target_sizes": [[64, 64]], "reference_size": 32}
    file.write_text(json.dumps(description))
    found = levels()
    assert found["data.latent_cache"] == found["data.text_cache"] == OK
    config = runs.make_config(place, place / "run", **caches_of(place), **hub)
    messages = [finding.message for finding in look_at_data(config, FLUX_DEV_SHAPE, 1, None)[1]]
    assert "whether they are of this model shows when training starts" in messages[1]
    assert levels(model__text_length=9)["data.text_cache"] == STOP
    for encoding in (None, [1], {}):
        file.write_text(json.dumps({**description, "encoding": encoding}))
        assert levels()["data.latent_cache"] == STOP
    file.unlink()
    assert levels()["data.latent_cache"] == STOP


@pytest.mark.parametrize("text", ["{", "[]\n", '{"index": 1}\n'])
def test_a_damaged_list_of_skipped_samples(place: Path, text: str) -> None:
    (place / "run").mkdir()
    (place / "run/skipped.jsonl").write_text(text)
    assert look(place, data__skip_invalid=True)[1][-1].level == NOTE  # a new run makes its own
    finding = look(place, checkpoint=place / "run/checkpoints/step_00000001", data__skip_invalid=True)[1][-1]
    assert (finding.level, finding.subject) == (STOP, "data.skip_invalid")
    assert "skipped.jsonl" in finding.message


def test_a_released_data_set_without_its_index(tmp_path: Path, place: Path) -> None:
    options = {"data__format": "semalign", "data__root": str(tmp_path / "set"), "data__image_size": [16, 16]}
    assert look(place, **options)[1] == [(STOP, "data.root", f"data.root: no such file or folder: {tmp_path / 'set'}.")]
    (tmp_path / "set").mkdir()
    assert "lacks the folder data with the Parquet files" in look(place, **options)[1][0].message
    (tmp_path / "set/data").mkdir()
    facts, findings = look(place, **options)
    assert findings[0].message.endswith("the index of sample ids is made or completed when training starts.")
    assert facts.num_samples is None
    (tmp_path / "set/semalign_ids.parquet").write_bytes(b"damaged")
    assert look(place, **options)[1][0].level == STOP
