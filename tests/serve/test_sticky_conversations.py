"""Conversations that keep their precision."""

from __future__ import annotations

from halfbyte.serve.sticky_conversations import StickyConversations


def test_the_oldest_conversation_is_forgotten_first() -> None:
    sticky = StickyConversations(2)
    sticky.remember("a", "nvfp4")
    sticky.remember("b", "bf16")
    assert sticky.get("a") == "nvfp4"  # which makes b the oldest
    sticky.remember("c", "bf16")
    assert (sticky.get("a"), sticky.get("b"), sticky.get("c"), len(sticky)) == ("nvfp4", None, "bf16", 2)


def test_requests_without_a_conversation_leave_nothing() -> None:
    sticky = StickyConversations()
    sticky.remember("", "nvfp4")
    assert len(sticky) == 0 and sticky.get("") is None
