"""Mutations: bytes changed anywhere, and JSON documents with one value replaced by one that nobody expects."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

NUMBERS = [0, 1, -1, 2, 7, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**400]
STRINGS = [
    "",
    " ",
    "\0",
    "..",
    "../../x",
    "/etc/passwd",
    "a" * 5000,
    "é",
    "\ud800",
    "\u202e",
    "re:(a+)+$",
    "re:.*",
    "nan",
]
VALUES: list[Any] = [None, True, False, [], {}, [[]], {"": {}}, 0.5, -0.0, 1e308, float("inf"), float("nan")]
VALUES += [*NUMBERS, *STRINGS, [0] * 1000, {str(i): i for i in range(200)}]
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"\\",
    b"\n",
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b"99999999999999999999",
]
TOKENS += [
    b"NaN",
    b"\\ud800",
    b"\xff\xfe",
    b"\0",
    b"[" * 3000,
    b'{"a":' * 500,
    b"&a",
    b"*a",
    b"!!python/object:os.system",
]
TOKENS += [b"\xff" * 8, b"\0" * 8, b"\x00\x00\x00\x00\x00\x00\x00\x80"]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four random changes of some bytes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        rng.choice(CHANGES)(out, rng)
    return bytes(out)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON document with one to three values or keys replaced; other bytes, if it is none."""
    try:
        document = json.loads(data)
    except ValueError:
        return mutate(data, rng)
    for _ in range(rng.randint(1, 3)):
        document = _replace(document, rng)
    return json.dumps(document).encode()


def _replace(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """Walk down to a random place and put something else there."""
    if not isinstance(value, (dict, list)) or not value or (depth and rng.random() < 0.15):
        return rng.choice(VALUES)
    if isinstance(value, list):
        copy: Any = list(value)
        at: Any = rng.randrange(len(copy))
    else:
        copy, at = dict(value), rng.choice(list(value))
        if rng.random() < 0.1:
            copy[rng.choice(STRINGS)] = copy.pop(at)
            return copy
    if rng.random() < 0.1:
        del copy[at]
    else:
        copy[at] = _replace(copy[at], rng, depth + 1)
    return copy


def _flip(out: bytearray, rng: random.Random) -> None:
    if out:
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)


def _set(out: bytearray, rng: random.Random) -> None:
    if out:
        out[rng.randrange(len(out))] = rng.randrange(256)


def _cut(out: bytearray, rng: random.Random) -> None:
    del out[rng.randint(0, len(out)) :]


def _delete(out: bytearray, rng: random.Random) -> None:
    at = rng.randint(0, len(out))
    del out[at : at + rng.randint(1, 32)]


def _repeat(out: bytearray, rng: random.Random) -> None:
    at = rng.randint(0, len(out))
    out[at:at] = out[at : at + rng.randint(1, 64)]


def _insert(out: bytearray, rng: random.Random) -> None:
    at = rng.randint(0, len(out))
    out[at:at] = rng.choice(TOKENS)


def _overwrite(out: bytearray, rng: random.Random) -> None:
    token, at = rng.choice(TOKENS), rng.randint(0, len(out))
    out[at : at + len(token)] = token


def _number(out: bytearray, rng: random.Random) -> None:
    """A little-endian count or offset, as binary headers have them."""
    size, at = rng.choice((4, 8)), rng.randint(0, len(out))
    out[at : at + size] = (rng.choice(NUMBERS) % (1 << (8 * size))).to_bytes(size, "little")


CHANGES: list[Callable[[bytearray, random.Random], None]] = [
    _flip,
    _set,
    _cut,
    _delete,
    _repeat,
    _insert,
    _overwrite,
    _number,
]
