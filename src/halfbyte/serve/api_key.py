"""The key that clients must send, and hosts that they may call the router by."""

from __future__ import annotations

import hmac
import ipaddress
from pathlib import Path

from halfbyte.checkpoint.files import read_small
from halfbyte.errors import CheckpointError, HalfbyteError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_LONGEST = 4096


def read_key(path: str | Path) -> str:
    """Read a key from a file, without the white space around it; HalfbyteError for an empty or unreadable one."""
    try:
        key = read_small(Path(path), _LONGEST).decode("ascii").strip()
    except CheckpointError as error:
        raise HalfbyteError(f"the key file {path} cannot be read: {error}") from None
    except UnicodeDecodeError:
        raise HalfbyteError(f"the key file {path} holds characters that are not ASCII") from None
    if not key or any(character.isspace() for character in key):
        raise HalfbyteError(f"the key file {path} must hold one key without spaces")
    return key


def is_authorized(key: str | None, authorization: str | None) -> bool:
    """Whether an ``Authorization`` header carries the key; takes the same time wherever the two differ."""
    if key is None:
        return True
    scheme, _, given = (authorization or "").partition(" ")
    # header values are Latin-1, and comparing text of other characters is refused
    same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), key.encode())
    return same and scheme.lower() == "bearer"


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reachable from this machine alone."""
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_is_allowed(header: str | None, bound: str) -> bool:
    """Whether a ``Host`` header may reach a router bound to ``bound``.

    On loopback only names of this machine may, so that no web page reaches it under a name of its own (DNS rebinding).
    """
    if not is_loopback(bound):
        return True
    value = header or ""
    name = value[1 : value.find("]")] if value.startswith("[") else value.partition(":")[0]
    return name.lower() in LOOPBACK or name == bound
