"""What stands before the server: no request to or from other machines, no body that is too large, no foreign host name; and who listens."""

from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from scripts.app.uploads import MAX_BYTES, MAX_REFERENCES

MAX_BODY = (MAX_REFERENCES + 1) * MAX_BYTES  # of an upload
MAX_JSON = 2**20  # of any other request; a prompt and all fields have less than a tenth
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'"
)
HEADERS = ((b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff"))
Messages = Callable[..., Awaitable[Any]]


class Listeners:
    """Which loaded pages read what the server tells them: those that keep one of its streams open."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def __contains__(self, page: str) -> bool:
        return self._open[page] > 0

    def page(self, scope: MutableMapping[str, Any]) -> str | None:
        """The id of the page that a request's stream is for; None: it is no stream."""
        path = scope["path"].rstrip("/")
        if path.endswith("/queue/data"):
            return next(iter(parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [])), None)
        before, _, page = path.rpartition("/")
        return page if before.endswith("/heartbeat") else None

    def change(self, page: str, by: int) -> None:
        """A stream of a page was opened (1) or closed (-1)."""
        self._open[page] += by
        if self._open[page] <= 0:
            del self._open[page]


def middleware(public_host: str | None, listeners: Listeners) -> list[Middleware]:
    """What to put before the server.

    Args:
        listeners: Learns who listens.
        public_host: Address that others can reach; None: this machine only, and then a page of another site that has its name point here
            (DNS rebinding) is refused.
    """
    hosts = [] if public_host else [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])]
    return [*hosts, Middleware(Guard, listeners=listeners)]


class Guard:
    """Refuses large bodies and the fetching of addresses, and tells browsers to load nothing from elsewhere."""

    def __init__(self, app: Messages, listeners: Listeners) -> None:
        self.app, self.listeners = app, listeners

    async def __call__(self, scope: MutableMapping[str, Any], receive: Messages, send: Messages) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self.refusal(scope)
        if refusal is not None:
            await PlainTextResponse(refusal[1], status_code=refusal[0])(scope, receive, send)
            return

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        page = self.listeners.page(scope)
        if page is None:
            await self.app(scope, receive, send_guarded)
            return
        self.listeners.change(page, 1)
        try:
            await self.app(scope, receive, send_guarded)
        finally:
            self.listeners.change(page, -1)

    def refusal(self, scope: MutableMapping[str, Any]) -> tuple[int, str] | None:
        """Status and reason for a request that is not let through."""
        path, headers = scope["path"].lower(), dict(scope["headers"])
        if "=http:" in path or "=https:" in path:
            return 403, "This server fetches nothing from other servers."
        is_upload = scope["method"] == "POST" and path.rstrip("/").endswith("/upload")
        length = headers.get(b"content-length", b"" if is_upload or b"transfer-encoding" in headers else b"0")
        if not length.isdigit():  # the server reads no more than what is said here
            return 411, "An upload must say how long it is." if is_upload else "A request must say how long it is."
        limit = MAX_BODY if is_upload else MAX_JSON
        if len(length) > 18 or int(length) > limit:
            return 413, f"{'An upload' if is_upload else 'This request'} must have at most {limit >> 20} MiB."
        return None
