from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.text import find_text, tokens_of


def by_letter(text: str, **kwargs: Any) -> dict[str, list[int]]:
    """A tokenizer with one token per character."""
    assert kwargs["add_special_tokens"] is False
    return {"input_ids": [ord(c) for c in text]}


def test_a_text_becomes_tokens_and_only_the_first_ones_if_so_asked(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("naïve — text", encoding="utf-8")
    assert tokens_of(path, by_letter, None) == [ord(c) for c in "naïve — text"]
    assert tokens_of(path, by_letter, 3) == [ord(c) for c in "naï"]


def test_a_text_of_very_long_tokens_is_read_as_far_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("-" * 20_000)

    def by_page(text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text) // 1000))}

    assert tokens_of(path, by_page, 12) == list(range(12))


def test_a_model_that_travels_with_a_held_out_text_is_measured_on_it(tmp_path: Path) -> None:
    (tmp_path / "heldout.txt").write_text("x")
    assert find_text(None, tmp_path) == tmp_path / "heldout.txt"


def test_without_a_text_the_error_says_how_to_pass_one(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="--text FILE"):
        find_text(None, tmp_path)


def test_a_text_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="is no file"):
        find_text(tmp_path / "nothing.txt", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"x", "at least 2"),
        (b"caf\xe9 au lait", "no UTF-8 text .* byte 3"),
    ],
)
def test_texts_that_cannot_be_measured_on_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(HalfbyteError, match=message):
        tokens_of(path, by_letter, None)
