"""What a recipe makes of an importance file: whose errors it weighs, what is folded, and what is said of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.calibration import Calibration
from halfbyte.calibration.token_counts import MIN_TOKENS, enough
from halfbyte.checkpoint import Reader
from halfbyte.errors import CheckpointError, PlanError, RecipeError
from halfbyte.formats import rotation_of
from halfbyte.models.name_templates import normalise
from halfbyte.models.roles import bare_role
from halfbyte.models.smoothing_groups import SmoothingGroup, find_groups
from halfbyte.plan.shards import Item
from halfbyte.recipes import Decision, Recipe
from halfbyte.search import get_search
from halfbyte.search.gptq import problem as gptq_problem
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.smoothing import FOLDS, Smoothing, make_smoothings, read_scales

# transforms that depend on activations
NEED = ("awq", "duquant")
UNFED = "nothing before it can be divided"
UNKNOWN = "the importance file says nothing of it"
DROPPED = "what comes before it is dropped"


@dataclass
class CalibrationUse:
    """How a plan uses what is known of activations.

    ``weighted`` and ``unweighted``: names of the quantized weights whose search does, or for want of data does not,
    weigh errors by importance. ``smoothings``: groups whose scales the conversion chooses. ``refused``: reason -> names
    of the weights that were to be folded and are not. ``rounded``: names of the weights that are rounded with a
    Hessian, ``unrounded`` of those that should have been and have none, ``starved`` experts with too few tokens for
    one: weight -> expert numbers. ``turned``: names of the weights whose rotation is found from their Hessian,
    ``unturned`` of those that have none and get the Hadamard matrix.
    """

    calibration: Calibration
    weighted: list[str] = field(default_factory=list)
    unweighted: list[str] = field(default_factory=list)
    smoothings: list[SmoothingGroup] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)
    unrounded: list[str] = field(default_factory=list)
    starved: dict[str, list[int]] = field(default_factory=dict)
    turned: list[str] = field(default_factory=list)
    unturned: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """What a user should know, one sentence each."""
        matched, total = self.calibration.matched, len(self.weighted) + len(self.unweighted)
        notes = []
        if self.rounded:
            notes.append(f"{len(self.rounded)} weights are rounded with Hessians")
        if total:
            notes.append(f"importance weighs the errors of {len(self.weighted)} of {total} searches")
        elif not (self.rounded or self.turned):
            notes.append("no search of the recipe has a choice, so importance weighs no errors")
        if self.turned:
            notes.append(f"blocks of {len(self.turned)} weights are rotated by what their inputs are")
        if self.unturned:
            notes.append(f"no Hessian for {_some(self.unturned)}: rotated by the Hadamard matrix")
        if self.unrounded:
            notes.append(f"no Hessian for {_some(self.unrounded)}: rounded to nearest")
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
        empty = {name: found for name, found in matched.no_data.items() if name in matched.values}
        if empty:
            count = sum(map(len, empty.values()))
            notes.append(f"no token reached {count} experts of {_some(list(empty))}: plain squared error for these")
        if self.smoothings:
            notes.append(
                f"AWQ: {len(self.smoothings)} groups of weights may be folded into what comes before them; "
                "the scales are chosen while quantizing"
            )
        return notes + [f"AWQ: {_some(names)} not folded: {why}" for why, names in self.refused.items()]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
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
            "rotated_by_inputs": len(self.turned),
            "rotated_by_hadamard": self.unturned,
            "folds": [group.name for group in self.smoothings],
            "not_folded": [{"reason": why, "weights": names} for why, names in self.refused.items()],
        }


def settle(
    checkpoint: Checkpoint,
    recipe: Recipe,
    items: Sequence[Item],
    decisions: Sequence[Decision],
    calibration: Calibration | None,
    scales: bool = False,
) -> CalibrationUse | None:
    """Mark the items whose errors are weighted and find the groups to fold.

    Where the recipe says nothing, importance weighs every search that has a choice. ``scales``: the plan takes scales
    of activations from the calibration, whatever else it is good for. RecipeError if the recipe needs
    an importance file and there is none, PlanError if the one that is given changes nothing.
    """
    chosen = [(i, d) for i, d in zip(items, decisions, strict=True) if i.action == "quantize"]
    if calibration is None:
        asked = next((d for _, d in chosen if d.weight == "importance" or d.transform in NEED or d.method), None)
        if asked and recipe.calibration == "required":
            file = "" if asked.method else "an importance file (--importance FILE) or "
            raise RecipeError(
                f"rule {asked.rule} of recipe {recipe.name} says `{_wish(asked)}`, but nothing is known of the model's "
                f"activations; give {file}a text or statistics (--calibration PATH), or say `calibration: optional` in "
                "the recipe"
            )
        return None
    result = CalibrationUse(calibration)
    _methods(recipe, chosen, result)
    _rotations(recipe, chosen, result)
    known = calibration.matched.values
    for item, decision in chosen:
        assert item.format is not None
        if bare_role(item.weight.role) == "embedding":  # rows are looked up, so no input meets its columns
            continue
        if rotation_of(item.format):  # importance is about the same for all of a block then
            continue
        if item.method and item.weight.name not in result.starved:
            continue
        if decision.weight == "none" or not get_search(item.search).chooses(item.format):
            continue
        item.weighted = item.weight.name in known
        (result.weighted if item.weighted else result.unweighted).append(item.weight.name)
    wanted = {i.weight.name for i, d in chosen if d.transform == "awq"}
    _folds(checkpoint, items, wanted, result)
    if not (result.weighted or result.smoothings or result.rounded or result.turned or scales):
        raise PlanError(
            f"the importance file {calibration.name} changes nothing with recipe {recipe.name}: no weight that has "
            "importance is quantized by a search with a choice; leave the file out, or use a recipe with "
            "`search: sweep`"
        )
    return result


def _methods(recipe: Recipe, chosen: Sequence[tuple[Item, Decision]], result: CalibrationUse) -> None:
    """Which items are rounded with a Hessian; RecipeError where a recipe needs them and none was collected."""
    wanted = [(item, decision) for item, decision in chosen if decision.method]
    for item, decision in wanted:
        assert item.format is not None and decision.method is not None
        problem = gptq_problem(item.format)
        if problem:
            raise RecipeError(
                f"rule {decision.rule} of recipe {recipe.name} says `{_wish(decision)}` for {item.weight.name}, but "
                f"{problem}; choose another format or leave the method out"
            )
        reached = enough(result.calibration, item.weight.name)
        if reached is None or not any(reached):
            result.unrounded.append(item.weight.name)
            continue
        item.method = decision.method
        result.rounded.append(item.weight.name)
        if not all(reached):
            result.starved[item.weight.name] = [expert for expert, found in enumerate(reached) if not found]
    if wanted and not result.rounded and recipe.calibration == "required":
        first = wanted[0][1]
        raise RecipeError(
            f"rule {first.rule} of recipe {recipe.name} says `{_wish(first)}`, but {result.calibration.name} holds no "
            "Hessians for its weights; collect them with `halfbyte calibrate`"
        )


def _rotations(recipe: Recipe, chosen: Sequence[tuple[Item, Decision]], result: CalibrationUse) -> None:
    """Which rotations are found from Hessians; RecipeError where a recipe needs them and none was collected."""
    for item, _ in chosen:
        rotation = rotation_of(item.format)
        if rotation and rotation.steps:
            reached = enough(result.calibration, item.weight.name)
            (result.turned if reached and any(reached) else result.unturned).append(item.weight.name)
    if result.unturned and not result.turned and recipe.calibration == "required":
        raise RecipeError(
            f"recipe {recipe.name} rotates weights by what their inputs are, but {result.calibration.name} holds no "
            "Hessians for them; collect them with `halfbyte calibrate`, or say `transform: hadamard`"
        )


def _wish(decision: Decision) -> str:
    """What a rule asks of activations."""
    if decision.method:
        return "method: gptq" if decision.method.name == "gptq" else "weight: local_hessian"
    return "weight: importance" if decision.weight == "importance" else f"transform: {decision.transform}"


def optional_note(recipe: Recipe, decisions: Iterable[Decision]) -> list[str]:
    """What a recipe leaves out because no importance file is given."""
    left = {"AWQ folding": any(d.transform == "awq" for d in decisions)}
    left["rotations by inputs (the Hadamard matrix takes their place)"] = any(
        d.transform == "duquant" for d in decisions
    )
    left["weighting of errors"] = any(d.weight == "importance" for d in decisions)
    left["rounding with Hessians"] = any(d.method for d in decisions)
    names = [name for name, asked in left.items() if asked]
    return [f"without a calibration {' and '.join(names)} of {recipe.name} are left out"] if names else []


def groups_of(checkpoint: Checkpoint) -> list[SmoothingGroup]:
    """All groups of a checkpoint that could be folded, with refusals."""
    tied = is_tied(checkpoint.inventory.config)
    return find_groups(checkpoint.weights, checkpoint.family, checkpoint.formats, tied=tied)


def stored_folds(out: Path, source: Checkpoint, reader: Reader) -> dict[str, Smoothing]:
    """What was folded into each weight of an output, by name; {} where nothing was. ``reader`` reads the source.

    The groups are found anew, so that one that was cut short is noticed. CheckpointError where they do not fit.
    """
    if not (out / FOLDS).is_file():
        return {}
    groups = {group.name: group for group in groups_of(source) if group.refusal is None}
    scales = read_scales(out / FOLDS)
    for name in scales:
        if name not in groups:
            raise CheckpointError(f"{FOLDS} folds {name}, which cannot be folded in this source")
    return make_smoothings(source, reader, [groups[name] for name in scales], scales)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a model's output weights are its embeddings."""
    return any(part.get("tie_word_embeddings") for part in (config, config.get("text_config") or {}))


def _folds(checkpoint: Checkpoint, items: Sequence[Item], wanted: set[str], result: CalibrationUse) -> None:
    if not wanted:
        return
    known = result.calibration.matched.values
    refused: dict[str, tuple[str, list[str]]] = {}
    dropped = {i.weight.name for i in items if i.action == "drop"}
    fed: set[str] = set()
    for group in groups_of(checkpoint):
        mine = [w.name for w in group.consumers if w.name in wanted]
        fed.update(mine)
        problem = group.refusal
        if problem is None and any(p.weight.name in dropped for p in group.producers):
            problem = DROPPED
        if problem is None and not any(w.name in known for w in group.consumers):
            problem = UNKNOWN
        if mine and problem:
            refused.setdefault(normalise(problem), (problem, []))[1].extend(mine)
        elif mine:
            result.smoothings.append(group)
    unfed = [i.weight.name for i in items if i.weight.name in wanted - fed]
    result.refused = dict(refused.values()) | ({UNFED: unfed} if unfed else {})


def _some(names: Sequence[str]) -> str:
    """How many, and which one comes first."""
    return names[0] if len(names) == 1 else f"{len(names)} (such as {names[0]})"
