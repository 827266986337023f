"""What rules see of a request."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.serve.request_facts import LONGEST, cut, facts_of

CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}, {"type": "image_url", "image_url": {}}]},
    ],
    "max_tokens": 7,
    "tools": [{"type": "function"}],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["messages", "prompt", "input", "instructions", "tools", "max_tokens"])


def test_a_chat_is_read_by_roles() -> None:
    facts = facts_of(CHAT)
    assert (facts.last_user, facts.user, facts.system) == ("And now?", "Hello\nAnd now?", "Be brief.")
    assert facts.everything == "Be brief.\nHello\nHi\nAnd now?" and facts.length == 24
    assert (facts.tools, facts.images, facts.max_tokens, facts.turns) == (True, True, 7, 1)


@pytest.mark.parametrize(
    "request_body",
    [{"prompt": "Hello"}, {"prompt": ["Hello"]}, {"input": "Hello"}, {"input": [{"role": "user", "content": "Hello"}]}],
)
def test_prompts_and_inputs_are_a_users_text(request_body: dict[str, Any]) -> None:
    assert facts_of(request_body).last_user == "Hello"


def test_instructions_of_a_response_are_the_systems_text() -> None:
    assert facts_of({"input": "Hello", "instructions": "Be brief."}).system == "Be brief."


def test_later_turns_belong_to_the_conversation_of_the_first() -> None:
    first = facts_of({"messages": CHAT["messages"][:2]})
    other = facts_of({"messages": [*CHAT["messages"][:1], {"role": "user", "content": "Bye"}]})
    assert first.conversation == facts_of(CHAT).conversation != other.conversation
    assert facts_of({"prompt": "Hello"}).conversation == ""


def test_of_a_long_text_both_ends_are_seen() -> None:
    text = cut("start" + "x" * 10 * LONGEST + "end")
    assert len(text) == LONGEST + 1 and text.startswith("start") and text.endswith("end")


@given(st.dictionaries(KEYS, JSON))
def test_no_request_is_too_odd(request_body: dict[str, Any]) -> None:
    facts = facts_of(request_body)
    assert facts.length >= 0 and isinstance(facts.language, str)
