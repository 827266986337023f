"""From scores of tokens to the numbers of a row, and which of them may be the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from halfbyte.evaluate.confidence import Bootstrap, divergence_intervals, exponential
from halfbyte.evaluate.divergence import TokenScores
from halfbyte.evaluate.windows import Protocol


@dataclass
class Scored:
    """A row and the scores behind it: on the text, and on what divergence is measured on (often the same)."""

    row: dict[str, Any]
    text: tuple[Protocol, TokenScores] | None
    divergence: tuple[Protocol, TokenScores] | None
    compared: bool

    @property
    def is_valid(self) -> bool:
        """Whether the checkpoint could be measured."""
        return self.row.get("invalid") is None


def summarize(scored: Scored) -> None:
    """Fill in what follows from one checkpoint's own scores."""
    row = scored.row
    row |= {"tokens": None, "protocol": None, "perplexity": None, "perplexity_ci": None, "perplexity_ratio": None}
    row |= {"kl_protocol": None, "kl": None, "kl_ci": None}
    row |= {"indistinguishable": {"kl": [], "perplexity": [], "noise": None}}
    if scored.text is not None:
        protocol, scores = scored.text
        interval = Bootstrap(scores.window).mean(scores.nll)
        row |= {"tokens": protocol.tokens, "protocol": protocol.as_dict()}
        row |= {"perplexity": scores.perplexity, "perplexity_ci": exponential(interval)}
    if scored.divergence is not None and scored.compared:
        protocol, scores = scored.divergence
        row["kl_protocol"] = protocol.as_dict()
        row |= {"kl": scores.divergence, "kl_ci": divergence_intervals(scores, Bootstrap(scores.window))}


def judge(rows: list[Scored], floor: Scored | None) -> None:
    """Fill in what compares checkpoints: differences that are no larger than chance."""
    rows = [entry for entry in rows if entry.is_valid]
    floor = floor if floor is not None and floor.is_valid else None
    compared = bool(rows) and rows[0].compared
    if rows and rows[0].text is not None:
        _judge_perplexity(rows, compared)
    if rows and compared and rows[0].divergence is not None:
        _judge_divergence(rows, floor)


def _judge_perplexity(rows: list[Scored], compared: bool) -> None:
    scores = [r.text[1] for r in rows if r.text is not None]
    bootstrap = Bootstrap(scores[0].window)
    for i, scored in enumerate(rows):
        if compared and i:
            change = scores[i].nll - scores[0].nll
            ci = exponential(bootstrap.mean(change))
            scored.row["perplexity_ratio"] = {"value": math.exp(float(change.mean())), "ci": ci}
        same = [r.row["name"] for k, r in enumerate(rows) if k != i and bootstrap.same(scores[k].nll, scores[i].nll)]
        scored.row["indistinguishable"]["perplexity"] = same


def _judge_divergence(rows: list[Scored], floor: Scored | None) -> None:
    kl = [r.divergence[1].kl for r in rows if r.divergence is not None and r.divergence[1].kl is not None]
    assert rows[0].divergence is not None
    bootstrap = Bootstrap(rows[0].divergence[1].window)
    bound = None
    if floor is not None:
        interval = floor.row["kl_ci"]["mean"]
        bound = interval[1] if interval else floor.row["kl"]["mean"]
    for i, scored in enumerate(rows[1:], 1):
        same = [r.row["name"] for k, r in enumerate(rows) if k and k != i and bootstrap.same(kl[k], kl[i])]
        scored.row["indistinguishable"]["kl"] = same
        if bound is not None:
            scored.row["indistinguishable"]["noise"] = scored.row["kl"]["mean"] <= bound
