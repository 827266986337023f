"""Server-sent events on their way through: whole events only, counted, never changed."""

from __future__ import annotations

import json
from typing import Any

LONGEST = 2**20
"""Bytes of an unfinished event that are held back; a longer one passes in pieces."""
_USAGE = (b'"usage":{', b'"usage": {')


class EventSplitter:
    """Holds back the unfinished end of a stream, so that what breaks off leaves no half event behind."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """Return all complete events that the chunk ends, byte for byte."""
        data = self._rest + chunk
        end = max(_behind_last(data, b"\n\n"), _behind_last(data, b"\r\n\r\n"))
        if not end and len(data) > LONGEST:
            end = len(data)
        self._rest = data[end:]
        return data[:end]

    def rest(self) -> bytes:
        """Return what a stream that has ended in order left without a blank line."""
        rest, self._rest = self._rest, b""
        return rest


class TokenCount:
    """Tokens of an answer: from its ``usage`` where it has one, else one for each event with data."""

    def __init__(self) -> None:
        self.events = 0
        self.prompt = 0
        self.completion: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the answer."""
        return self.events if self.completion is None else self.completion

    def see_events(self, events: bytes) -> None:
        """Count complete events."""
        lines = b"\n" + events  # a text may hold "data:" too
        self.events += lines.count(b"\ndata:") - lines.count(b"\ndata: [DONE]")
        if any(mark in events for mark in _USAGE):
            for line in events.splitlines():
                if line.startswith(b"data:") and any(mark in line for mark in _USAGE):
                    self.see_body(line[5:])

    def see_body(self, body: bytes) -> None:
        """Read ``usage`` of a JSON body, if it has one."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            return
        usage = _usage(content)
        self.completion = _count(usage, "completion_tokens", "output_tokens") or self.completion
        self.prompt = _count(usage, "prompt_tokens", "input_tokens") or self.prompt


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API writes it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_event(path: str, message: str, code: str) -> bytes:
    """The event that ends a broken stream, in the words of the endpoint."""
    if path.endswith("/responses"):
        content = {"type": "error", "code": code, "message": message, "param": None, "sequence_number": 0}
        return b"event: error\ndata: " + json.dumps(content).encode() + b"\n\n"
    return b"data: " + json.dumps(error_body(message, "server_error", code)).encode() + b"\n\ndata: [DONE]\n\n"


def _behind_last(data: bytes, mark: bytes) -> int:
    place = data.rfind(mark)
    return place + len(mark) if place >= 0 else 0


def _usage(content: Any) -> dict[str, Any]:
    for holder in (content, content.get("response") if isinstance(content, dict) else None):
        if isinstance(holder, dict) and isinstance(holder.get("usage"), dict):
            return holder["usage"]  # type: ignore[no-any-return]
    return {}


def _count(usage: dict[str, Any], *keys: str) -> int | None:
    values = (usage.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int) and value >= 0), None)
