"""The page without a browser: uploads, the form, runs, sessions, the state over a reload, the HTML, the guard; Gradio only where said."""

import asyncio
import hashlib
import io
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import inference
from mosaic.config.loading import Config, load_config
from mosaic.images import PreparedReference, decode_image
from mosaic.pipeline.prompt_lengths import TextWindow
from mosaic.rendering.cases.reading import load_cases
from mosaic.rendering.recipe import KEY, read_recipe
from mosaic.rendering.recipes import case_jobs, shared_recipe
from mosaic.reports.html import environment
from scripts.app import command as app
from scripts.app import handlers as app_handlers
from scripts.app import sessions as app_sessions
from scripts.app import state as app_state
from scripts.app import studio as app_studio
from scripts.app import uploads as app_uploads
from scripts.app import views as app_views
from scripts.app.calls import Calls
from scripts.app.examples import Example, load_examples
from scripts.app.form import Form, plan_picture, size_limits
from scripts.app.handlers import Handlers
from scripts.app.listeners import Listeners
from scripts.app.sessions import MAX_PICTURES, MAX_SESSIONS, Session, Sessions, Shown
from scripts.app.studio import CANCELLED, DONE, FAILED, WAITING, Run, Studio
from scripts.app.uploads import MAX_REFERENCES, Upload, read_upload, take_uploads
from tests import tiny
from tests.icc import rgb_profile
from tests.recipes import entry, make_recipe

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a" * 48
SIZE, SCALE = 32, 0.9


