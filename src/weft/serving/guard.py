"""What stands before every endpoint: hosts, the token, headers for browsers, and the clock."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders

from .inputs import RequestError
from .metrics import Metrics
from .responses import Json, refusal

log = logging.getLogger("weft.serving")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
"""Of every response that does not set its own."""

GUARDED = ("/v1/", "/metrics")
"""Beginnings of the paths that need the token, if there is one."""


@final
class Guard:
    """Asks for the token, adds headers, counts responses, and answers where an endpoint fails.

    Args:
        app: what is guarded.
        token: expected as ``Authorization: Bearer``; None for no token.
        hosts: names that a browser may know the server by; None for any. A page of somebody
            else's whose name is made to mean this machine would say its own.
        metrics: where to count.
        closing: whether connections are to end with their response.
    """

    def __init__(
        self,
        app: App,
        *,
        token: str | None,
        hosts: Collection[str] | None,
        metrics: Metrics,
        closing: Callable[[], bool],
    ) -> None:
        self._app = app
        self._token = None if token is None else f"Bearer {token}".encode()
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._metrics = metrics
        self._closing = closing

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one connection's event, as ASGI says."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, started = time.perf_counter(), 500, False

        async def watched(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if self._closing():
                    headers["connection"] = "close"
            await send(message)

        try:
            await (self._refused(Headers(scope=scope), scope["path"]) or self._app)(
                scope, receive, watched
            )
        except Exception:
            if started:
                raise
            log.exception("%s %s failed.", scope["method"], scope["path"])
            answer = self._refusal(500, "internal", "The server failed; its log says why.")
            await answer(scope, receive, watched)
        finally:
            # Paths of routes, not of requests, so that labels stay few.
            endpoint = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.latency.labels(endpoint).observe(time.perf_counter() - start)

    def _refused(self, headers: Headers, path: str) -> App | None:
        if self._hosts is not None and host_of(headers) not in {*self._hosts, None}:
            message = "The server is not known by this name; --allow-host adds one."
            return self._refusal(403, "forbidden", message)
        if self._token is None or not path.startswith(GUARDED):
            return None
        given = headers.get("authorization", "").encode("latin-1", "replace")
        if hmac.compare_digest(given, self._token):
            return None
        message = "Send the server's token: Authorization: Bearer TOKEN."
        return self._refusal(401, "unauthorized", message, {"WWW-Authenticate": "Bearer"})

    def _refusal(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> Json:
        self._metrics.errors.labels(code).inc()
        return refusal(status, code, message, headers)


def host_of(headers: Headers) -> str | None:
    """The name in the header ``Host``, without port; None where there is no such header."""
    host = headers.get("host")
    if host is None:
        return None
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def check_same_origin(headers: Headers) -> None:
    """Refuse what the page of another site makes a browser send.

    Browsers say where a request comes from; other programs say nothing and may go on.

    Raises:
        RequestError: it comes from another site.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        sound = site in ("same-origin", "none")
    else:
        sound = origin is None or origin.partition("://")[2] == headers.get("host")
    if not sound:
        raise RequestError(403, "forbidden", "Pages of other sites may not ask for this.")
