"""Which precision answers a request, and by which rule: a pure function of its facts and of what is served."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.serve.request_facts import RequestFacts
from halfbyte.serve.routing_rules import (
    ASKED_RULE,
    DEFAULT_RULE,
    EMBEDDINGS_RULE,
    FIXED_RULE,
    RoutingRule,
    RoutingRules,
    bits_of_class,
)


@dataclass(frozen=True)
class Precision:
    """One served model: its name in rules and headers, and the bits per weight that order the models."""

    name: str
    bits: float


@dataclass(frozen=True)
class Decision:
    """The precision for a request and the rule that chose it; ``note`` tells of a rule that could not be read."""

    precision: str
    rule: str
    note: str = ""


class UnknownPrecision(HalfbyteError):  # noqa: N818
    """A request asks for a precision that is not served."""


def decide(
    facts: RequestFacts,
    rules: RoutingRules | None,
    precisions: Sequence[Precision],
    asked: str | None = None,
    previous: str | None = None,
    embeddings: bool = False,
) -> Decision:
    """Choose the precision of a request.

    ``precisions``: what is served, at least one. ``asked``: the precision that the client demands, by name or class;
    UnknownPrecision where it is not served. ``previous``: the precision that the conversation has had, kept unless a
    rule asks for more bits. ``embeddings``: these must all come from one model, so no rule is read.
    """
    if asked:
        return Decision(resolve(asked, precisions), ASKED_RULE)
    if rules is None or len(precisions) == 1:
        return Decision(best(precisions).name, FIXED_RULE if len(precisions) == 1 else DEFAULT_RULE)
    if embeddings:
        name = resolve(rules.embeddings, precisions) if rules.embeddings else best(precisions).name
        return Decision(name, EMBEDDINGS_RULE)
    rule, note = matching_rule(facts, rules)
    chosen = Decision(
        resolve(rule.precision if rule else rules.default, precisions), rule.name if rule else DEFAULT_RULE, note
    )
    return kept(chosen, facts, precisions, previous)


def kept(chosen: Decision, facts: RequestFacts, precisions: Sequence[Precision], previous: str | None) -> Decision:
    """Let a conversation that goes on keep its precision, unless the new one has more bits."""
    bits = {precision.name: precision.bits for precision in precisions}
    if previous in bits and facts.turns and bits[chosen.precision] <= bits[previous]:
        return Decision(previous, chosen.rule, chosen.note)
    return chosen


def matching_rule(facts: RequestFacts, rules: RoutingRules) -> tuple[RoutingRule | None, str]:
    """Return the first rule that matches, or None, and a sentence about rules that could not be matched."""
    notes: list[str] = []
    for rule in rules.rules:
        try:
            if rule.matches(facts):
                return rule, "; ".join(notes)
        except CheckpointError as error:
            notes.append(f"rule {rule.name} was passed over: {error}")
    return None, "; ".join(notes)


def resolve(wanted: str, precisions: Sequence[Precision]) -> str:
    """Return the served precision for a name or a class.

    A class such as ``4bit`` takes the fewest bits that are at least of it; where none is, the most bits served.
    """
    if any(precision.name == wanted for precision in precisions):
        return wanted
    bits = bits_of_class(wanted)
    if math.isnan(bits):
        names = ", ".join(precision.name for precision in precisions)
        raise UnknownPrecision(
            f"there is no precision {wanted[:80]!r} here; served are {names}, or a class such as 4bit"
        )
    # scales make a 4-bit format 4.5 bits wide, so a class reaches down to half of it
    enough = [precision for precision in precisions if precision.bits >= bits * 0.5 + 1]
    return min(enough, key=lambda p: p.bits).name if enough else best(precisions).name


def best(precisions: Sequence[Precision]) -> Precision:
    """Return the precision with the most bits."""
    return max(precisions, key=lambda precision: precision.bits)


def escalation(chosen: str, precisions: Sequence[Precision]) -> list[str]:
    """Return the order in which to try models: the chosen one, those with more bits, then those with fewer."""
    ordered = sorted(precisions, key=lambda precision: precision.bits)
    names = [precision.name for precision in ordered]
    place = names.index(chosen)
    return [*names[place:], *reversed(names[:place])]


def check_rules(rules: RoutingRules, precisions: Sequence[Precision]) -> None:
    """Raise HalfbyteError for a rule whose precision is neither served nor a class."""
    named = [("default", rules.default), ("embeddings", rules.embeddings or rules.default)]
    for where, wanted in [*named, *((f"rule {rule.name}", rule.precision) for rule in rules.rules)]:
        try:
            resolve(wanted, precisions)
        except UnknownPrecision as error:
            raise HalfbyteError(f"{rules.name}: {where}: {error}") from None
