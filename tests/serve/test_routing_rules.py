"""The rules file: what it may say, and what a rule matches."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.serve.request_facts import facts_of
from halfbyte.serve.routing_rules import RoutingRule, builtin_rules, has_keyword, load_rules, parse_rules

ENGLISH = "How do I write to the bank, and what is it that they want from me?"


def rule(**keys: Any) -> RoutingRule:
    return RoutingRule.model_validate({"name": "r", "precision": "4bit", **keys})


def matches(conditions: dict[str, Any], text: str = "Hello", **request: Any) -> bool:
    return rule(**conditions).matches(facts_of({"messages": [{"role": "user", "content": text}], **request}))


@pytest.mark.parametrize(
    ("conditions", "text", "request_keys", "expected"),
    [
        ({"keywords": ["code"]}, "fix my CODE!", {}, True),
        ({"keywords": ["code"]}, "decode the barcode", {}, False),
        ({"keywords": ["代码"]}, "修复代码错误", {}, True),
        ({"keywords": ["fix my"]}, "please fix my code", {}, True),
        ({"patterns": [r"\bdef \w+\("]}, "DEF main(): pass", {}, True),
        ({"keywords": ["no"], "patterns": ["colou?r"]}, "the color", {}, True),
        ({"all_of": [["mail", "inbox"], ["calendar"]]}, "my inbox and my calendar", {}, True),
        ({"all_of": [["mail", "inbox"], ["calendar"]]}, "my inbox", {}, False),
        ({"tools": True}, "Hello", {"tools": [{}]}, True),
        ({"tools": True}, "Hello", {}, False),
        ({"tools": False, "keywords": ["hello"]}, "Hello", {}, True),
        ({"length": {"at_least": 6}}, "Hello", {}, False),
        ({"length": {"at_most": 5}}, "Hello", {}, True),
        ({"max_tokens": {"at_least": 100}}, "Hello", {"max_completion_tokens": 100}, True),
        ({"max_tokens": {"at_least": 100}}, "Hello", {}, False),
        ({"language": ["en", "de"]}, ENGLISH, {}, True),
        ({"language": ["de"]}, ENGLISH, {}, False),
        ({"look_in": "system", "keywords": ["hello"]}, "Hello", {}, False),
    ],
)
def test_a_rule_matches_if_all_its_conditions_hold(
    conditions: dict[str, Any], text: str, request_keys: dict[str, Any], expected: bool
) -> None:
    assert matches(conditions, text, **request_keys) is expected


def test_images_are_a_condition() -> None:
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    assert rule(images=True).matches(facts_of({"messages": [{"role": "user", "content": image}]}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules: []", "default: Field required"),
        ("default: 4bit\nrules: [{name: a, precision: 4bit}]", "rule 1: it has no condition"),
        (
            "default: 4bit\nrules: [{name: a, precision: 4bit, keyword: [x]}]",
            "unknown key 'keyword'; nearest: keywords",
        ),
        ("default: 4bit\nrules: [{name: 'a b', precision: 4bit, tools: true}]", "is no name"),
        ("default: 4bit\nrules: [{name: default, precision: 4bit, tools: true}]", "is the router's own"),
        ("default: 4bit\nrules: [{name: a, precision: 4bit, patterns: ['(a']}]", "cannot be used: missing )"),
        ("default: 4bit\nrules: [{name: a, precision: 4bit, patterns: ['(.)\\1']}]", "refers to a group"),
        ("default: 4bit\nrules: [{name: a, precision: 4bit, patterns: ['(?=.*a)b']}]", "looks ahead; write `all_of`"),
        ("default: 4bit\nrules: [{name: a, precision: 4bit, language: [xx]}]", "the language 'xx' is not one of"),
        ("default: 4bit\nrules: [{name: a, precision: 4bit, length: {}}]", "give `at_least`, `at_most` or both"),
        ("default: 4bit\nrules: [{name: a, precision: 4bit, keywords: ['']}]", "a keyword is empty"),
        (
            "default: 4bit\nrules: [{name: a, precision: x, tools: true}, {name: a, precision: x, tools: true}]",
            "two rules",
        ),
        ("[1]", "are a mapping"),
        ("default: !!python/name:os.system x", "the tag"),
    ],
)
def test_a_wrong_file_is_one_sentence(text: str, words: str) -> None:
    with pytest.raises(HalfbyteError) as caught:
        parse_rules(text, "rules.yaml")
    assert str(caught.value).startswith("rules.yaml") and words in str(caught.value)


def test_quantclaws_table_gives_24_task_types_and_a_default() -> None:
    rules = load_rules("quantclaw")
    precisions = [rule.precision for rule in rules.rules]
    assert builtin_rules() == ["quantclaw"] and len(rules.rules) == 24
    assert (precisions.count("4bit"), precisions.count("16bit"), rules.default) == (9, 15, "16bit")
    assert all(rule.description for rule in rules.rules)


def test_rules_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("default: bf16\nrules: [{name: short, precision: nvfp4, length: {at_most: 9}}]")
    assert load_rules(path).rules[0].name == "short"


def test_a_file_that_is_not_there_names_the_built_in_rules(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="built-in rules are quantclaw"):
        load_rules(tmp_path / "quantclow")
    (tmp_path / "rules.yaml").write_bytes(b"\xff")
    with pytest.raises(HalfbyteError, match="not UTF-8"):
        load_rules(tmp_path / "rules.yaml")


def test_a_hostile_text_takes_linear_time() -> None:
    slow = rule(patterns=["(a+)+b", "(a|aa)+c"])
    facts = facts_of({"prompt": "a" * 20_000})
    start = time.process_time()
    assert not slow.matches(facts) and time.process_time() - start < 2


@pytest.mark.parametrize(("text", "found"), [("a cod", False), ("code", True), ("code_", False), ("(code)", True)])
def test_keywords_are_whole_words(text: str, found: bool) -> None:
    assert has_keyword(text, "code") is found
