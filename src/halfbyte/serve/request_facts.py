"""What routing rules look at in a request: its texts, tools, images, lengths. Plain data, no server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.serve.language import language_of

LONGEST = 20_000
"""Characters of one text that rules see; of a longer text, the first and the last half of that."""
_IMAGES = frozenset({"image_url", "input_image", "image"})


@dataclass(frozen=True)
class RequestFacts:
    """One request, as rules see it.

    ``last_user``, ``user``, ``system``, ``everything``: texts, cut to ``LONGEST``. ``length``: characters of all
    messages, uncut. ``turns``: answers that the conversation has so far. ``conversation``: equal for requests that
    begin with the same messages, empty where nothing identifies a conversation.
    """

    last_user: str
    user: str
    system: str
    everything: str
    length: int
    tools: bool
    images: bool
    max_tokens: int | None
    turns: int
    conversation: str

    @property
    def language(self) -> str:
        """ISO 639-1 code of the last user message, or an empty string."""
        return language_of(self.last_user)


def facts_of(request: Mapping[str, Any]) -> RequestFacts:
    """Read the facts of a request to chat/completions, completions, responses or embeddings; never raises."""
    messages = list(_messages(request))
    texts = [(role, "\n".join(_texts(content))) for role, content in messages]
    user = [text for role, text in texts if role == "user"]
    system = [text for role, text in texts if role in ("system", "developer")]
    first = [(role, text) for role, text in texts if role != "assistant"][: len(system) + 1]
    return RequestFacts(
        last_user=cut(user[-1] if user else ""),
        user=cut("\n".join(user)),
        system=cut("\n".join(system)),
        everything=cut("\n".join(text for _, text in texts)),
        length=sum(len(text) for _, text in texts),
        tools=bool(request.get("tools") or request.get("functions")),
        images=any(_has_image(content) for _, content in messages),
        max_tokens=_number(request, "max_tokens", "max_completion_tokens", "max_output_tokens"),
        turns=sum(role == "assistant" for role, _ in messages),
        conversation=_fingerprint(first) if messages and "messages" in request else "",
    )


def cut(text: str) -> str:
    """Shorten a text to ``LONGEST`` characters by leaving out its middle."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}\n{text[-LONGEST // 2 :]}"


def _messages(request: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Role and content of every message; a bare prompt or input is a user's."""
    for key in ("instructions", "messages", "prompt", "input"):
        value = request.get(key)
        if key == "instructions" and isinstance(value, str):
            yield "system", value
        elif isinstance(value, str):
            yield "user", value
        elif isinstance(value, list):
            for message in value:
                if isinstance(message, dict):
                    yield str(message.get("role", "user")), message.get("content")
                elif isinstance(message, str):
                    yield "user", message


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]


def _has_image(content: Any) -> bool:
    return isinstance(content, list) and any(isinstance(p, dict) and p.get("type") in _IMAGES for p in content)


def _number(request: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = request.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _fingerprint(messages: list[tuple[str, str]]) -> str:
    text = json.dumps(messages)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
