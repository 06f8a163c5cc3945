"""The page in headless Chromium: `python -m pytest -m browser tests/browser`.

Needs requirements-app.txt, playwright and a Chromium (`apt-get install chromium`); skipped, with the reason, where one is missing.
"""

import contextlib
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mosaic.reports.contrast import contrast

ROOT = Path(__file__).resolve().parents[2]
REFERENCES = ROOT / "assets/references"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
START = 600  # s for the page to open; machines may be busy
SLOW = 300_000  # ms for anything in the page
MIB = 2**20

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("default")]


def chromium() -> str:
    """Path of a Chromium; skips the test where something is missing."""
    for package in ("gradio", "playwright"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the page in a browser needs {package}: pip install -r requirements-app.txt")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("the browser test needs Chromium: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The page's address with the pocket weights, and the folder for its temporary files, which must be empty at the end."""
    chromium()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary, log = tmp_path_factory.mktemp("tmp"), tmp_path_factory.mktemp("log") / "app.log"
    command = [sys.executable, str(ROOT / "scripts/app.py"), "--port", str(port)]
    with open(log, "w") as file:
        environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + START
        while f"MOSAIC is at http://127.0.0.1:{port}" not in log.read_text(errors="replace"):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < end, log.read_text(errors="replace")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/", temporary
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START)
    text = log.read_text(errors="replace")
    assert process.returncode == 0, text
    assert "Traceback" not in text, text
    assert list(temporary.glob("mosaic_app_*")) == []


@pytest.fixture
def page(server: tuple[str, Path]) -> Iterator[Any]:
    """A fresh browser on the page. The page may speak to its server only, and without errors."""
    from playwright.sync_api import sync_playwright

    address, foreign, errors = server[0], [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=FLAGS)
        page = browser.new_context(viewport={"width": 1360, "height": 1000}).new_page()
        page.set_default_timeout(SLOW)
        page.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:")) else foreign.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#m-generate")
        page.wait_for_selector("html[data-opened]")
        yield page
        browser.close()
    assert foreign == []
    assert errors == []


def drop(page: Any, *files: tuple[str, bytes], target: str = "#m-drop button") -> None:
    """Drop files as a person does, by the browser's own drop event."""
    content = [[name, list(data)] for name, data in files]
    transfer = page.evaluate_handle(
        """(files) => {
            const transfer = new DataTransfer();
            for (const [name, bytes] of files) transfer.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
            return transfer;
        }""",
        content,
    )
    page.dispatch_event(target, "drop", {"dataTransfer": transfer})


def picture(name: str) -> tuple[str, bytes]:
    path = next(REFERENCES.glob(name))
    return path.name, path.read_bytes()


def generate(page: Any, steps: int | None = None) -> None:
    if steps is not None:
        if not page.get_by_label("Steps").first.is_visible():
            page.locator("#m-settings button").first.click()
        page.get_by_label("Steps").first.fill(str(steps))
    page.click("#m-generate")


def shown(page: Any, count: int) -> None:
    """Wait until so many references are shown."""
    page.wait_for_function(f"document.querySelectorAll('.m-card').length === {count}")


