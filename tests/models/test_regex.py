"""Expressions of strangers: what Python's `re` says, in linear time; Python itself is the judge."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError
from halfbyte.models import automaton
from halfbyte.models.regex import Patterns, check_expression

ATOMS = ["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", r"\w", "1", r"\b", "^", "$", "(?i:A)", r"\s", r"\Z", "[^\\d_]"]
atoms = st.sampled_from(ATOMS)
repeats = st.sampled_from(["", "", "*", "+", "?", "{0,2}", "{2}", "{1,}", "*?", "+?"])


def nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    sequence = st.lists(st.builds(str.__add__, inner, repeats), min_size=1, max_size=3).map("".join)
    wrapped = st.builds("({}{})".format, st.sampled_from(["", "?:", "?=", "?!"]), sequence)
    return wrapped | st.builds("({}|{})".format, sequence, sequence)


def is_valid(expression: str) -> bool:
    try:
        re.compile(expression)
    except re.error:
        return False
    return True


expressions = st.recursive(atoms, nested, max_leaves=8).filter(is_valid)
texts = st.text(alphabet="aAb1_. \n", min_size=1, max_size=8)


@pytest.mark.slow
@settings(max_examples=400)
@given(expressions, texts)
def test_matches_are_those_of_python(expression: str, text: str) -> None:
    compiled = re.compile(expression)
    assert Patterns([f"re:{expression}"], "it").match(text) == bool(compiled.match(text))
    assert Patterns([f"re:{expression}"], "it", anywhere=True).match(text) == bool(compiled.search(text))


@pytest.mark.slow
@settings(max_examples=100)
@given(st.lists(expressions, min_size=2, max_size=4), texts)
def test_a_list_matches_what_one_of_its_expressions_matches(several: list[str], text: str) -> None:
    expected = any(re.match(expression, text) for expression in several)
    assert Patterns([f"re:{expression}" for expression in several], "it").match(text) == expected


@pytest.mark.parametrize(
    "expression",
    [
        r"^(([a-z0-9._])+)+\$$",
        r"(a|a)*$x",
        r"(a|aa)+$x",
        r"(.*a){20}b",
        r".*.*.*.*.*.*.*.*x",
        r"(?!(a+)+$)b",
        r"(?:(?:)*)*x",
        r"(){1000000000}x",
        r"(?=(?=(?=.*a)*.*b)*.*)*x",
    ],
)
def test_expressions_on_which_backtracking_never_ends_take_no_time(expression: str) -> None:
    began = time.process_time()
    assert not Patterns([f"re:{expression}"], "it").match("a" * 3000)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("[", "unterminated character set"),
        (r"(a*)\1", "refers to a group"),
        ("(?<=a)b", "looks behind"),
        ("(?<!a)b", "looks behind"),
        ("((a{1,1000}){1,1000}){1,1000}", "too large"),
        ("(" * 5000 + ")" * 5000, "nested too deeply"),
        ("a" * 100_000, "more than 20000 characters"),
        ("(?m)^a", "flags that are not supported"),
        ("a{99999999999999999999}", "repetition number is too large"),
    ],
)
def test_what_cannot_be_matched_in_linear_time_is_refused_with_a_reason(expression: str, reason: str) -> None:
    assert reason in str(check_expression(expression))
    with pytest.raises(CheckpointError, match="the targets of it"):
        Patterns([f"re:{expression}"], "the targets of it")


@pytest.mark.slow
def test_many_large_expressions_do_not_fill_the_memory() -> None:
    with pytest.raises(CheckpointError, match="too large"):
        Patterns([f"re:(a{{0,900}}b){i}" for i in range(10_000)], "it")


def test_work_beyond_what_the_texts_pay_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automaton, "_FREE_VISITS", 500)
    monkeypatch.setattr(automaton, "_VISITS_PER_CHARACTER", 0)
    slow = Patterns([r"re:(?:(?!b).(?!c).){0,200}x"], "the targets")
    with pytest.raises(CheckpointError, match="the targets hold an expression that takes too much work"):
        slow.match("a" * 2000)


def test_names_and_whole_names_as_expressions_are_found_without_an_automaton() -> None:
    patterns = Patterns(["lm_head", r"re:^model\.norm$"], "it")
    assert patterns.match("lm_head") and patterns.match("model.norm") and patterns.match("model.norm\n")
    assert not patterns.match("lm_head2") and not patterns.match("model.norm2") and not patterns._parts


def test_names_with_the_same_beginning_do_not_answer_for_each_other() -> None:
    patterns = Patterns([r"re:.*layers\.\d+\.mlp\.experts\.\d+\.up_proj$"], "it")
    names = [f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in (0, 1) for e in (0, 1) for p in ("up", "down")]
    assert [patterns.match(name) for name in names * 2] == [name.endswith("up_proj") for name in names * 2]