def png(colour: tuple[int, int, int] = (200, 0, 0), size: tuple[int, int] = (24, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def upload(name: str = "bag.png", colour: tuple[int, int, int] = (200, 0, 0)) -> Upload:
    data = png(colour)
    prepared = PreparedReference.make(decode_image(data, name), SIZE, SCALE)
    return Upload(name, hashlib.sha256(data).hexdigest(), prepared, "data:,")


def form(**changes: Any) -> Form:
    usual = {"seed": 3, "height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0, "image_guidance_scale": 1.0}
    return Form(**(usual | {"prompt": "a cat", "names": ("",), "strengths": (1.0,)} | changes))


def shown(session: Session) -> Shown:
    """What a page remembers of the references that it was given."""
    return tuple(reference.identity for reference in session.references)


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(ROOT / "configs/pocket.json", [f'inference.cases="{ROOT / "example_cases.json"}"', "inference.height=32"])


@pytest.fixture
def studio(config: Config) -> Iterator[Studio]:
    """The engine with a tiny random model; sizes of a token are 4 px."""
    shared = shared_recipe(config, "model", "lora", "cpu")
    studio = Studio(tiny.build_pipeline(), config, shared)
    yield studio
    studio.close()


# uploads


def test_files_are_read_checked_and_removed(tmp_path: Path) -> None:
    good, text, empty = tmp_path / "good.png", tmp_path / "text.png", tmp_path / "empty.png"
    good.write_bytes(png())
    text.write_text("hello")
    empty.touch()
    taken = take_uploads([text, good, empty, tmp_path / "gone.png"], 6, SIZE, SCALE)
    assert [item.name for item in taken.uploads] == ["good.png"]
    assert taken.uploads[0].sha256 == hashlib.sha256(png()).hexdigest()
    expected = PreparedReference.make(decode_image(png(), "good.png"), SIZE, SCALE)
    assert taken.uploads[0].prepared.picture.tobytes() == expected.picture.tobytes()
    assert taken.problems == [
        "the file cannot be decoded as a picture: text.png (no known picture format). Save it in a format that can be read: "
        "PNG, JPEG, WEBP, AVIF, GIF, BMP, TIFF, PPM, JPEG2000, TGA, ICO.",
        "the picture file is empty (0 bytes): empty.png. Save or download it again.",
        "gone.png: the upload was lost (No such file or directory). Drop the picture again.",
    ]
    assert list(tmp_path.iterdir()) == []


def test_files_are_limited_in_number_bytes_pixels_and_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_uploads, "MAX_BYTES", 2**20)
    monkeypatch.setattr(app_uploads, "MAX_PIXELS", 10_000)
    pictures = {"big.png": png() + bytes(2**20), "wide.png": png(size=(101, 100)), "line.png": png(size=(3000, 1)), "fits.png": png()}
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "over.png").write_bytes(png())
    taken = take_uploads([tmp_path / name for name in (*pictures, "over.png")], 1, SIZE, SCALE)
    assert [item.name for item in taken.uploads] == ["fits.png"]
    big, wide, line, over = taken.problems
    assert big == "big.png: must have at most 1 MiB. Make it smaller."
    assert "wide.png (it has 101 x 100 pixels, more than 0.01 million; make it smaller)" in wide
    assert line.startswith("line.png: the subject is too narrow")
    assert over == "over.png: there are at most 6 references. Remove one first."
    assert list(tmp_path.iterdir()) == []


def test_files_are_removed_after_an_error_of_ours_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.setattr(app_uploads, "read_upload", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        take_uploads([tmp_path / "a.png"], 6, SIZE, SCALE)
    assert list(tmp_path.iterdir()) == []


def test_the_same_file_may_come_twice(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    taken = take_uploads([tmp_path / "a.png"] * 3, 2, SIZE, SCALE)
    assert len(taken.uploads) == 2
    assert taken.problems == ["a.png: there are at most 6 references. Remove one first."]
    assert list(tmp_path.iterdir()) == []


def test_names_of_files_are_short_and_printable() -> None:
    assert app_uploads.file_name(Path("/x/a\nb\u202e.png")) == "a?b?.png"
    assert app_uploads.file_name(Path("y" * 200 + ".png")) == "y" * 56 + ".png"


# the form


def test_a_form_gives_the_recipe_of_the_same_case(config: Config) -> None:
    """Prompt, pictures and settings of an example, as the page fills them in: the digest is that of inference.py."""
    shared = shared_recipe(config, "model", "lora", "cpu")
    examples, problems = load_examples(config)
    assert problems == []
    assert len(examples) == 10
    example = examples[4]
    state = app_state.example_state(example, config)
    job = plan_picture(app_state.make_form(state, len(example.uploads)), example.uploads, 7, config, shared, 4)
    expected = case_jobs(load_cases(ROOT / "example_cases.json", SIZE)[4], config, shared, 4, {})[0]
    assert job.recipe.digest == expected.recipe.digest
    assert job.recipe.references == expected.recipe.references
    assert job.name == "case_007"


def test_named_references_and_strengths(config: Config) -> None:
    uploads = [upload("same.png"), upload("same.png", (0, 0, 200))]
    given = form(prompt="a <red bag> beside a < mug >", names=("red bag", " mug "), strengths=(1.0, 0.5))
    recipe = plan_picture(given, uploads, 0, config, shared_recipe(config, "model", "lora", "cpu"), 4).recipe
    assert recipe.prompt == "a red bag beside a mug"
    assert [(entry.file, entry.name, entry.strength) for entry in recipe.references] == [
        ("same.png", "red bag", 1.0),
        ("same.png", "mug", 0.5),
    ]
    assert [entry.sha256 for entry in recipe.references] == [item.sha256 for item in uploads]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "Prompt: is empty. Write what the picture shall show."),
        ({"prompt": ""}, "Prompt: is empty. Write what the picture shall show."),
        ({"prompt": "x" * 10_001}, "Prompt: must have at most 10000 letters, got 10001."),
        ({"prompt": "a <bag>"}, 'Prompt: <bag> names no reference. Write "bag" into the name field of its picture.'),
        ({"prompt": "a <bag>", "names": ("mug",)}, "Prompt: <bag> names no reference of this case. The names here: mug."),
        (
            {"names": ("mug",)},
            "Prompt: must use every name, but <mug> is missing: write it into the prompt, or give that reference no name.",
        ),
        ({"names": ("<b>",)}, 'Reference 1, name: must be made of letters, digits, spaces and hyphens, got "<b>".'),
        ({"strengths": (-1.0,)}, "Reference 1, strength: must be a number"),
        ({"seed": None}, "Seed: is empty. Enter a number."),
        ({"seed": -1}, "Seed: must be an integer of at least 0 and less than 9.22337e+18, got -1."),
        ({"height": 30}, "Size: height and width must be positive multiples of the token size 8 px, got 30 x 32. Nearest: 32 x 32."),
        ({"width": 4096}, "Width: must be at most 128 on this page, got 4096. Larger ones: inference.py."),
        ({"num_inference_steps": 101}, "Steps: must be at most 100 on this page, got 101."),
        ({"guidance_scale": -2.0}, "Guidance: must be a number of at least 0 and at most 100, got -2.0."),
    ],
)
def test_mistakes_name_the_field(config: Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        plan_picture(form(**changes), [upload()], 0, config, shared_recipe(config, "model", "lora", "cpu"), 4)


def test_size_limits_are_whole_tokens(config: Config) -> None:
    assert size_limits(config, 4) == (16, 128, 8)
    assert size_limits(load_config(ROOT / "configs/flux_dev.json"), 8) == (256, 1024, 16)


# the engine


def wait_for(run: Run, seconds: float = 60) -> Run:
    end = time.monotonic() + seconds
    while not run.ended and time.monotonic() < end:
        run.wait(1)
    return run


def test_a_run_renders_what_the_pipeline_renders(studio: Studio) -> None:
    given = form(names=("", ""), strengths=(1.0, 1.0))
    uploads = [upload(), upload("b.png", (0, 0, 200))]
    run = wait_for(studio.submit(given, uploads, 0))
    assert (run.state, run.error, run.step) == (DONE, "", 2)
    expected = tiny.build_pipeline()(
        "a cat",
        [decode_image(png(colour), "x") for colour in ((200, 0, 0), (0, 0, 200))],
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        reference_size=SIZE,
        max_sequence_length=24,
    )
    assert run.result.picture.tobytes() == expected.images[0].tobytes()
    assert run.result.panel is not None
    assert len(run.result.numbers["leakage"]) == len(run.result.numbers["owned"]) == 2


def test_runs_without_references_or_attention(studio: Studio) -> None:
    bare, quiet = studio.submit(form(names=(), strengths=()), [], 0), studio.submit(form(), [upload()], 1, with_attention=False)
    for run in (wait_for(bare), wait_for(quiet)):
        assert (run.state, run.error) == (DONE, "")
        assert run.result.panel is None


def test_strength_reaches_the_pipeline(studio: Studio) -> None:
    plain, weak = (wait_for(studio.submit(form(strengths=(s,)), [upload()], 0, with_attention=False)) for s in (1.0, 0.0))
    assert plain.result.picture.tobytes() != weak.result.picture.tobytes()
    assert weak.job.recipe.references[0].strength == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("inference.memory=48gb", 'inference.memory must be "none" or "80gb" for the page'),
        ("inference.step_cache=first_block", 'inference.step_cache must be "none" for the page, which shows attention, got "first_block".'),
    ],
)
def test_settings_that_the_page_cannot_have(setting: str, message: str) -> None:
    config = load_config(ROOT / "configs/pocket.json", [setting, *inference.pocket_inputs()])
    with pytest.raises(ValueError, match=re.escape(message)):
        Studio.load(config, torch.device("cpu"))