def test_two_references_give_a_picture_with_attention_and_recipe(page: Any, server: tuple[str, Path]) -> None:
    drop(page, picture("car_honey*"), picture("snail_mint*"))
    shown(page, 2)
    assert page.locator(".m-card figcaption").all_inner_texts() == ["car_honey_dots_none.png", "snail_mint_stripes_star.png"]
    assert list(server[1].rglob("*.png")) == [], "uploads are removed as soon as they are read"

    page.get_by_label("Name of reference 1").fill("taxi")
    page.fill("#m-prompt textarea", "a <taxi> and a <slug> in a meadow")
    generate(page, steps=3)
    page.wait_for_selector(".m-error")
    assert page.inner_text(".m-error") == "Prompt: <slug> names no reference of this case. The names here: taxi."

    page.fill("#m-prompt textarea", "a <taxi> and a <slug> in a garden")
    page.wait_for_selector(".m-error", state="hidden")
    page.click("#m-generate")
    page.wait_for_selector(".m-error")  # the same words once more
    page.fill("#m-prompt textarea", "a <taxi> and a snail in a meadow")
    page.wait_for_selector(".m-error", state="hidden")  # what is mended is told no longer
    page.click("#m-generate")
    page.wait_for_selector("#m-panel img")
    assert page.locator(".m-error").count() == 0
    assert page.locator(".leakage td.own").count() == 2
    width = page.evaluate("document.querySelector('#m-panel img').naturalWidth")
    assert width > 500, "the attention view is a loaded picture"
    link = page.locator("#m-gallery img").first.get_attribute("src")
    made = Image.open(io.BytesIO(page.request.get(link).body()))
    made.load()
    recipe = json.loads(made.text["mosaic"])
    assert made.size == (64, 64)
    assert (recipe["prompt"], recipe["num_inference_steps"]) == ("a taxi and a snail in a meadow", 3)
    assert [entry["name"] for entry in recipe["references"]] == ["taxi", None]

    page.get_by_role("tab", name="Recipe").click()
    page.wait_for_selector("#m-summary dl")
    assert "car_honey_dots_none.png as <taxi>" in page.inner_text("#m-summary")


def test_a_run_is_cancelled_and_another_one_follows(page: Any) -> None:
    page.fill("#m-prompt textarea", "a cat on a beach")
    generate(page, steps=100)
    page.wait_for_selector(".m-run")
    page.wait_for_function("/Step [1-9]/.test(document.querySelector('.m-run')?.innerText || '')")
    page.click("#m-cancel")
    page.wait_for_selector(".m-quiet")
    assert re.fullmatch(r"Cancelled after step \d+ of 100\.", page.inner_text(".m-quiet"))
    assert page.locator("#m-gallery img").count() == 0
    generate(page, steps=2)
    page.wait_for_selector("#m-gallery img")
    assert page.locator(".m-notice").count() == 0
    assert "it has no references" in page.inner_text("#m-attention-note")


def test_a_reload_keeps_references_settings_and_pictures_and_ends_the_run(page: Any) -> None:
    page.locator("#m-examples tbody tr").nth(2).click()
    shown(page, 2)
    page.get_by_label("Name of reference 2").fill("snail")
    page.fill("#m-prompt textarea", "a car and a <snail> in a meadow")
    generate(page, steps=2)
    page.wait_for_selector("#m-panel img")
    generate(page, steps=100)
    page.wait_for_function("/Step [1-9]/.test(document.querySelector('.m-run')?.innerText || '')")

    page.reload()
    shown(page, 2)
    page.wait_for_selector("#m-panel img")
    assert page.input_value("#m-prompt textarea") == "a car and a <snail> in a meadow"
    assert page.get_by_label("Name of reference 2").input_value() == "snail"
    assert page.locator(".m-run").count() == 0
    generate(page, steps=2)  # would wait for the old run if that went on
    page.wait_for_function("document.querySelectorAll('#m-gallery .thumbnail-item').length >= 2")

    page.locator("#m-slot-1 .m-remove").click()
    shown(page, 1)
    assert page.locator(".m-card figcaption").all_inner_texts() == ["snail_mint_stripes_star.png"]
    assert page.get_by_label("Name of reference 1").input_value() == "snail"


def test_bad_and_surplus_files_are_refused_with_a_reason(page: Any) -> None:
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, format="PNG")
    drop(page, ("not.png", b"hello"), ("bomb.png", bomb.getvalue()), picture("cat_ember*"))
    shown(page, 1)
    problems = page.locator("#m-upload-notice li").all_inner_texts()
    assert "not.png (no known picture format)" in problems[0]
    assert "9000 x 9000 pixels, more than 50 million" in problems[1]
    drop(page, *[picture("mug_mint*")] * 6)
    shown(page, 6)
    assert page.locator("#m-upload-notice li").all_inner_texts() == [
        "mug_mint_dots_none.png: there are at most 6 references. Remove one first."
    ]


def test_pictures_are_pasted(page: Any) -> None:
    name, data = picture("fish_plum*")
    page.evaluate(
        """([name, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
        }""",
        [name, list(data)],
    )
    shown(page, 1)


