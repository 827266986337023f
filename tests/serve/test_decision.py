"""Which precision answers, and why."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.serve.decision import Decision, Precision, UnknownPrecision, check_rules, decide, escalation, resolve
from halfbyte.serve.request_facts import RequestFacts, facts_of
from halfbyte.serve.routing_rules import load_rules, parse_rules

W4, W8, W16 = Precision("nvfp4", 4.6), Precision("fp8", 8.2), Precision("bf16", 16.0)
ALL = (W16, W4, W8)
RULES = parse_rules(
    """
default: nvfp4
rules:
  - {name: with-tools, precision: bf16, tools: true}
  - {name: coding, precision: 16bit, keywords: [code]}
  - {name: chat, precision: 4bit, keywords: [hello]}
""",
    "rules",
)


def chat(*texts: str, **keys: Any) -> RequestFacts:
    roles = ("user", "assistant")
    return facts_of({"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], **keys})


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (chat("hello, fix my code"), Decision("bf16", "coding")),
        (chat("hello"), Decision("nvfp4", "chat")),
        (chat("hello", tools=[{}]), Decision("bf16", "with-tools")),
        (chat("good day"), Decision("nvfp4", "default")),
        (facts_of({}), Decision("nvfp4", "default")),
    ],
)
def test_the_first_rule_that_matches_decides(facts: RequestFacts, expected: Decision) -> None:
    assert decide(facts, RULES, ALL) == expected


def test_with_one_model_there_is_nothing_to_decide() -> None:
    assert decide(chat("code"), RULES, [W4]) == Decision("nvfp4", "only-model")


def test_without_rules_the_most_bits_answer() -> None:
    assert decide(chat("code"), None, ALL) == Decision("bf16", "default")


def test_a_client_may_ask_for_a_name_or_a_class() -> None:
    assert decide(chat("code"), RULES, ALL, asked="fp8") == Decision("fp8", "asked-for")
    assert decide(chat("code"), RULES, ALL, asked="4bit") == Decision("nvfp4", "asked-for")
    with pytest.raises(UnknownPrecision, match="no precision 'int3' here; served are bf16, nvfp4, fp8"):
        decide(chat("code"), RULES, ALL, asked="int3")


def test_a_conversation_keeps_its_precision_unless_a_rule_asks_for_more() -> None:
    turns = ("code", "done", "hello")
    assert decide(chat(*turns), RULES, ALL, previous="bf16") == Decision("bf16", "chat")
    assert decide(chat("hello", "hi", "code"), RULES, ALL, previous="nvfp4") == Decision("bf16", "coding")
    assert decide(chat("hello"), RULES, ALL, previous="bf16") == Decision("nvfp4", "chat")  # a new one
    assert decide(chat(*turns), RULES, ALL, previous="gone") == Decision("nvfp4", "chat")


def test_embeddings_come_from_one_model_whatever_they_say() -> None:
    both = [decide(facts_of({"input": text}), RULES, ALL, embeddings=True) for text in ("hello", "code")]
    assert both == [Decision("bf16", "embeddings")] * 2
    fixed = RULES.model_copy(update={"embeddings": "4bit"})
    assert decide(facts_of({"input": "code"}), fixed, ALL, embeddings=True).precision == "nvfp4"


@pytest.mark.parametrize(
    ("wanted", "served", "expected"),
    [("4bit", ALL, "nvfp4"), ("8bit", ALL, "fp8"), ("16bit", ALL, "bf16"), ("4bit", [W8, W16], "fp8"),
     ("8bit", [W4, W16], "bf16"), ("16bit", [W4, W8], "fp8"), ("fp8", ALL, "fp8")],
)  # fmt: skip
def test_a_class_takes_the_fewest_bits_that_are_enough(wanted: str, served: list[Precision], expected: str) -> None:
    assert resolve(wanted, served) == expected


def test_a_model_that_is_down_is_replaced_by_more_bits_first() -> None:
    assert escalation("fp8", ALL) == ["fp8", "bf16", "nvfp4"]
    assert escalation("nvfp4", ALL) == ["nvfp4", "fp8", "bf16"]
    assert escalation("bf16", ALL) == ["bf16", "fp8", "nvfp4"]


def test_rules_for_models_that_are_not_served_are_refused() -> None:
    check_rules(RULES, ALL)
    with pytest.raises(HalfbyteError, match="rule with-tools: there is no precision 'bf16' here"):
        check_rules(RULES, [W4, W8])
    with pytest.raises(HalfbyteError, match="embeddings: there is no precision 'gone' here"):
        check_rules(RULES.model_copy(update={"embeddings": "gone"}), ALL)


@pytest.mark.parametrize(
    ("text", "rule", "precision"),
    [
        ("Please fix the bug in this function", "coding", "bf16"),
        ("Explain how photosynthesis works", "comprehension", "nvfp4"),
        ("Check my inbox and put the dates into my calendar", "workflow", "bf16"),
        ("What was the gross margin in 2024?", "finance", "nvfp4"),
        ("Rewrite this in a friendlier tone", "rewriting", "bf16"),
        ("Zdravo", "default", "bf16"),
    ],
)
def test_quantclaws_table_routes_prompts(text: str, rule: str, precision: str) -> None:
    assert decide(chat(text), load_rules("quantclaw"), ALL) == Decision(precision, rule)
