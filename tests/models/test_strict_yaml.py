from __future__ import annotations

import time

import pytest

from halfbyte.models.strict_yaml import load_yaml


def test_plain_data_is_read() -> None:
    assert load_yaml("a: [1, true, x]\nb: {c: null}") == {"a": [1, True, "x"], "b": {"c": None}}


def test_a_repeated_key_is_refused_with_both_lines() -> None:
    with pytest.raises(ValueError, match=r"line 3: the key 'a' is already given in line 1"):
        load_yaml("a: 1\nb: 2\na: 3")


def test_a_repeated_key_in_a_nested_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="'format'"):
        load_yaml("rules:\n  - {match: x, format: a, format: b}")


def test_a_syntax_error_names_the_line() -> None:
    with pytest.raises(ValueError, match=r"^line [23]: "):
        load_yaml("a: 1\nb: [")


def test_python_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="python"):
        load_yaml("!!python/object/apply:os.getcwd []")


def test_a_key_that_is_not_text_is_refused() -> None:
    with pytest.raises(ValueError, match="plain text"):
        load_yaml("? [a, b]\n: 1")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested more than"),
        ("{a: " * 100_000, "nested more than"),
        ("- " * 100_000 + "x", "nested more than"),
        ("a: !!bool maybe", "tag"),
        ("a: !!int x", "tag"),
        ("a: !!timestamp x", "tag"),
        ("a: !!binary '*'", "tag"),
        ("a: 2020-99-99", "month"),
        ("a: &a [*a]", "alias"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]", "alias"),
        ("a: " + "9" * 6000, "digits"),
        ("a: 1:" + "1:" * 100_000 + "1", "line 1: a number of more than 100 digits"),
        ("a: 0x" + "9" * 100_000, "digits"),
        ("a: &a {x: 1}\nb: {<<: *a}", "line 2: merge keys"),
        ("a: &a {x: 1}\nb: {<<: [*a, *a]}", "line 2: merge keys"),
        ("<<: 3", "merge keys"),
        ("a: \x1b[31m", "control characters"),
        ("a: =", "tag"),
    ],
)
def test_what_crashes_parsers_is_one_sentence(text: str, reason: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=reason) as caught:
        load_yaml(text)
    assert "\n" not in str(caught.value) and time.process_time() - began < 2
