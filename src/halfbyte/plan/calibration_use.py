"""What a plan makes of a calibration, as notes, provenance and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.calibration import Calibration
from halfbyte.calibration.rounded import method_of
from halfbyte.calibration.token_counts import MIN_TOKENS
from halfbyte.models.smoothing_groups import SmoothingGroup
from halfbyte.source.smoothing import SMOOTHING_FILE


@dataclass(frozen=True)
class CalibrationUse:
    """How a plan uses what is known of activations.

    ``weighted`` and ``unweighted``: names of the quantized weights whose search does, or for want of data does not,
    weigh errors by importance. ``smoothings``: groups whose scales the conversion chooses. ``refused``: reason -> names
    of the weights that were to be smoothed and are not. ``rounded``: names of the weights that are rounded with a
    Hessian, ``unrounded`` of those that should have been and have none, ``starved`` experts with too few tokens for
    one: weight -> expert numbers. ``rotated_by_inputs``: names of the weights whose rotation is found from their
    Hessian, ``rotated_by_hadamard`` of those that have none. ``output_weighed``: names of the weights whose rows are
    weighed by gradients at their outputs, ``output_unweighed`` of those that should be and for which there are none.
    """

    calibration: Calibration
    weighted: list[str]
    unweighted: list[str]
    smoothings: list[SmoothingGroup]
    refused: dict[str, list[str]]
    rounded: list[str]
    unrounded: list[str]
    starved: dict[str, list[int]]
    rotated_by_inputs: list[str]
    rotated_by_hadamard: list[str]
    output_weighed: list[str] = field(default_factory=list)
    output_unweighed: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Say what a user should know, in one sentence each."""
        matched, total = self.calibration.matched, len(self.weighted) + len(self.unweighted)
        notes = list(self.calibration.notes)
        if self.rounded:
            notes.append(f"{len(self.rounded)} weights are rounded with Hessians")
        if self.output_weighed:
            notes.append(f"gradients at the outputs weigh the errors of {len(self.output_weighed)} weights")
        if self.output_unweighed:
            notes.append(f"no gradients at the outputs of {_some(self.output_unweighed)}: all rows weigh the same")
        if total:
            notes.append(f"importance weights the errors of {len(self.weighted)} of {total} searches")
        elif not (self.rounded or self.rotated_by_inputs):
            notes.append("no search of the recipe has more than one candidate, so importance has no effect")
        if self.rotated_by_inputs:
            notes.append(f"blocks of {len(self.rotated_by_inputs)} weights are rotated to fit their inputs")
        if self.rotated_by_hadamard:
            notes.append(f"no Hessian for {_some(self.rotated_by_hadamard)}: rotated by the Hadamard matrix")
        if self.unrounded:
            wanted = len(self.rounded) + len(self.unrounded)
            notes.append(
                f"{len(self.unrounded)} of {wanted} weights ({len(self.unrounded) / wanted:.0%}) that the recipe wants "
                f"rounded with Hessians have none, such as {self.unrounded[0]}: rounded to nearest"
            )
        if self.starved:
            count = sum(map(len, self.starved.values()))
            notes.append(
                f"fewer than {MIN_TOKENS} tokens reached {count} experts of {_some(list(self.starved))}: rounded to "
                "nearest, errors weighted by importance where there is any"
            )
        if self.unweighted:
            notes.append(f"no importance for {_some(self.unweighted)}: plain squared error")
        if matched.unmatched:
            notes.append(f"entries of the importance file that fit no weight here: {_some(matched.unmatched)}")
        empty = {name: experts for name, experts in matched.no_data.items() if name in matched.values}
        if empty:
            count = sum(map(len, empty.values()))
            notes.append(f"no token reached {count} experts of {_some(list(empty))}: plain squared error for these")
        if self.smoothings:
            notes.append(
                f"AWQ: {len(self.smoothings)} groups of weights may be smoothed by what comes before them; "
                "the scales are chosen while quantizing"
            )
        return notes + [f"AWQ: {_some(names)} not smoothed: {why}" for why, names in self.refused.items()]

    def provenance(self) -> dict[str, Any]:
        """What halfbyte.json says of the calibration, and how much of what the recipe asks of it was done."""
        entry: dict[str, Any] = {"importance": {"name": self.calibration.name, "digest": self.calibration.digest}}
        entry["importance"] |= self._refitted()
        entry["folds"] = SMOOTHING_FILE if self.smoothings else None
        if self.unrounded:
            entry["rounded_with_hessian"] = {
                "weights": len(self.rounded),
                "of": len(self.rounded) + len(self.unrounded),
            }
        return entry

    def _refitted(self) -> dict[str, Any]:
        """What weights were refitted to, where the calibration did so."""
        stated = self.calibration.statistics.description if self.calibration.statistics else {}
        made = method_of(stated)
        if made is None:
            return {}
        keys = ("texts", "tokens_sha256", "samples", "length", "bos")
        return {"target": made.get("target"), **{key: stated.get(key) for key in keys}}

    def to_dict(self) -> dict[str, Any]:
        """Return what ``notes`` says, as JSON holds it."""
        matched = self.calibration.matched
        return {
            "importance": self.calibration.name,
            "digest": self.calibration.digest,
            "entries": self.calibration.entries,
            "unmatched": matched.unmatched,
            "no_data": matched.no_data,
            "weighted": len(self.weighted),
            "unweighted": self.unweighted,
            "rounded_with_hessian": len(self.rounded),
            "without_hessian": self.unrounded,
            "experts_without_hessian": self.starved,
            "rotated_by_inputs": len(self.rotated_by_inputs),
            "rotated_by_hadamard": self.rotated_by_hadamard,
            "output_weighed": len(self.output_weighed),
            "without_output_hessian": self.output_unweighed,
            "folds": [group.name for group in self.smoothings],
            "not_folded": [{"reason": why, "weights": names} for why, names in self.refused.items()],
        }


def _some(names: Sequence[str]) -> str:
    """How many, and which one comes first."""
    return names[0] if len(names) == 1 else f"{len(names)} (such as {names[0]})"
