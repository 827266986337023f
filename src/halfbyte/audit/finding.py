"""One thing that an audit has to say about a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["wrong", "missing", "poor", "note"]
ORDER: tuple[Severity, ...] = ("wrong", "missing", "poor", "note")
"""The gravest first. wrong: an engine refuses it or computes other numbers; missing: something of the model is not
there; poor: worse than the format can do; note: worth knowing, and no problem."""
_SINGULAR = {"are": "is", "have": "has"}
_PLURALS = (("ix", "ices"), ("ry", "ries"))


@dataclass(frozen=True)
class Finding:
    """What was found, in one sentence, and where.

    ``code`` is a stable name for scripts. ``tensors``: names that it is about, all of them. ``advice``: what to do;
    ``seen``: public reports of the same cause ("owner/name#number").
    """

    severity: Severity
    code: str
    what: str
    tensors: tuple[str, ...] = ()
    advice: str = ""
    seen: tuple[str, ...] = field(default=())

    @property
    def is_problem(self) -> bool:
        """Whether it speaks against the checkpoint."""
        return self.severity != "note"


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """The gravest first, otherwise in the order in which they were found."""
    return sorted(findings, key=lambda finding: ORDER.index(finding.severity))


def some(names: Iterable[str], shown: int = 3) -> str:
    """The first of some names, and how many there are beside them."""
    names = list(names)
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def count(number: int, thing: str) -> str:
    """A number with its noun: "1 matrix", "3 matrices"."""
    plural = next((f"{thing.removesuffix(end)}{new}" for end, new in _PLURALS if thing.endswith(end)), f"{thing}s")
    return f"{number:,} {thing if number == 1 else plural}"


def verb(number: int, plural: str) -> str:
    """The form of a verb that goes with a number: "have" or "has"."""
    return plural if number != 1 else _SINGULAR.get(plural, f"{plural}{'es' if plural.endswith('ch') else 's'}")