def test_a_duplicated_tab_is_a_session_of_its_own(page: Any, server: tuple[str, Path]) -> None:
    drop(page, picture("mug_mint*"))
    shown(page, 1)
    token = page.evaluate("sessionStorage.getItem('mosaic.token')")
    other = page.context.new_page()
    other.add_init_script(f"sessionStorage.getItem('mosaic.token') || sessionStorage.setItem('mosaic.token', '{token}')")
    other.goto(server[0])
    other.wait_for_selector("html[data-opened]")
    other.wait_for_function(f"sessionStorage.getItem('mosaic.token') !== '{token}'")
    shown(other, 1)  # those of the first tab; from here on its own
    other.locator("#m-slot-1 .m-remove").click()
    shown(other, 0)
    drop(other, picture("fish_plum*"))
    shown(other, 1)
    assert page.locator(".m-card figcaption").all_inner_texts() == ["mug_mint_dots_none.png"]
    page.reload()
    shown(page, 1)
    assert page.evaluate("sessionStorage.getItem('mosaic.token')") == token
    assert page.locator(".m-card figcaption").all_inner_texts() == ["mug_mint_dots_none.png"]


def test_a_narrow_screen_needs_no_sideways_scrolling(page: Any) -> None:
    cards = "[...document.querySelectorAll('#m-examples tr')]"
    assert page.evaluate(f"{cards}.every((card) => card.scrollWidth <= card.clientWidth)"), "six references stay in their card"
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.locator("#m-examples").bounding_box()["y"] < page.locator("#m-prompt").bounding_box()["y"], "examples come first"
    page.locator("#m-examples tbody tr").nth(9).click()
    shown(page, 6)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert page.locator("#m-generate").bounding_box()["width"] > 150


READ = """() => {
    const parse = (colour) => {
        const canvas = document.createElement("canvas").getContext("2d");
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const over = ([r, g, b, a], back) => [r, g, b].map((value, i) => (value * a + back[i] * (255 - a)) / 255);
    const found = [];
    const add = (element, text, colour) => {
        let back = [255, 255, 255];
        const around = [];
        for (let one = element; one; one = one.parentElement) around.unshift(one);
        for (const one of around) back = over(parse(getComputedStyle(one).backgroundColor), back);
        found.push([text, over(parse(colour), back).map(Math.round), back.map(Math.round)]);
    };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement, style = getComputedStyle(element);
        const seen = element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && style.fontSize !== "0px";
        if (text && seen && !element.closest(":disabled, script, style, noscript")) add(element, text, style.color);
    }
    for (const field of document.querySelectorAll("[placeholder]")) add(field, field.placeholder, getComputedStyle(field, "::placeholder").color);
    return found;
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read(page: Any, server: tuple[str, Path], theme: str) -> None:
    """Contrasts of what the browser shows: Gradio's parts too, with an error, two references, a picture and the table of its attention."""
    page.goto(f"{server[0]}?__theme={theme}")
    page.wait_for_selector("html[data-opened]")
    page.locator("#m-examples tbody tr").nth(2).click()
    shown(page, 2)
    generate(page, steps=2)
    page.wait_for_selector("#m-panel img")
    page.fill("#m-prompt textarea", "")
    page.click("#m-generate")
    page.wait_for_selector(".m-error")
    assert page.inner_text(".m-error") == "Prompt: is empty. Write what the picture shall show."
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    texts = page.evaluate(READ)
    assert len(texts) > 60
    assert [text for text, ink, back in texts if contrast(ink, back) < 4.5] == []


