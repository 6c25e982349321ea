"""The process that serves: its socket, its signals, and an end that loses no request."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import final

from weft.errors import ConfigError, MissingExtra

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
except ImportError:
    raise MissingExtra("The HTTP server", "serve") from None

from fastapi import FastAPI

from .service import Service

LINGER = 0.3
"""Seconds in which requests that are on their way may still arrive on open connections."""

PATIENCE = 30
"""Seconds in which the header of a connection's next request must be whole."""


@final
class _Connection(H11Protocol):
    """Closes if the next request does not come in time, however slowly its bytes do."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _wait_for_request(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(PATIENCE, self._give_up, self.cycle)

    def _give_up(self, last: RequestResponseCycle | None) -> None:
        if self.cycle is last and (last is None or last.response_complete):
            self.transport.close()


@final
class _Process(uvicorn.Server):
    """Stops listening, answers what arrives on open connections and closes them, then ends."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        self._service.closing = True
        await asyncio.sleep(LINGER)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: an address or a name of this machine.
        port: 0 for any that is free.

    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"Cannot listen on {host} port {port}: {error}. Choose another."
        ) from None


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, finish what was accepted, and return.

    Args:
        app: made by `create_app`.
        listener: made by `listen`.
    """
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=PATIENCE,
    )
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        # The signal is raised once more at the end, for handlers of before: these ones do nothing.
        _Process(config, app.state.service).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
