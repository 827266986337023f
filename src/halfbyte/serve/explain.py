"""Decisions for a file of prompts, without a server: rule, precision, cost and expected loss of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.serve.decision import Precision, best, decide
from halfbyte.serve.request_facts import facts_of
from halfbyte.serve.routing_rules import RoutingRules

LONGEST_LINE = 32 * 2**20


def read_prompts(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the requests of a JSONL file: objects as clients send them, or texts; HalfbyteError names the line."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _request(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise HalfbyteError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def explain(path: str | Path, rules: RoutingRules, precisions: list[Precision]) -> dict[str, Any]:
    """Decide for every request of a file.

    ``cost`` is the bits per weight that an answer reads, relative to the most served; ``kl`` is the loss that the rule
    was measured to have at this precision, None where it was not measured.
    """
    measured = {rule.name: rule.measured for rule in rules.rules}
    most = best(precisions).bits
    bits = {precision.name: precision.bits for precision in precisions}
    decisions: list[dict[str, Any]] = []
    for request in read_prompts(path):
        decision = decide(facts_of(request), rules, precisions)
        found = measured.get(decision.rule, {}).get(decision.precision)
        decisions.append(
            {
                "precision": decision.precision,
                "rule": decision.rule,
                "cost": round(bits[decision.precision] / most, 4),
                "kl": found.kl if found else None,
            }
        )
    if not decisions:
        raise HalfbyteError(f"{path} holds no requests")
    known = [d["kl"] for d in decisions if d["kl"] is not None]
    return {
        "decisions": decisions,
        "mean_cost": round(sum(d["cost"] for d in decisions) / len(decisions), 4),
        "mean_kl": sum(known) / len(known) if known else None,
        "measured": len(known),
    }


def _request(line: str, where: str) -> dict[str, Any]:
    if len(line) > LONGEST_LINE:
        raise HalfbyteError(f"{where} is longer than {LONGEST_LINE} characters")
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise HalfbyteError(f"{where} is not valid JSON") from None
    if isinstance(content, str):
        return {"prompt": content}
    if not isinstance(content, dict):
        raise HalfbyteError(f"{where} must be an object with `messages` or `prompt`, or a text")
    return content
