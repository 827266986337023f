"""Ids of stored responses, by which a client goes on with a conversation that the engine keeps."""

from __future__ import annotations

import re

_ID = re.compile(rb'"id"\s*:\s*"(resp[A-Za-z0-9_-]{1,128})"')


def response_id(path: str, head: bytes) -> str:
    """Return the id in the first bytes of an answer of /v1/responses, an empty string elsewhere."""
    match = _ID.search(head) if path.endswith("/responses") else None
    return match[1].decode() if match else ""
