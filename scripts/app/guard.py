"""What stands before the server: no request to or from other machines, no upload that is too large, no foreign host name."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from scripts.app.uploads import MAX_BYTES, MAX_REFERENCES

MAX_BODY = (MAX_REFERENCES + 1) * MAX_BYTES  # of one request
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'"
)
HEADERS = ((b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff"))
Messages = Callable[..., Awaitable[Any]]


def middleware(public_host: str | None) -> list[Middleware]:
    """What to put before the server.

    Args:
        public_host: Address that others can reach; None: this machine only, and then a page of another site that has its name point here
            (DNS rebinding) is refused.
    """
    hosts = [] if public_host else [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])]
    return [*hosts, Middleware(Guard)]


class Guard:
    """Refuses large bodies and the fetching of addresses, and tells browsers to load nothing from elsewhere."""

    def __init__(self, app: Messages) -> None:
        self.app = app

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

        await self.app(scope, receive, send_guarded)

    def refusal(self, scope: MutableMapping[str, Any]) -> tuple[int, str] | None:
        """Status and reason for a request that is not let through."""
        path, headers = scope["path"].lower(), dict(scope["headers"])
        if "=http:" in path or "=https:" in path:
            return 403, "This server fetches nothing from other servers."
        if scope["method"] == "POST" and path.rstrip("/").endswith("/upload"):
            length = headers.get(b"content-length", b"")
            if not length.isdigit():
                return 411, "An upload must say how long it is."
            if int(length) > MAX_BODY:
                return 413, f"An upload must have at most {MAX_BODY >> 20} MiB."
        return None
