"""Where uploads arrive: each in a folder with a secret name, so that equal files of two users are two files. Needs Gradio."""

import secrets
import shutil
from pathlib import Path
from typing import Any

from gradio.route_utils import MultiPartException, upload_fn
from gradio.routes import file_upload_statuses
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from scripts.app.guard import UPLOAD
from scripts.app.uploads import MAX_BYTES

MAX_WAITING = 32  # uploads that no page has taken yet


class Receiver:
    """Stands in the place of Gradio's own route, which puts equal files of all users into one place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arriving: set[Path] = set()

    @property
    def route(self) -> Route:
        """What to put before Gradio's routes."""
        return Route(UPLOAD, self.receive, methods=["POST"])

    async def receive(self, request: Request) -> Response:
        """Take the files of a request; answers with their paths."""
        self._make_room()
        place = self.folder / secrets.token_hex(16)
        place.mkdir(parents=True)
        self._arriving.add(place)
        kept = False
        try:
            progress: dict[str, Any] = {"upload_id": request.query_params.get("upload_id"), "upload_progress": file_upload_statuses}
            paths, _, _ = await upload_fn(request, str(place), MAX_BYTES, **progress)
            kept = bool(paths)
            return JSONResponse([str(path) for path in paths])
        except MultiPartException as error:
            return PlainTextResponse(error.message, 413 if "maximum allowed size" in error.message else 400)
        except (HTTPException, AttributeError, TypeError):  # Gradio's answers to a form with other fields than files
            return PlainTextResponse("An upload must be a form with files alone.", 400)
        finally:
            self._arriving.discard(place)
            if not kept:
                shutil.rmtree(place, ignore_errors=True)

    def _make_room(self) -> None:
        """Remove the folders of uploads that were taken, and the oldest ones that nobody has taken."""
        here = [place for place in self.folder.iterdir() if place not in self._arriving] if self.folder.exists() else []
        full = sorted(
            (place for place in here if any(path.is_file() for path in place.rglob("*"))), key=lambda place: place.stat().st_mtime
        )
        for place in {*here} - {*full[-MAX_WAITING:]}:
            shutil.rmtree(place, ignore_errors=True)
