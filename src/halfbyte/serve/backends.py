"""The model servers behind the router, and what the router knows of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from halfbyte.serve.decision import Precision, escalation


@dataclass
class Backend:
    """One model server: its precision, address, and the name by which the engine knows its model.

    ``nbytes`` and ``dense_nbytes``: bytes of the weights, and of the same weights in BF16; 0 where unknown.
    """

    precision: Precision
    url: str
    model: str
    engine: str = ""
    api_key: str = field(default="", repr=False)
    healthy: bool = True
    restarts: int = 0
    nbytes: int = 0
    dense_nbytes: int = 0

    @property
    def name(self) -> str:
        """The precision's name, by which rules and clients know the backend."""
        return self.precision.name


class Backends:
    """All backends by the names of their precisions."""

    def __init__(self, backends: list[Backend]) -> None:
        self._by_name = {backend.name: backend for backend in backends}

    def __iter__(self) -> Iterator[Backend]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Backend:
        return self._by_name[name]

    @property
    def precisions(self) -> list[Precision]:
        """What is served, in the order given."""
        return [backend.precision for backend in self._by_name.values()]

    def candidates(self, chosen: str, only: bool) -> list[Backend]:
        """Backends to try for a request in order; ``only``: no other precision is acceptable.

        Those known to be down come last: they may be back before the supervisor has noticed.
        """
        names = [chosen] if only else escalation(chosen, self.precisions)
        return sorted((self._by_name[name] for name in names), key=lambda backend: not backend.healthy)
