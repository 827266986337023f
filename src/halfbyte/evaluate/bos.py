"""Whether the token that begins a text stands before every window, as models expect that were trained so."""

from __future__ import annotations

from typing import Any, Literal, get_args

from halfbyte.errors import HalfbyteError

Bos = Literal["auto", "yes", "no"]
BOS: tuple[str, ...] = get_args(Bos)


def bos_token(tokenizer: Any, wish: str) -> int | None:
    """Return the token id that begins every window, or None.

    ``auto``: what the tokenizer puts before a text by itself. HalfbyteError for ``yes`` where it has no such token.
    """
    if wish not in BOS:
        raise HalfbyteError(f"bos is {wish!r}, but must be one of {', '.join(BOS)}")
    token = getattr(tokenizer, "bos_token_id", None)
    if wish == "no":
        return None
    if token is None:
        if wish == "yes":
            raise HalfbyteError("the tokenizer has no token that begins a text (BOS); leave out --bos yes")
        return None
    if wish == "yes":
        return int(token)
    with_special, plain = (tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (True, False))
    return int(token) if list(with_special[:1]) == [token] and list(plain[:1]) != [token] else None
