"""A page for trying things out: `python scripts/app.py`, then open the address that it prints. Needs `pip install -r requirements-app.txt`.

It opens with the shipped pocket weights. FLUX.1-dev: `python scripts/app.py --config configs/flux_dev.json`. The page listens on this
machine only; with `--host 0.0.0.0` everybody who can reach the machine can use it. It asks nothing of any other machine.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import inference
from mosaic.commands import NOTHING, command
from mosaic.config.loading import Config, load_config

if TYPE_CHECKING:
    from scripts.app.layout import Page
    from scripts.app.listeners import Listeners

# Gradio rewrites the selectors of CSS files, and then these no longer reach what is around the page.
NARROW = "@media (max-width: 640px) { .gradio-container { padding: 12px !important } .gradio-container .main { padding: 0 !important } }"
MENDED = "[data-mended] #m-status .m-error { display: none }"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="JSON file; its paths start at the current directory (default: this repository's pocket.json)")
    parser.add_argument("--model", help="model.pretrained: a diffusers FLUX folder or hub id")
    parser.add_argument("--lora", help="inference.lora: a .safetensors file, a folder or a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one setting; may be repeated")
    return parser.parse_args(argv)


def read_config(arguments: argparse.Namespace) -> Config:
    """The config of a command line, that of `inference.py` with the same flags."""
    defaults = [] if arguments.config else inference.pocket_inputs()
    flags = {"model.pretrained": arguments.model, "inference.lora": arguments.lora}
    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    return load_config(arguments.config or inference.DEFAULT_CONFIG, defaults + arguments.set + given)


def quiet_gradio(folder: Path) -> None:
    """Settings that Gradio reads when it is imported: no telemetry, and a folder for what is uploaded.

    Raises:
        ImportError: Gradio is not installed.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the page needs Gradio: pip install -r requirements-app.txt ({error})") from error


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is removed at the end, also after a signal."""
    folder = Path(tempfile.mkdtemp(prefix="mosaic_app_"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def served(config: Config, folder: Path, host: str, port: int | None) -> Iterator[str]:
    """Load the model and serve the page; gives its address.

    Raises:
        FileNotFoundError, OSError, ValueError: The model cannot be loaded, or the port is taken.
    """
    import torch

    from scripts.app.examples import load_examples
    from scripts.app.handlers import Handlers
    from scripts.app.layout import Page
    from scripts.app.listeners import Listeners
    from scripts.app.sessions import Sessions
    from scripts.app.studio import Studio

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    examples, problems = load_examples(config)
    for problem in problems:
        print(f"note: no example: {' '.join(problem.splitlines())}", file=sys.stderr)
    studio, sessions = Studio.load(config, device), Sessions(folder / "pictures")
    listeners = Listeners()
    page = Page(Handlers(studio, sessions, listeners.__contains__), examples, device.type)
    try:
        yield launch(page, folder, host, port, listeners)
    finally:
        page.blocks.close(verbose=False)
        sessions.close()
        studio.close()


def launch(page: "Page", folder: Path, host: str, port: int | None, listeners: "Listeners") -> str:
    """Start the server in a thread; returns the page's address."""
    import gradio

    from mosaic.reports.html import TEMPLATES
    from scripts.app.calls import Calls
    from scripts.app.guard import middleware
    from scripts.app.layout import FOLDER, FONTS
    from scripts.app.receiving import Receiver
    from scripts.app.theme import FAMILIES, theme_values
    from scripts.app.uploads import MAX_BYTES

    pictures, uploads = folder / "pictures", folder / "uploads"
    pictures.mkdir()
    guards = middleware(host if host not in LOOPBACK else None, listeners, Calls(page.inputs, uploads))
    gradio.set_static_paths([pictures])  # served from there, not copied into a cache
    options: dict[str, Any] = {"ssr_mode": False, "pwa": False, "mcp_server": False, "run_history": False, "share": False}
    _, address, _ = page.blocks.queue(default_concurrency_limit=8, max_size=128, api_open=False).launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        footer_links=[],
        max_file_size=MAX_BYTES,
        enable_monitoring=False,
        favicon_path=FOLDER / "icon.svg",
        theme=gradio.themes.Base(**FAMILIES, **FONTS).set(**theme_values()),
        css_paths=[FOLDER / "style.css", TEMPLATES / "attention.css"],
        head=f"<style>{NARROW} {MENDED}</style><script>{(FOLDER / 'page.js').read_text(encoding='utf-8')}</script>",
        app_kwargs={"middleware": guards, "routes": [Receiver(uploads).route]},
        **options,
    )
    return address


@command(NOTHING)
def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = read_config(arguments)
        with temporary_folder() as folder:
            quiet_gradio(folder)
            with served(config, folder, arguments.host, arguments.port) as address:
                if arguments.host not in LOOPBACK:
                    print("note: everybody who can reach this machine can use the page; there is no password.", file=sys.stderr)
                print(f"MOSAIC is at {address} (Ctrl+C ends it)", flush=True)
                threading.Event().wait()
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)
    return 0
