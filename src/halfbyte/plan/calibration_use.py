"""What a recipe makes of a calibration: which errors it weighs, which weights it rounds, rotates and smooths."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.calibration import Calibration
from halfbyte.calibration.rounded import is_rounded, method_of
from halfbyte.calibration.token_counts import MIN_TOKENS, enough
from halfbyte.checkpoint import Reader
from halfbyte.errors import CheckpointError, RecipeError
from halfbyte.formats import rotation_of
from halfbyte.models.name_templates import normalise
from halfbyte.models.roles import bare_role
from halfbyte.models.smoothing_groups import SmoothingGroup, find_groups
from halfbyte.models.tied import is_tied
from halfbyte.plan.refusal import Refusal, enforce
from halfbyte.plan.shards import Item
from halfbyte.recipes import Decision, Method, Recipe
from halfbyte.search import get_search
from halfbyte.search.gptq import problem as gptq_problem
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.smoothing import SMOOTHING_FILE, Smoothing, make_smoothings, read_scales

# transforms that depend on activations
NEED = ("awq", "duquant")
UNFED = "nothing before it can be divided"
UNKNOWN = "the importance file says nothing of it"
DROPPED = "what comes before it is dropped"


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


def check_calibration(recipe: Recipe, items: Iterable[Item], decisions: Iterable[Decision]) -> Refusal | None:
    """Refuse a recipe that needs to know activations where nothing is known of them."""
    chosen = [d for i, d in zip(items, decisions, strict=True) if i.action == "quantize"]
    asked = next((d for d in chosen if d.error_weight == "importance" or d.transform in NEED or d.method), None)
    if asked is None or recipe.calibration == "optional":
        return None
    file = "" if asked.method else "an importance file (--importance FILE) or "
    return Refusal(
        f"rule {asked.rule} of recipe {recipe.name} says `{_wish(asked)}`, which needs a calibration; "
        f"give {file}text or statistics (--calibration PATH), or set `calibration: optional` in the recipe",
        RecipeError,
    )


def use_calibration(
    checkpoint: Checkpoint,
    recipe: Recipe,
    items: Sequence[Item],
    decisions: Sequence[Decision],
    calibration: Calibration,
    scales: bool = False,
) -> tuple[tuple[Item, ...], CalibrationUse]:
    """The items with the method and the weighting of each, and what else is made of a calibration.

    Where the recipe says nothing, importance weighs every search that has a choice. ``scales``: the plan takes scales
    of activations from the calibration, whatever else it is good for. RecipeError where a recipe needs Hessians and
    none was collected, PlanError if the calibration changes nothing.
    """
    chosen = [(i, d) for i, d in zip(items, decisions, strict=True) if i.action == "quantize"]
    hessians = _rounded_with_hessians(recipe, chosen, calibration)
    rotations = _rotated_by_hessians(recipe, chosen, calibration)
    outputs = _weighed_by_outputs(recipe, hessians, calibration)
    done = {i.weight.name for i, _ in chosen if is_rounded(calibration.statistics, i.weight.name)}
    weighted = {i.weight.name for i, d in chosen if i.weight.name not in done and _may_be_weighted(i, d, hessians)}
    known = calibration.matched.values
    groups, refused = _smoothings(checkpoint, items, {i.weight.name for i, d in chosen if d.transform == "awq"}, known)
    use = CalibrationUse(
        calibration,
        weighted=[i.weight.name for i, _ in chosen if i.weight.name in weighted and i.weight.name in known],
        unweighted=[i.weight.name for i, _ in chosen if i.weight.name in weighted and i.weight.name not in known],
        smoothings=groups,
        refused=refused,
        rounded=list(hessians.methods),
        unrounded=hessians.missing,
        starved=hessians.starved,
        rotated_by_inputs=rotations.known,
        rotated_by_hadamard=rotations.unknown,
        output_weighed=outputs[True],
        output_unweighed=outputs[False],
    )
    enforce(check_useful(recipe, use, scales))
    informed = set(use.weighted)
    return tuple(
        replace(i, method=hessians.methods.get(i.weight.name), weighted=i.weight.name in informed)
        if i.action == "quantize"
        else i
        for i in items
    ), use


def check_useful(recipe: Recipe, use: CalibrationUse, scales: bool) -> Refusal | None:
    """Refuse a calibration that changes nothing of the output."""
    if use.weighted or use.smoothings or use.rounded or use.rotated_by_inputs or scales:
        return None
    return Refusal(
        f"the importance file {use.calibration.name} changes nothing with recipe {recipe.name}: no weight that has "
        "importance is quantized by a search with a choice; leave the file out, or use a recipe with "
        "`scale_search: sweep`"
    )


class _Hessians(NamedTuple):
    """By name: methods of weights that have a Hessian, weights that lack one, experts that lack one."""

    methods: dict[str, Method]
    missing: list[str]
    starved: dict[str, list[int]]


class _Rotations(NamedTuple):
    """Names of weights whose rotation is found from their Hessian, and of those that have none."""

    known: list[str]
    unknown: list[str]


def _may_be_weighted(item: Item, decision: Decision, hessians: _Hessians) -> bool:
    """Whether importance is to weigh the errors of the scale search of an item."""
    assert item.format is not None
    name = item.weight.name
    if bare_role(item.weight.role) == "embedding":  # rows are looked up, so no input meets its columns
        return False
    if rotation_of(item.format):  # importance is about the same for all of a block then
        return False
    if name in hessians.methods and name not in hessians.starved:
        return False
    return decision.error_weight != "none" and get_search(item.search).chooses(item.format)


def _rounded_with_hessians(
    recipe: Recipe, chosen: Sequence[tuple[Item, Decision]], calibration: Calibration
) -> _Hessians:
    """Which items are rounded with a Hessian; RecipeError where a recipe needs them and none was collected."""
    result = _Hessians({}, [], {})
    wanted = [(item, decision) for item, decision in chosen if decision.method]
    for item, decision in wanted:
        assert item.format is not None and decision.method is not None
        name, problem = item.weight.name, gptq_problem(item.format)
        if problem:
            raise RecipeError(
                f"rule {decision.rule} of recipe {recipe.name} says `{_wish(decision)}` for {name}, but "
                f"{problem}; choose another format or leave it out"
            )
        if is_rounded(calibration.statistics, name):
            result.methods[name] = decision.method
            continue
        reached = enough(calibration, name)
        if reached is None or not any(reached):
            result.missing.append(name)
            continue
        result.methods[name] = decision.method
        if not all(reached):
            result.starved[name] = [expert for expert, has_tokens in enumerate(reached) if not has_tokens]
    if wanted and not result.methods and recipe.calibration == "required":
        first = wanted[0][1]
        raise RecipeError(
            f"rule {first.rule} of recipe {recipe.name} says `{_wish(first)}`, but {calibration.name} holds no "
            "Hessians for its weights; collect them with `halfbyte calibrate`"
        )
    return result


def _weighed_by_outputs(recipe: Recipe, hessians: _Hessians, calibration: Calibration) -> dict[bool, list[str]]:
    """Weights whose rows are to be weighed, by whether there are gradients; RecipeError where there are none at all."""
    result: dict[bool, list[str]] = {True: [], False: []}
    for name, method in hessians.methods.items():
        if method.output and not is_rounded(calibration.statistics, name):
            result[calibration.output_hessian(name) is not None].append(name)
    if result[False] and not result[True] and recipe.calibration == "required":
        raise RecipeError(
            f"recipe {recipe.name} says `output: fisher`, but {calibration.name} holds no gradients at the outputs; "
            "collect them with `halfbyte calibrate --output-hessians`"
        )
    return result


def _rotated_by_hessians(
    recipe: Recipe, chosen: Sequence[tuple[Item, Decision]], calibration: Calibration
) -> _Rotations:
    """Which rotations are found from Hessians; RecipeError where a recipe needs them and none was collected."""
    result = _Rotations([], [])
    for item, _ in chosen:
        rotation = rotation_of(item.format)
        if rotation and rotation.steps:
            reached = enough(calibration, item.weight.name)
            (result.known if reached and any(reached) else result.unknown).append(item.weight.name)
    if result.unknown and not result.known and recipe.calibration == "required":
        raise RecipeError(
            f"recipe {recipe.name} rotates weights to fit their inputs, but {calibration.name} holds no "
            "Hessians for them; collect them with `halfbyte calibrate`, or use `transform: hadamard`"
        )
    return result


def _wish(decision: Decision) -> str:
    """What a rule asks of activations."""
    if decision.method:
        return "rounding: gptq" if decision.method.name == "gptq" else "objective: local_hessian"
    return "error_weight: importance" if decision.error_weight == "importance" else f"transform: {decision.transform}"


def optional_note(recipe: Recipe, decisions: Iterable[Decision]) -> list[str]:
    """What a recipe leaves out because no importance file is given."""
    left = {"AWQ smoothing": any(d.transform == "awq" for d in decisions)}
    left["rotations by inputs (the Hadamard matrix takes their place)"] = any(
        d.transform == "duquant" for d in decisions
    )
    left["weighting of errors"] = any(d.error_weight == "importance" for d in decisions)
    left["rounding with Hessians"] = any(d.method for d in decisions)
    names = [name for name, asked in left.items() if asked]
    return [f"without a calibration, {' and '.join(names)} of {recipe.name} are left out"] if names else []


def groups_of(checkpoint: Checkpoint) -> list[SmoothingGroup]:
    """All groups of a checkpoint that could be smoothed, with refusals."""
    tied = is_tied(checkpoint.inventory.config)
    return find_groups(checkpoint.weights, checkpoint.family, checkpoint.formats, tied=tied)


def stored_smoothings(out: Path, source: Checkpoint, reader: Reader) -> dict[str, Smoothing]:
    """What smoothing made of each weight of an output, by name; {} where nothing was. ``reader`` reads the source.

    The groups are found anew, so that one that was cut short is noticed. CheckpointError where they do not fit.
    """
    if not (out / SMOOTHING_FILE).is_file():
        return {}
    groups = {group.name: group for group in groups_of(source) if group.refusal is None}
    scales = read_scales(out / SMOOTHING_FILE)
    for name in scales:
        if name not in groups:
            raise CheckpointError(f"{SMOOTHING_FILE} smooths {name}, which cannot be smoothed in this source")
    return make_smoothings(source, reader, [groups[name] for name in scales], scales)


def _smoothings(
    checkpoint: Checkpoint, items: Sequence[Item], wanted: set[str], known: Container[str]
) -> tuple[list[SmoothingGroup], dict[str, list[str]]]:
    """The groups that are smoothed, and reason -> names of the wanted weights that are not."""
    if not wanted:
        return [], {}
    groups: list[SmoothingGroup] = []
    refused: dict[str, tuple[str, list[str]]] = {}
    dropped = {i.weight.name for i in items if i.action == "drop"}
    fed: set[str] = set()
    for group in groups_of(checkpoint):
        asked = [w.name for w in group.consumers if w.name in wanted]
        fed.update(asked)
        problem = group.refusal
        if problem is None and any(p.weight.name in dropped for p in group.producers):
            problem = DROPPED
        if problem is None and not any(w.name in known for w in group.consumers):
            problem = UNKNOWN
        if asked and problem:
            refused.setdefault(normalise(problem), (problem, []))[1].extend(asked)
        elif asked:
            groups.append(group)
    unfed = [i.weight.name for i in items if i.weight.name in wanted - fed]
    return groups, dict(refused.values()) | ({UNFED: unfed} if unfed else {})


def _some(names: Sequence[str]) -> str:
    """How many, and which one comes first."""
    return names[0] if len(names) == 1 else f"{len(names)} (such as {names[0]})"
