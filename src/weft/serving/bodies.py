"""Reading request bodies: bounded in bytes, in time, and in memory over all connections."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import final

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from .inputs import Limits, RequestError

AT_ONCE = 16
"""Whole bodies of the greatest size that are held in memory at the same time."""


@final
class BodyReader:
    """Reads the bodies of all requests of a server.

    Args:
        limits: what a request may cost.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The bytes of a request, held for a ``with`` block.

        Raises:
            RequestError: too large, too slow, cut short, or too much arrives at once.
        """
        said = request.headers.get("content-length", "0")
        if not said.isdecimal() or int(said[:20]) > self._limits.body:
            raise self._too_large()
        parts: list[bytes] = []
        try:
            try:
                await asyncio.wait_for(self._collect(request, parts), self._limits.body_seconds)
            except asyncio.TimeoutError:
                seconds = f"{self._limits.body_seconds:g}"
                message = f"The body did not arrive within {seconds} seconds."
                raise RequestError(408, "too_slow", message, {"Connection": "close"}) from None
            yield b"".join(parts)
        finally:
            self._held -= sum(map(len, parts))

    async def _collect(self, request: Request, parts: list[bytes]) -> None:
        size, more = 0, True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise RequestError(400, "malformed", "The connection ended before the body.")
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size > self._limits.body:
                raise self._too_large()
            if self._held + len(part) > AT_ONCE * self._limits.body:
                why = "Too many bodies are arriving. Try again later."
                raise RequestError(503, "overloaded", why, {"Retry-After": "1"})
            self._held += len(part)
            parts.append(part)

    def _too_large(self) -> RequestError:
        return RequestError(
            413, "too_large", f"The body is too large; up to {self._limits.body:,} bytes are read."
        )


async def form_of(headers: Headers, body: bytes, images: int) -> FormData:
    """The fields of a multipart body.

    Args:
        headers: of the request.
        body: its bytes.
        images: how many files there may be.

    Raises:
        RequestError: it is malformed.
    """
    boundary = parse_options_header(headers.get("content-type"))[1].get(b"boundary", b"")
    if not re.fullmatch(rb"[!-~ ]{1,200}", boundary) or set(boundary) & set(b'"\\'):
        raise RequestError(400, "malformed", "The form cannot be read: it has no boundary")
    # Only UTF-8: with a codec of its choice, a request could spell what is no text at all.
    plain = Headers({"content-type": f'multipart/form-data; boundary="{boundary.decode()}"'})

    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(
        plain, once(), max_files=images, max_fields=10_000, max_part_size=len(body)
    )
    parser.spool_max_size = len(body) + 1  # in memory, never on the disk
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        reason = error.message if isinstance(error, MultiPartException) else "it is damaged"
        raise RequestError(400, "malformed", f"The form cannot be read: {reason}") from None


async def files_of(form: FormData, field: str) -> list[bytes]:
    """The files of a field; values of the field that are no files do not count."""
    files = [value for value in form.getlist(field) if isinstance(value, UploadFile)]
    return [await file.read() for file in files]