def test_auto_is_the_preset_that_keeps_the_text_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs/pocket.json", ["inference.memory=auto", *inference.pocket_inputs()])
    monkeypatch.setattr(app_studio, "free_memory", lambda _: 2**33)
    assert app_studio.with_memory(config, torch.device("cpu")).inference.memory == "80gb"
    monkeypatch.setattr(app_studio, "free_memory", lambda _: 2**20)
    with pytest.raises(ValueError, match=r"none of the presets fits 1 MiB .* and 4 references \(80gb .* set inference\.quantization=int8"):
        Studio.load(config, torch.device("cpu"))


def test_a_prompt_that_is_cut_is_told_with_the_picture(config: Config) -> None:
    window = TextWindow.of_model(str(ROOT / "assets/pocket/flux"), 6)
    shared = shared_recipe(config, "model", "lora", "cpu")
    studio = Studio(tiny.build_pipeline(), config, shared, window)
    handlers, session = Handlers(studio, SimpleNamespace()), SimpleNamespace(keep=lambda rendered: rendered)
    looks = {}
    for prompt in ("a cat", "a cat on the beach and a mug"):
        run = studio.submit(form(prompt=prompt, names=(), strengths=()), [], 0, with_attention=False)
        looks[prompt] = list(handlers.watch("page", session, run))
    studio.close()
    words = "The prompt has 9 tokens of T5, of which 6 are read: its last 3 words are lost"
    assert all(words in look.status for look in looks["a cat on the beach and a mug"])
    assert not any("tokens" in look.status for look in looks["a cat"])


def test_references_need_a_reference_lora(config: Config) -> None:
    studio = Studio(tiny.build_pipeline(), config, shared_recipe(config, "model", None, "cpu"))
    with pytest.raises(ValueError, match="without a reference LoRA and sees none. Start the page with --lora"):
        studio.submit(form(), [upload()], 0)
    studio.close()


class Stuck:
    """Stands in for a pipeline: every step waits to be let go."""

    encoders = SimpleNamespace(vae_scale_factor=4)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.step, self._interrupt, self.calls, self.started = threading.Semaphore(0), False, [], threading.Event()

    def __call__(self, prompt: list[str], *_: object, num_inference_steps: int, callback_on_step_end: Any, **__: object) -> Any:
        self._interrupt = False
        self.calls += prompt
        self.started.set()
        for step in range(num_inference_steps):
            if not self._interrupt:
                assert self.step.acquire(timeout=60)
                callback_on_step_end(self, step, None, {})
        if prompt == ["fail"]:
            raise RuntimeError("something\nbroke")
        return type("Output", (), {"images": [Image.new("RGB", (8, 8))], "attention": None})


@pytest.fixture
def stuck(config: Config) -> Iterator[tuple[Studio, Stuck]]:
    pipeline = Stuck()
    studio = Studio(pipeline, config, shared_recipe(config, "model", "lora", "cpu"))
    yield studio, pipeline
    for _ in range(1000):
        pipeline.step.release()
    studio.close()


def submit(studio: Studio, prompt: str = "a cat") -> Run:
    return studio.submit(form(prompt=prompt, names=(), strengths=(), num_inference_steps=5), [], 0)


def test_a_run_is_cancelled_within_a_step(stuck: tuple[Studio, Stuck]) -> None:
    studio, pipeline = stuck
    run = submit(studio)
    pipeline.started.wait(10)
    pipeline.step.release()
    while run.step < 1:
        run.wait(1)
    run.cancel()
    assert "Cancelling after this step" in app_views.progress(run, 0)
    pipeline.step.release()
    assert wait_for(run).state == CANCELLED
    assert (run.step, run.result) == (2, None)
    assert "Cancelled after step 2 of 5." in app_views.progress(run, 0)


def test_a_waiting_run_is_cancelled_at_once_and_never_starts(stuck: tuple[Studio, Stuck]) -> None:
    studio, pipeline = stuck
    first, second, third = submit(studio, "one"), submit(studio, "two"), submit(studio, "three")
    assert studio.num_before(third) == 2
    assert "Waiting: 2 pictures before yours." in app_views.progress(third, 2)
    second.cancel()
    assert (second.state, studio.num_before(third), third.state) == (CANCELLED, 1, WAITING)
    assert "Cancelled before it began." in app_views.progress(second, 0)
    for _ in range(10):
        pipeline.step.release()
    assert (wait_for(first).state, wait_for(third).state) == (DONE, DONE)
    assert pipeline.calls == ["one", "three"]


