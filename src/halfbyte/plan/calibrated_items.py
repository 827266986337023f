"""What a recipe makes of a calibration: which errors it weighs, which weights it rounds, rotates and smooths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from halfbyte.calibration import Calibration
from halfbyte.calibration.rounded import is_rounded
from halfbyte.calibration.token_counts import enough
from halfbyte.errors import RecipeError
from halfbyte.formats import rotation_of
from halfbyte.models.roles import bare_role
from halfbyte.plan.calibration_use import CalibrationUse
from halfbyte.plan.refusal import Refusal, enforce
from halfbyte.plan.shards import Item
from halfbyte.plan.smoothing_use import smoothed_groups
from halfbyte.recipes import Decision, Method, Recipe
from halfbyte.search import get_search
from halfbyte.search.gptq import problem as gptq_problem
from halfbyte.source.checkpoint import Checkpoint

# transforms that depend on activations
NEED = ("awq", "duquant")


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
    groups, refused = smoothed_groups(
        checkpoint, items, {i.weight.name for i, d in chosen if d.transform == "awq"}, known
    )
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
