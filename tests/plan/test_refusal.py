"""A refusal becomes an error with what it is about in front and what to do behind."""

from __future__ import annotations

import pytest

from halfbyte.errors import FormatError, PlanError
from halfbyte.plan.refusal import Refusal, enforce


def test_without_a_refusal_nothing_happens() -> None:
    enforce(None, "a.weight", "; do this")


def test_a_refusal_is_a_plan_error_unless_it_names_another() -> None:
    with pytest.raises(PlanError, match=r"^too odd$"):
        enforce(Refusal("too odd"))
    with pytest.raises(FormatError, match=r"^a\.weight: too odd; do this$"):
        enforce(Refusal("too odd", FormatError), "a.weight", "; do this")
