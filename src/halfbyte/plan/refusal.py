"""Why something cannot be planned: what every ``check_*`` function of the plan gives back."""

from __future__ import annotations

from typing import NamedTuple

from halfbyte.errors import HalfbyteError, PlanError


class Refusal(NamedTuple):
    """A reason in words, and the error that it becomes where nothing else can be done."""

    reason: str
    error: type[HalfbyteError] = PlanError


def enforce(refusal: Refusal | None, what: str = "", advice: str = "") -> None:
    """Raise the error of a refusal, with ``what`` in front of the reason and ``advice`` behind it."""
    if refusal is not None:
        raise refusal.error(f"{what}: {refusal.reason}{advice}" if what else f"{refusal.reason}{advice}")