class Caller:
    """A program that calls the page's actions as its script does."""

    def __init__(self, address: str, token: str) -> None:
        self.address, self.token, self.hash = address.rstrip("/"), token, token[:12]
        self.actions = {
            action["api_name"]: action["id"] for action in json.load(urllib.request.urlopen(f"{self.address}/config"))["dependencies"]
        }

    def ask(self, path: str, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
        request = urllib.request.Request(f"{self.address}/gradio_api/{path}", body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=START) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def join(self, action: str, *data: Any) -> int:
        body = {"data": [self.token, *data], "fn_index": self.actions[action], "session_hash": self.hash, "trigger_id": None}
        return self.ask("queue/join", json.dumps(body).encode())[0]

    def draw(self, steps: int) -> int:
        return self.join("draw", "a cat", 64, 64, steps, 3, False, 1.0, 1.0, False, *[""] * 6, *[1.0] * 6, None)

    def result(self) -> list[Any]:
        with urllib.request.urlopen(f"{self.address}/gradio_api/queue/data?session_hash={self.hash}", timeout=START) as stream:
            for line in stream:
                if line.startswith(b"data:") and (message := json.loads(line[5:]))["msg"] == "process_completed":
                    return message["output"]["data"]
        raise AssertionError

    def upload(self, name: str, content: bytes, field: str = "files") -> tuple[int, Any]:
        head = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
        return self.ask("upload", head.encode() + content + b"\r\n--x--\r\n", "multipart/form-data; boundary=x")

    def add(self, *paths: str) -> list[Any]:
        assert self.join("add", [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths], None) == 200
        return self.result()


def test_pictures_that_nobody_waits_for_leave_room_in_the_line(server: tuple[str, Path]) -> None:
    """Twelve calls whose answers are not read: of one page, of one session, and of twelve."""
    one, session = Caller(server[0], "1" * 48), [Caller(server[0], "2" * 48) for _ in range(12)]
    for number, caller in enumerate(session):
        caller.hash = f"second{number}"
    assert [one.draw(100) for _ in range(12)] == [200] * 4 + [429] * 8
    for caller in session + [Caller(server[0], f"{number:02d}" * 24) for number in range(30, 42)]:
        assert caller.draw(100) == 200
    other = Caller(server[0], "f" * 48)
    assert other.draw(2) == 200
    assert "case_000.png" in json.dumps(other.result())


def test_equal_uploads_of_two_users_are_two_files(server: tuple[str, Path]) -> None:
    callers = [Caller(server[0], letter * 48) for letter in "abc"]
    content = picture("mug_mint*")[1]
    paths = [caller.upload(name, content)[1][0] for caller, name in zip(callers, ("mug.png", "mug.png", "other.png"), strict=True)]
    assert len({Path(path).parents[1] for path in paths}) == 3
    for caller, path in zip(callers, paths, strict=True):
        _, said, *rest = caller.add(path)
        assert said == ""
        assert f'title="{Path(path).name}"' in json.dumps(rest).replace('\\"', '"')
    assert not any(Path(path).exists() for path in paths)
    assert callers[0].join("add", [{"path": str(Path(paths[0]).parents[2].parent / "pictures/x.png"), "meta": {}}], None) == 422
    for name in ("../../../../escape.png", "/escape.png", ".."):
        status, found = callers[0].upload(name, content)
        assert status == 400 or (len(found) == 1 and Path(found[0]).parents[2] == Path(paths[0]).parents[2])
    assert callers[0].upload("a.png", content, field="other") == (200, [])
    assert callers[0].upload("a.png", bytes(20 * MIB + 1))[0] == 413
    for _ in range(40):
        callers[0].upload("late.png", content)
    folders = [place for place in Path(paths[0]).parents[2].iterdir() if any(file.is_file() for file in place.rglob("*"))]
    assert len(folders) <= 33, "uploads that nobody takes make room"


def test_large_files_and_other_hosts_are_refused(server: tuple[str, Path]) -> None:
    host, port = server[0].removeprefix("http://").rstrip("/").split(":")
    for headers, path, status in (
        ({"Content-Length": str(500 * MIB)}, "/gradio_api/upload", 413),
        ({"Content-Length": str(300 * MIB)}, "/gradio_api/queue/join", 413),
        ({"Transfer-Encoding": "chunked"}, "/gradio_api/queue/join", 411),
        ({"Content-Length": "2"}, "/gradio_api/call/draw", 404),
        ({"Host": "evil.example", "Content-Length": "0"}, "/gradio_api/upload", 400),
    ):
        with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=60)) as connection:
            connection.putrequest("POST", path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            assert connection.getresponse().status == status
