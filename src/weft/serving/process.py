"""The process that serves: its socket, its signals, and an end that loses no request."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from types import FrameType
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

PATIENCE = 30.0
"""Seconds in which the header of a connection's next request must be whole, and in which a client
must read some of what waits for it."""

UNSENT = 2**18
"""Bytes that the system takes for a connection before its client reads them; in larger portions
it would not be seen that a slow client reads at all."""

GRACE = 5.0
"""Seconds in which clients may read their answers once all requests have run, at the end."""

AGAIN = 1.0
"""Seconds after a signal in which another one is taken for the same, told twice."""


@final
class _Connection(H11Protocol):
    """Closes if the next request does not come in time, however slowly its bytes do."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().connection_lost(exc)

    def _wait(self) -> None:
        """Look at the connection again when its client has had time to do something."""
        if self._timer is not None:
            self._timer.cancel()
        unread = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(PATIENCE, self._give_up, self.cycle, unread)

    def _give_up(self, last: RequestResponseCycle | None, before: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if 0 < before <= unread:
            self.transport.abort()  # closing would wait until what is unread has been read
        elif unread or self.cycle is not last or (last is not None and not last.response_complete):
            self._wait()
        else:
            self.transport.close()


@final
class _Process(uvicorn.Server):
    """Stops listening, answers what arrives on open connections and closes them, then ends."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._asked: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        elif now - self._asked > AGAIN:
            sys.stderr.write("Ended at once; requests may be lost.\n")
            sys.stderr.flush()
            os._exit(128 + sig)  # whatever a forward or a client does
        super().handle_exit(signal.SIGTERM, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        self._service.closing = True
        await asyncio.sleep(LINGER)
        aborting = asyncio.ensure_future(self._abort_unread())
        try:
            await super().shutdown(sockets)
        finally:
            aborting.cancel()

    async def _abort_unread(self) -> None:
        """End connections whose clients do not read, or do not send what they began to."""
        since = time.monotonic()
        while True:
            await asyncio.sleep(0.1)
            now = time.monotonic()
            if self._service.busy:
                since = now
            elif now - since > GRACE:
                for connection in list(self.server_state.connections):
                    connection.transport.abort()


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
        made = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"Cannot listen on {host} port {port}: {error}. Choose another."
        ) from None
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT)
    # It has to name its protocol: asyncio turns off Nagle's algorithm, which would hold back the
    # end of every answer for 40 ms, only where that is said.
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=made.detach())


def configured(app: FastAPI) -> uvicorn.Config:
    """How uvicorn is to run an application.

    Args:
        app: made by `create_app`.
    """
    return uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=round(PATIENCE),
    )


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, finish what was accepted, and return.

    Clients that do not read are left after a while. Another signal ends the process at once.

    Args:
        app: made by `create_app`.
        listener: made by `listen`.
    """
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        # The signal is raised once more at the end, for handlers of before: these ones do nothing.
        _Process(configured(app), app.state.service).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
