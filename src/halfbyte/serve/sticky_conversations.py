"""The precision that each conversation has had, so that the next turn finds its prefix in the engine's cache."""

from __future__ import annotations

from collections import OrderedDict

CAPACITY = 10_000


class StickyConversations:
    """Conversation or response id -> precision, of the latest ``capacity`` ones."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._known: OrderedDict[str, str] = OrderedDict()

    def get(self, key: str) -> str | None:
        """Return the precision of a conversation, or None."""
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def remember(self, key: str, precision: str) -> None:
        """Record the precision of a conversation; an empty key is no conversation."""
        if not key:
            return
        self._known[key] = precision
        self._known.move_to_end(key)
        if len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def __len__(self) -> int:
        return len(self._known)
