"""What stands before the server: bounds on what is sent, no request to or from other machines, no foreign host name, and who listens."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from scripts.app.calls import Calls
from scripts.app.listeners import Listeners
from scripts.app.uploads import MAX_BYTES, MAX_REFERENCES

PREFIX = "/gradio_api"
JOIN, UPLOAD, STREAM, HEARTBEAT = f"{PREFIX}/queue/join", f"{PREFIX}/upload", f"{PREFIX}/queue/data", f"{PREFIX}/heartbeat/"
POSTED = (JOIN, UPLOAD, f"{PREFIX}/cancel", f"{PREFIX}/reset")  # all that the page posts to
MAX_UPLOAD = (MAX_REFERENCES + 1) * MAX_BYTES  # bytes of one request
MAX_BODY = 2**20  # bytes of any other request
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'"
)
HEADERS = ((b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff"))
Messages = Callable[..., Awaitable[Any]]
Refusal = tuple[int, str]  # status and reason


def middleware(public_host: str | None, listeners: Listeners, calls: Calls) -> list[Middleware]:
    """What to put before the server.

    Args:
        public_host: Address that others can reach; None: this machine only, and then a page of another site that has its name point here
            (DNS rebinding) is refused.
        listeners: Is told who listens.
        calls: What may be called.
    """
    hosts = [] if public_host else [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])]
    return [*hosts, Middleware(Guard, listeners=listeners, calls=calls)]


class Guard:
    """Refuses large bodies, what the page does not ask for and fetching; tells browsers to load nothing from other machines."""

    def __init__(self, app: Messages, listeners: Listeners, calls: Calls) -> None:
        self.app, self.listeners, self.calls = app, listeners, calls

    async def __call__(self, scope: MutableMapping[str, Any], receive: Messages, send: Messages) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self.refusal(scope)
        if refusal is None and scope["method"] == "POST" and _path(scope) == JOIN:
            body = await _whole_body(receive)
            refusal, receive = self.refused_call(body), _again(body, receive)
        if refusal is not None:
            await PlainTextResponse(refusal[1], status_code=refusal[0])(scope, receive, send)
            return

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        page = _listening_page(scope)
        if page is None:
            await self.app(scope, receive, send_guarded)
            return
        self.listeners.began(page)
        try:
            await self.app(scope, receive, send_guarded)
        finally:
            self.listeners.ended(page)

    def refusal(self, scope: MutableMapping[str, Any]) -> Refusal | None:
        """Why a request is not let through, by its head."""
        headers, path = dict(scope["headers"]), _path(scope)
        if "=http:" in path.lower() or "=https:" in path.lower():
            return 403, "This server fetches nothing from other servers."
        is_post = scope["method"] == "POST"
        if is_post and path not in POSTED:
            return 404, "The page does not ask for this."
        length = headers.get(b"content-length", b"" if is_post or b"transfer-encoding" in headers else b"0")
        if not length.isdigit():  # the server reads no more than what is said here
            return 411, "A request must say how long it is."
        limit = MAX_UPLOAD if is_post and path == UPLOAD else MAX_BODY
        if len(length) > 18 or int(length) > limit:
            return 413, f"This request must have at most {limit >> 20} MiB."
        return None

    def refused_call(self, body: bytes) -> Refusal | None:
        """Why a call of one of the page's actions is not let through."""
        try:
            page = self.calls.check(body)
        except ValueError as error:
            return 422, str(error)
        return None if self.listeners.may_call(page) else (429, "This page calls and does not read the answers.")


def _path(scope: MutableMapping[str, Any]) -> str:
    return scope["path"].rstrip("/")


def _listening_page(scope: MutableMapping[str, Any]) -> str | None:
    """The page that opens a stream by this request."""
    path = _path(scope)
    if scope["method"] != "GET":
        return None
    if path.startswith(HEARTBEAT):
        return path.removeprefix(HEARTBEAT)
    found = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash") if path == STREAM else None
    return found[0] if found else None


async def _whole_body(receive: Messages) -> bytes:
    """The body of a request whose head says a length that is not too large; servers cut off what comes beyond."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: Messages) -> Messages:
    """What gives a body that was read already, and then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Any:
        return messages.pop() if messages else await receive()

    return receive_again
