"""Which parts of a name are numbers."""

from __future__ import annotations

import pytest

from halfbyte.models.name_templates import normalise


@pytest.mark.parametrize("number", ["0", "7", "61", "999999999999999999"])
def test_numbers_as_engines_write_them_are_numbers(number: str) -> None:
    assert normalise(f"layers.{number}.up") == "layers.#.up"


@pytest.mark.parametrize("number", ["007", "00", "9" * 5000, "\u0663", "1_0", "-1", ""])
def test_other_digits_are_text_so_that_no_two_names_mean_one_number(number: str) -> None:
    assert normalise(f"layers.{number}.up") == f"layers.{number}.up"
