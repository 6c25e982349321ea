"""Responses that can always be written, whatever names came in a request or lie in a bank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, final

from starlette.responses import JSONResponse


@final
class Json(JSONResponse):
    """JSON in UTF-8; halves of a character, which JSON can spell and UTF-8 cannot, become "?"."""

    def render(self, content: Any) -> bytes:
        """The body."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


def refusal(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Json:
    """The response to a request that gets no answer.

    Args:
        status: 4xx or 5xx.
        code: a word for programs.
        message: a sentence for people.
        headers: further ones.
    """
    return Json({"error": {"code": code, "message": message}}, status, headers)
