"""Formats by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from halfbyte.errors import FormatError
from halfbyte.formats import get_format, list_formats
from halfbyte.formats.registry import register


@pytest.mark.parametrize(
    ("alias", "name"),
    [("fp8", "fp8_channel"), ("fp8_block", "fp8_block128"), ("mixfp4_compressed_tensors", "mixfp4")],
)
def test_an_alias_stands_for_a_format(alias: str, name: str) -> None:
    assert get_format(alias) is get_format(name)
    assert alias not in list_formats()


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
def test_a_name_or_alias_that_is_taken_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match=f"the name '{name}' belongs to the format {get_format(name).name} already"):
        register(replace(get_format("nvfp4"), name=name))
    with pytest.raises(FormatError, match=f"the name '{name}' belongs"):
        register(replace(get_format("nvfp4"), name="new_name"), name)
    assert "new_name" not in list_formats()


def test_a_format_stands_for_itself() -> None:
    fmt = replace(get_format("nvfp4"), name="of my own")
    assert get_format(fmt) is fmt


def test_an_unknown_name_is_told_the_nearest_or_all() -> None:
    with pytest.raises(FormatError, match="unknown format 'nvfp5': did you mean nvfp4"):
        get_format("nvfp5")
    with pytest.raises(FormatError, match=r"unknown format 'zzz': known formats: .*nvfp4"):
        get_format("zzz")
    with pytest.raises(FormatError, match=f"unknown format '{'z' * 64}': "):
        get_format("z" * 1000)


def test_a_rotation_behind_the_name_makes_the_rotated_format() -> None:
    rotated = get_format("int4_g32_hadamard")
    assert rotated.name == "int4_g32_hadamard" and rotated.plain is get_format("int4_g32")
    with pytest.raises(FormatError, match="unknown format 'int4_g32_turned'"):
        get_format("int4_g32_turned")
