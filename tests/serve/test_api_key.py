"""Keys and hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.serve.api_key import host_is_allowed, is_authorized, is_loopback, read_key


def test_a_key_is_the_files_only_word(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(" abc\n")
    assert read_key(path) == "abc"
    for content in (b"", b" \n", b"a b", "é".encode()):
        path.write_bytes(content)
        with pytest.raises(HalfbyteError):
            read_key(path)
    with pytest.raises(HalfbyteError, match="cannot be read"):
        read_key(tmp_path / "none")


@pytest.mark.parametrize(
    ("header", "expected"),
    [("Bearer abc", True), ("bearer abc", True), ("Bearer abcd", False), ("abc", False), (None, False),
     ("Basic abc", False), ("Bearer ü", False)],
)  # fmt: skip
def test_a_header_must_carry_the_key(header: str | None, expected: bool) -> None:
    assert is_authorized("abc", header) is expected
    assert is_authorized(None, header)


@pytest.mark.parametrize(
    ("header", "bound", "expected"),
    [("localhost:8080", "127.0.0.1", True), ("127.0.0.1", "127.0.0.1", True), ("[::1]:80", "::1", True),
     ("evil.example:8080", "127.0.0.1", False), (None, "127.0.0.1", False), ("evil.example", "0.0.0.0", True)],
)  # fmt: skip
def test_on_loopback_only_names_of_this_machine_are_answered(header: str | None, bound: str, expected: bool) -> None:
    assert host_is_allowed(header, bound) is expected


def test_what_is_loopback() -> None:
    assert is_loopback("127.0.0.5") and is_loopback("localhost") and is_loopback("::1")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")
