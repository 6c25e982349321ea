"""What stands before every endpoint: the token, headers that protect a browser, and the clock."""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from .metrics import Metrics

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
    """Asks for the token, adds headers, and counts responses.

    Args:
        app: what is guarded.
        token: expected as ``Authorization: Bearer``; None for no token.
        metrics: where to count.
        closing: whether connections are to end with their response.
    """

    def __init__(
        self, app: App, *, token: str | None, metrics: Metrics, closing: Callable[[], bool]
    ) -> None:
        self._app = app
        self._token = None if token is None else f"Bearer {token}".encode()
        self._metrics = metrics
        self._closing = closing

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one connection's event, as ASGI says."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if self._closing():
                    headers["connection"] = "close"
            await send(message)

        try:
            if self._may_pass(scope):
                await self._app(scope, receive, watched)
            else:
                await self._refused()(scope, receive, watched)
        finally:
            # Paths of routes, not of requests, so that labels stay few.
            endpoint = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.latency.labels(endpoint).observe(time.perf_counter() - start)

    def _may_pass(self, scope: Message) -> bool:
        if self._token is None or not scope["path"].startswith(GUARDED):
            return True
        given = Headers(scope=scope).get("authorization", "").encode("latin-1", "replace")
        return hmac.compare_digest(given, self._token)

    def _refused(self) -> App:
        self._metrics.errors.labels("unauthorized").inc()
        message = "Send the server's token: Authorization: Bearer TOKEN."
        body = {"error": {"code": "unauthorized", "message": message}}
        return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