def test_the_line_has_an_end(stuck: tuple[Studio, Stuck]) -> None:
    runs = [submit(stuck[0]) for _ in range(app_studio.MAX_WAITING + 1)]
    with pytest.raises(ValueError, match="8 pictures are waiting already. Try again in a while."):
        submit(stuck[0])
    runs[-1].cancel()
    submit(stuck[0])


def test_an_error_ends_a_run_and_not_the_engine(stuck: tuple[Studio, Stuck]) -> None:
    studio, pipeline = stuck
    for _ in range(10):
        pipeline.step.release()
    failed, after = submit(studio, "fail"), submit(studio, "next")
    assert (wait_for(failed).state, failed.error) == (FAILED, "something broke")
    assert "something broke" in app_views.progress(failed, 0)
    assert wait_for(after).state == DONE


# sessions


def test_a_picture_is_kept_with_its_recipe_until_the_session_ends(studio: Studio, tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    handlers, session = Handlers(studio, sessions), sessions.get(TOKEN)
    (tmp_path / "in.png").write_bytes(png())
    assert handlers.add(session, [str(tmp_path / "in.png")], ()) == ""
    state = app_state.default_state(studio.config)
    state.settings.update(prompt="a cat", num_inference_steps=2, image_guidance_scale=1.0, width=32)
    looks = list(handlers.watch("page", session, handlers.start("page", session, state, shown(session))))
    assert [look.ended for look in looks] == [False] * (len(looks) - 1) + [True]
    kept = looks[-1].picture
    assert read_recipe(kept.path) == kept.recipe.to_json()
    assert Image.open(kept.panel_path).text[KEY]
    assert handlers.runs == {}
    again = sessions.get(TOKEN)
    assert (again.pictures, len(again.references)) == ((kept,), 1)
    assert sessions.get("b" * 48).pictures == ()
    sessions.close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_one_who_stops_looking_cancels(stuck: tuple[Studio, Stuck], tmp_path: Path) -> None:
    studio, pipeline = stuck
    sessions = Sessions(tmp_path)
    handlers, session = Handlers(studio, sessions), sessions.get(TOKEN)
    state = app_state.default_state(studio.config)
    state.settings.update(prompt="a cat")
    run = handlers.start("page", session, state, ())
    with pytest.raises(ValueError, match="has a picture on its way already"):
        handlers.start("page", session, state, ())
    looks = handlers.watch("page", session, run)
    next(looks)
    looks.close()
    assert run.cancel_asked
    assert handlers.runs == {}
    pipeline.step.release()
    assert wait_for(run).state == CANCELLED


def test_closing_a_page_cancels_its_run_only(stuck: tuple[Studio, Stuck], tmp_path: Path) -> None:
    studio, sessions = stuck[0], Sessions(tmp_path)
    handlers = Handlers(studio, sessions)
    state = app_state.default_state(studio.config)
    state.settings.update(prompt="a cat")
    mine, other = handlers.start("page", sessions.get(TOKEN), state, ()), handlers.start("other", sessions.get("b" * 48), state, ())
    handlers.cancel("page")
    handlers.cancel("unknown")
    assert (mine.cancel_asked, other.cancel_asked) == (True, False)


def test_a_tab_never_draws_what_another_one_put_in(stuck: tuple[Studio, Stuck], tmp_path: Path) -> None:
    """Two tabs of one session, with as many pictures each."""
    studio = stuck[0]
    handlers = Handlers(studio, Sessions(tmp_path))
    session, state = handlers.sessions.get(TOKEN), app_state.default_state(studio.config)
    state.settings.update(prompt="a cat", num_inference_steps=1)
    session.replace([upload("mine.png")])
    mine = shown(session)
    session.replace([upload("theirs.png", (0, 0, 200))])
    with pytest.raises(ValueError, match="References: they were changed in another tab of this page. Reload this one to see them."):
        handlers.start("page", session, state, mine)
    assert handlers.runs == {}
    run = handlers.start("other", session, state, shown(session))
    with pytest.raises(ValueError, match="has a picture on its way already"):
        handlers.start("page", session, state, shown(session))
    run.cancel()
    after = handlers.start("page", session, state, shown(session))
    assert [one.job.name for one in (run, after)] == ["case_000", "case_001"]


def test_a_picture_is_found_by_its_file_whatever_another_tab_has_made_since(tmp_path: Path) -> None:
    session = Sessions(tmp_path).get(TOKEN)
    older, newer = (app_views.FinishedPicture(tmp_path / f"{name}.png", None, None, make_recipe(), 1.0) for name in ("older", "newer"))
    session.pictures = (newer, older)
    assert session.picture("/gradio_api/file=/tmp/x/older.png") is older
    assert session.picture("") is session.picture("gone.png") is None


@pytest.mark.parametrize(("name", "colour"), [("other.png", (200, 0, 0)), ("bag.png", (0, 0, 200))])
def test_a_page_draws_the_references_that_it_shows_or_nothing(
    studio: Studio, tmp_path: Path, name: str, colour: tuple[int, int, int]
) -> None:
    """Two tabs with one token: as many references, but others, or in another order."""
    handlers = Handlers(studio, Sessions(tmp_path / "pictures"))
    session, state = handlers.sessions.get(TOKEN), app_state.default_state(studio.config)
    state.settings.update(prompt="a cat")
    session.replace([upload(), upload("mug.png", (9, 9, 9))])
    before, references = shown(session), session.references
    (tmp_path / "in.png").write_bytes(png())
    for now in ([upload(name, colour), references[1]], references[::-1], references[:1]):
        session.replace(now)
        for action in (lambda: handlers.start("page", session, state, before), lambda: session.remove(0, before)):
            with pytest.raises(ValueError, match="they were changed in another tab of this page"):
                action()
        assert "changed in another tab" in handlers.add(session, [str(tmp_path / "in.png")], before)
        assert session.references == tuple(now)
    assert not (tmp_path / "in.png").exists()
    session.replace(references)
    run = handlers.start("page", session, state, before)
    assert [entry.file for entry in run.job.recipe.references] == ["bag.png", "mug.png"]
    with pytest.raises(ValueError, match="on its way already"):
        handlers.start("second page", session, state, before)
    handlers.open(TOKEN)
    assert run.cancel_asked, "the page was reloaded"


def test_a_duplicated_tab_has_its_own_references(studio: Studio, tmp_path: Path) -> None:
    handlers = Handlers(studio, Sessions(tmp_path))
    first = handlers.open(TOKEN)
    first.replace([upload(), upload("mug.png", (9, 9, 9))])
    copy = handlers.open("b" * 48, TOKEN)
    assert (copy.references, copy.pictures) == (first.references, ())
    copy.remove(0, shown(copy))
    assert [[reference.name for reference in session.references] for session in (first, copy)] == [["bag.png", "mug.png"], ["mug.png"]]


def test_a_page_that_does_not_listen_gets_no_picture(stuck: tuple[Studio, Stuck], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds no place in the line, and its run ends when it stops listening."""
    monkeypatch.setattr(app_handlers, "PATIENCE", 0.05)
    monkeypatch.setattr(app_handlers, "POLL_SECONDS", 0.02)
    studio, listeners = stuck[0], Listeners()
    handlers = Handlers(studio, Sessions(tmp_path), listeners.__contains__)
    state = app_state.default_state(studio.config)
    state.settings.update(prompt="a cat")
    for number in range(app_studio.MAX_WAITING + 4):
        with pytest.raises(ValueError, match="does not read its answers"):
            handlers.start(f"silent {number}", handlers.sessions.get(f"{number:032x}"), state, ())
    listeners.began("page")
    session = handlers.sessions.get(TOKEN)
    run = handlers.start("page", session, state, ())
    looks = handlers.watch("page", session, run)
    next(looks)
    listeners.ended("page")
    list(zip(range(5), looks, strict=False))
    assert run.cancel_asked


def test_empty_sessions_make_room_before_those_with_references(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    sessions.get(TOKEN).replace([upload()])
    for number in range(2 * MAX_SESSIONS):
        sessions.get(f"{number:032x}")
    assert len(sessions.get(TOKEN).references) == 1


def test_what_was_done_to_read_an_upload_is_said(studio: Studio, tmp_path: Path) -> None:
    handlers = Handlers(studio, Sessions(tmp_path / "sessions"))
    Image.new("RGB", (8, 8), "navy").save(tmp_path / "a.png", icc_profile=rgb_profile("Wide"))
    said = handlers.add(handlers.sessions.get(TOKEN), [str(tmp_path / "a.png")], ())
    assert "m-quiet" in said
    assert "a.png: its colours are converted to sRGB from Wide." in said


def test_lost_references_are_noticed(studio: Studio, tmp_path: Path) -> None:
    handlers = Handlers(studio, Sessions(tmp_path))
    with pytest.raises(ValueError, match="left alone for too long and its pictures are gone. Drop them again."):
        handlers.start("page", handlers.sessions.get(TOKEN), app_state.default_state(studio.config), (("a.png", "0" * 64),) * 2)


def test_sessions_are_limited_and_end_when_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    sessions, tokens = Sessions(tmp_path), [f"{number:032x}" for number in range(MAX_SESSIONS + 1)]
    for token in tokens[:-1]:
        now[0] += 1
        sessions.get(token).replace([upload()])
    sessions.get(tokens[0])
    now[0] += 1
    sessions.get(tokens[-1])
    assert len(sessions.get(tokens[0]).references) == 1
    assert len(sessions.get(tokens[2]).references) == 1
    assert len(sessions.get(tokens[1]).references) == 0, "the longest idle one made room"
    now[0] += 3601
    assert len(sessions.get(tokens[2]).references) == 0
    for wrong in ("", "../x", "A" * 48, "a" * 31, None):
        with pytest.raises(ValueError, match="opened without JavaScript"):
            sessions.get(wrong)


def test_idle_sessions_end_on_a_quiet_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_sessions, "SWEEP_SECONDS", 0.01)
    sessions = Sessions(tmp_path)
    idle, used = sessions.get(TOKEN), sessions.get("b" * 48)
    for session in (idle, used):
        session.replace([upload()])
        session.folder.mkdir()
    idle.last_used -= app_sessions.IDLE_SECONDS + 1
    end = time.monotonic() + 30
    while idle.folder.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert (idle.references, idle.folder.exists()) == ((), False)
    assert (len(used.references), used.folder.exists()) == (1, True)
    assert sweepers(sessions) == 1
    sessions.close()
    while sweepers(sessions) and time.monotonic() < end:
        time.sleep(0.01)
    assert sweepers(sessions) == 0


def sweepers(sessions: Sessions) -> int:
    """Threads that look after these sessions."""
    return sum(getattr(getattr(thread, "_target", None), "__self__", None) is sessions for thread in threading.enumerate())


def test_old_pictures_make_room(tmp_path: Path, studio: Studio) -> None:
    session = Sessions(tmp_path).get(TOKEN)
    rendered = wait_for(studio.submit(form(names=(), strengths=()), [], 0)).result
    for number in range(MAX_PICTURES + 2):
        session.keep(rendered._replace(job=rendered.job._replace(name=f"case_{number:03d}")))
    assert len(session.pictures) == len(list(session.folder.iterdir())) == MAX_PICTURES
    assert session.pictures[0].path.name == f"case_{MAX_PICTURES + 1:03d}.png"


# state over a reload


def test_saved_settings_come_back(config: Config) -> None:
    state = app_state.default_state(config)
    state.settings.update(prompt="<b>", seed=9, new_seed=True)
    state = state._replace(names=("bag", *state.names[1:]), strengths=(0.5, *state.strengths[1:]))
    text = json.dumps([*state.settings.values(), *state.names, *state.strengths])
    assert app_state.saved_state(text, config) == state


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[1, 2]", "[" * 100_000, json.dumps([None] * 21), json.dumps(["x"] * 21)])
def test_senseless_saved_settings_are_the_usual_ones(config: Config, text: str) -> None:
    state, usual = app_state.saved_state(text, config), app_state.default_state(config)
    assert state.settings | {"prompt": ""} == usual.settings
    assert state.strengths == usual.strengths


def test_saved_numbers_out_of_range_are_the_usual_ones(config: Config) -> None:
    usual = app_state.default_state(config)
    values = [*(usual.settings | {"num_inference_steps": 10**6, "guidance_scale": -1}).values(), *usual.names, 9.0, *usual.strengths[1:]]
    assert app_state.saved_state(json.dumps(values), config) == usual


# HTML


def test_what_users_give_is_escaped() -> None:
    evil = '<img src=x onerror="alert(1)">'
    recipe = make_recipe(prompt=evil, references=(entry(evil, "x", 0.5),))
    kept = app_views.FinishedPicture(Path("a.png"), None, None, recipe, 1.0)
    example = Example(replace(load_cases(ROOT / "example_cases.json", SIZE)[0], prompt=evil), ())
    views = [
        app_views.card(0, upload(evil)),
        app_views.notice([evil]),
        app_views.summary(kept),
        app_views.sample(example),
        app_views.header(evil, evil, "cpu", False),
    ]
    for view in views:
        assert evil not in view
        assert "&lt;img" in view
    assert "strength 0.5" in views[2]


def test_views_of_nothing() -> None:
    assert (app_views.notice(), app_views.card(0, None), app_views.recipe_json(None)) == ("", "", "")
    assert "once there is one" in app_views.summary(None)
    assert "once there is one" in app_views.attention_note(None)


def test_the_page_shows_attention_in_the_words_and_colours_of_the_reports() -> None:
    numbers = {"leakage": [[0.5, 0.25], [0.0, 1.0]], "owned": [0.5, 0.125]}
    recipe = make_recipe(references=(entry("bag.png", "bag"), entry("a_mug.png")))
    note = app_views.attention_note(app_views.FinishedPicture(Path("a.png"), Path("b.png"), numbers, recipe, 1.0))
    assert str(environment().get_template("figures.html.jinja").module.leakage_table(["bag", "a_mug"], numbers)) in note
    assert "nobody&rsquo;s" in note
    assert "elsewhere" not in note
    assert re.findall(r">(\d+)\u00a0%<", note) == ["50", "25", "25", "0", "100", "0", "50", "12", "38"]
    single = app_views.FinishedPicture(Path("a.png"), Path("b.png"), {"leakage": [[1.0]], "owned": [1.0]}, make_recipe(), 1.0)
    assert "<table" not in app_views.view("attention", ["bag"], single.numbers)


def test_durations() -> None:
    assert [app_views.duration(seconds) for seconds in (0.2, 59.1, 61)] == ["1 s", "1 min 00 s", "1 min 01 s"]


# the command


def test_defaults_are_the_pocket_weights_on_loopback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = app.parse_arguments([])
    config = app.read_config(arguments)
    assert (arguments.host, arguments.port) == ("127.0.0.1", None)
    assert Path(config.model.pretrained).resolve() == ROOT / "assets/pocket/flux"
    assert load_examples(config)[1] == []
    own = app.read_config(app.parse_arguments(["--config", str(ROOT / "configs/flux_dev.json"), "--model", "m/n", "--lora", "x/y"]))
    assert (own.model.pretrained, own.inference.lora) == ("m/n", "x/y")
    assert inference.DEFAULT_CONFIG.is_file()


def test_a_missing_gradio_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("os.environ", {})
    assert app.main([]) == 2
    assert capsys.readouterr().err.startswith("error: the page needs Gradio: pip install -r requirements-app.txt")


def test_users_mistakes_end_the_command_in_one_line(capsys: pytest.CaptureFixture) -> None:
    assert app.main(["--config", "missing.json"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_folder_is_removed_whatever_happens() -> None:
    seen = []

    def interrupted() -> None:
        with app.temporary_folder() as folder:
            seen.append(folder)
            (folder / "a").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not seen[0].exists()


def test_unreadable_cases_give_no_examples(config: Config, tmp_path: Path) -> None:
    broken = load_config(ROOT / "configs/pocket.json", [f'inference.cases="{tmp_path / "none.json"}"'])
    examples, problems = load_examples(broken)
    assert examples == []
    assert "none.json" in problems[0]


class Server:
    """Sends requests to an app behind the guard, in the way of a web server."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def ask(
        self, path: str, method: str = "GET", body: bytes = b"", host: str = "127.0.0.1:7860", **headers: str | None
    ) -> tuple[int, dict[bytes, bytes], bytes]:
        sent: list[dict] = []
        path, _, query = path.partition("?")
        given = {"host": host, "content-length": str(len(body)) if method == "POST" else None}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        raw = [(name.encode(), value.encode()) for name, value in given.items() if value is not None]
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(), "headers": raw}
        parts = [body[: len(body) // 2], body[len(body) // 2 :]]

        async def receive() -> dict:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)} if parts else {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)

        asyncio.run(self.app({**scope, "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 7860)}, receive, send))
        return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message.get("body", b"") for message in sent)


ACTIONS = {0: ("textbox", "textbox"), 1: ("state", "slider", "number", "checkbox"), 2: ("file",), 3: ("dataset",)}
CALL = {"data": ["a", "b"], "fn_index": 0, "session_hash": "abc", "trigger_id": None, "event_data": None}


@pytest.fixture
def guarded(tmp_path: Path) -> Any:
    """Makes a server that tells which page listens and what it received, behind the guard."""
    applications = pytest.importorskip("starlette.applications", reason="comes with Gradio")
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from scripts.app.guard import middleware

    listeners = Listeners()

    async def answer(request: Any) -> PlainTextResponse:
        return PlainTextResponse(await request.body() if request.method == "POST" else str("abc" in listeners))

    routes = [Route("/{path:path}", answer, methods=["GET", "POST"])]
    return lambda host=None: Server(applications.Starlette(routes=routes, middleware=middleware(host, listeners, Calls(ACTIONS, tmp_path))))


def test_the_guard_refuses_large_bodies_foreign_addresses_and_hosts(guarded: Any) -> None:
    local, public = guarded(), guarded("0.0.0.0")
    assert local.ask("/")[0] == 200
    assert b"default-src 'self'" in local.ask("/")[1][b"content-security-policy"]
    assert local.ask("/", host="evil.example")[0] == 400
    assert public.ask("/", host="workstation.example")[0] == 200
    upload_path, join = "/gradio_api/upload", "/gradio_api/queue/join"
    assert local.ask(upload_path, "POST", content_length="1000")[0] == 200
    assert local.ask(upload_path, "POST", content_length=str(7 * 20 * 2**20 + 1))[0] == 413
    for path in (join, f"{join}/", "/gradio_api/cancel", upload_path):
        assert local.ask(path, "POST", content_length=None)[0] == 411
        assert local.ask(path, "POST", content_length=str(300 * 2**20))[0] == 413
    assert local.ask(join, "POST", json.dumps(CALL).encode() + b" " * 2**20)[0] == 413
    for path in ("/gradio_api/run/draw", "/gradio_api/call/draw", "/gradio_api/call/v2/draw", "/gradio_api/component_server", "/login"):
        assert local.ask(path, "POST", b"{}")[0] == 404
    for head in (
        {"content_length": str(2**21)},
        {"content_length": "9" * 5000},
        {"content_length": "ten"},
        {"transfer_encoding": "chunked"},
    ):
        status = local.ask("/config", "GET", **head)[0]
        assert status == (413 if head.get("content_length", "x")[0].isdigit() else 411)
    assert local.ask(join, "POST", content_length="9" * 5000)[0] == 413
    assert local.ask("/config", "PUT", content_length=str(2**21))[0] == 413
    assert local.ask("/gradio_api/file=https://evil.example/x")[0] == 403


def test_calls_reach_the_server_as_they_were_sent(guarded: Any, tmp_path: Path) -> None:
    file = {"path": str(tmp_path / "a/b/x.png"), "size": 3, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
    for number, changes in enumerate(
        (
            {},
            {"data": ["x" * 100_000, None]},
            {"fn_index": 1, "data": [None, 0.5, 2**40, True]},
            {"fn_index": 2, "data": [[file, file]]},
            {"fn_index": 2, "data": [None]},
            {"fn_index": 3, "data": [4], "event_data": {"index": [0, 1], "value": [{"a": "b"}]}},
        )
    ):
        body = json.dumps({**CALL, "session_hash": f"page-{number}", **changes}).encode()
        assert guarded().ask("/gradio_api/queue/join", "POST", body)[::2] == (200, body)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ["x" * 100_001, ""]}, "A text must have at most 100000 letters"),
        ({"data": ["\ud800", ""]}, "without halves of surrogate pairs"),
        ({"event_data": [0] * 2001}, "at most 2000 values"),
        ({"event_data": [[[[[[[[]]]]]]]]}, "at most 8 deep"),
        ({"event_data": {"a": {"x" * 100_001: 1}}}, "A text must have at most"),
        ({"data": [1, ""]}, "data[0] is not a value of a textbox."),
        ({"data": ["a", "b", "c"]}, "data must be a list of 2 values."),
        ({"data": {"0": "a"}}, "data must be a list of 2 values."),
        ({"fn_index": 4}, "fn_index must be the number of one of the page's actions."),
        ({"fn_index": True}, "fn_index must be"),
        ({"fn_index": "x" * 90_000}, "fn_index must be"),
        ({"trigger_id": "x"}, "trigger_id must be"),
        ({"session_hash": None}, "session_hash must have"),
        ({"session_hash": "../x"}, "session_hash must have"),
        ({"session_hash": "x" * 65}, "session_hash must have"),
        ({"batched": True}, "A call must be an object with the keys"),
        ({"fn_index": 1, "data": [None, "7", 1, True]}, "data[1] is not a value of a slider."),
        ({"fn_index": 1, "data": [None, 1, 10**30, True]}, "data[2] is not a value of a number."),
        ({"fn_index": 1, "data": [None, 1, True, True]}, "data[2] is not a value of a number."),
        ({"fn_index": 1, "data": [None, float("nan"), 1, True]}, "A call must be JSON."),
        ({"fn_index": 1, "data": [None, 1, 1, "on"]}, "data[3] is not a value of a checkbox."),
        ({"fn_index": 1, "data": [{"a": 1}, 1, 1, True]}, "data[0] is not a value of a state."),
        ({"fn_index": 3, "data": [0.5]}, "data[0] is not a value of a dataset."),
        *(
            ({"fn_index": 2, "data": [value]}, "data[0] is not a value of a file.")
            for value in (
                ["x.png"],
                {"path": "UPLOADS/x.png", "meta": {"_type": "gradio.FileData"}},
                [{"path": "UPLOADS/x.png"}],
                [{"path": "UPLOADS/../y.png", "meta": {"_type": "gradio.FileData"}}],
                [{"path": "UPLOADS/x.png", "is_stream": True, "meta": {"_type": "gradio.FileData"}}],
                [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}],
                [{"path": "http://169.254.169.254/x.png", "meta": {"_type": "gradio.FileData"}}],
                [{"path": "UPLOADS/x.png", "meta": {"_type": "gradio.FileData"}}] * 101,
            )
        ),
    ],
)
def test_calls_that_the_page_does_not_make_are_refused_in_a_short_line(
    guarded: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    body = json.dumps({**CALL, **changes}).replace("UPLOADS", str(tmp_path)).encode()
    status, _, said = guarded().ask("/gradio_api/queue/join", "POST", body)
    assert (status, message in said.decode()) == (422, True)
    assert len(said) < 120


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 200_000, b"[]", b"\xff", b"9" * 10_000, b'"x"', b"null"])
def test_calls_that_are_no_objects_are_refused(guarded: Any, body: bytes) -> None:
    assert guarded().ask("/gradio_api/queue/join", "POST", body)[0] == 422


