"""Conversations in ShareGPT form, through the chat template: the passage that divergences are published on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.files import parse_json, read_small
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.settings import CONVERSATION_LENGTH, CONVERSATIONS
from halfbyte.evaluate.text import MAX_TEXT_BYTES, Passage, sha256_of
from halfbyte.evaluate.windows import Protocol, Window
from halfbyte.runtime.templates import apply_template

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}
SHORT, REFUSED, FOREIGN = "too short", "refused by the chat template", "of an unknown form"

Messages = list[dict[str, str]]


def read_conversations(path: str | Path) -> list[Messages | None]:
    """Conversations of a JSON file: a list of {"conversations": [{"from", "value"}]} or {"messages": [{"role",
    "content"}]}. None stands for one that is neither; HalfbyteError if the file is no such list at all.
    """
    path = Path(path)
    content = parse_json(read_small(path, MAX_TEXT_BYTES), path.name, strict=False)
    if not isinstance(content, list):
        raise HalfbyteError(f"{path} must hold a JSON list of conversations in ShareGPT form")
    every = [_messages(item) for item in content]
    if not any(every):
        raise HalfbyteError(
            f"{path} holds no conversation; each must be an object with `conversations`, a list of objects with "
            "`from` and `value`"
        )
    return every


def _messages(item: Any) -> Messages | None:
    if not isinstance(item, dict):
        return None
    turns = item.get("conversations") or item.get("messages")
    if not isinstance(turns, list) or not turns:
        return None
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            return None
        role = _ROLES.get(str(turn.get("from", turn.get("role"))))
        text = turn.get("value", turn.get("content"))
        if role is None or not isinstance(text, str):
            return None
        messages.append({"role": role, "content": text})
    return messages


def conversations_of(
    path: str | Path, tokenizer: Any, dtype: str, count: int = CONVERSATIONS, length: int = CONVERSATION_LENGTH
) -> Passage:
    """The first ``count`` conversations that fill ``length`` tokens, cut there; all tokens but the first are scored.

    What is skipped on the way is counted in the protocol.
    """
    if length < 2:
        raise HalfbyteError(f"a conversation of {length} token(s) predicts nothing; the length must be at least 2")
    if not getattr(tokenizer, "chat_template", None):
        raise HalfbyteError("the tokenizer has no chat template, so conversations cannot be spelled; pass a --text")
    tokens: list[int] = []
    cut: list[Window] = []
    skipped: Counter[str] = Counter()
    for messages in read_conversations(path):
        if len(cut) == count:
            break
        ids = None if messages is None else render(messages, tokenizer)
        if messages is None or ids is None:
            skipped[FOREIGN if messages is None else REFUSED] += 1
        elif len(ids) < length:
            skipped[SHORT] += 1
        else:
            start = len(tokens)
            cut.append(Window(start, start + length, start + 1))
            tokens += ids[:length]
    if not cut:
        why = ", ".join(f"{n} {what}" for what, n in skipped.items())
        raise HalfbyteError(f"no conversation of {path} can be used with {length} tokens each ({why})")
    scored = len(cut) * (length - 1)
    protocol = Protocol(
        Path(path).name,
        length,
        length,
        len(cut),
        scored,
        dtype,
        kind="conversations",
        sha256=sha256_of(tokens),
        skipped=dict(skipped),
    )
    return Passage(tokens, cut, protocol)


def render(messages: Messages, tokenizer: Any) -> list[int] | None:
    """A conversation as the chat template spells it, in tokens; None where the template refuses it."""
    from jinja2.exceptions import TemplateError

    try:
        text = apply_template(tokenizer, messages, tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return None
    # the template spells the special tokens itself
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