def test_a_page_that_reads_no_answers_may_call_a_few_times(guarded: Any) -> None:
    server = guarded()

    def join(page: str) -> int:
        return server.ask("/gradio_api/queue/join", "POST", json.dumps({**CALL, "session_hash": page}).encode())[0]

    assert [join("silent") for _ in range(12)] == [200] * 4 + [429] * 8
    assert join("abc") == 200
    for stream in ("/gradio_api/queue/data?session_hash=abc", "/gradio_api/heartbeat/abc"):
        assert server.ask(stream)[2] == b"True"
    assert server.ask("/gradio_api/queue/data?session_hash=other")[2] == b"False"
    assert server.ask("/gradio_api/queue/data?session_hash=silent")[0] == 200
    assert join("silent") == 200, "it has read since"


def test_listeners_count_their_streams() -> None:
    listeners = Listeners()
    listeners.began("page")
    listeners.began("page")
    listeners.ended("page")
    assert "page" in listeners
    assert all(listeners.may_call("page") for _ in range(100))
    listeners.ended("page")
    assert "page" not in listeners


def test_read_upload_is_bounded_by_the_number_of_references() -> None:
    assert MAX_REFERENCES == 6
    with pytest.raises(ValueError, match="the upload was lost"):
        read_upload(Path("nowhere.png"), SIZE, SCALE)
