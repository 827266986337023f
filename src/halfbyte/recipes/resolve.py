"""A recipe applied to the weights of a checkpoint: one decision for each, or a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from halfbyte.errors import FormatError, RecipeError
from halfbyte.formats import get_format, rotated
from halfbyte.models.name_templates import normalise
from halfbyte.models.regex import REGEX, Patterns
from halfbyte.models.roles import LINEAR, is_under
from halfbyte.models.weight import Weight
from halfbyte.recipes.recipe import Recipe, Rule, nearest
from halfbyte.search import get_search


class Method(NamedTuple):
    """How a weight is rounded with a Hessian: `gptq` or `local_hessian`; `target`, `output` and `refine` as in a rule,
    the rest as in `halfbyte.search.gptq`."""

    name: str
    mode: Literal["in_loop", "local_hessian", "compensated", "static"] = "in_loop"
    order: Literal["none", "act"] = "none"
    damping: float = 0.01
    target: Literal["weight", "residual"] = "weight"
    output: Literal["fisher"] | None = None
    refine: Literal["descent"] | None = None


def refits(method: Method | None) -> bool:
    """Whether a weight is refitted before it is rounded, so that its error against the source says little."""
    return method is not None and method.target == "residual"


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one weight, and why.

    `format`, `search` and `global_scale` are None unless the action is `quantize`; `format` is the one in rotated space
    where the rule rotates. `rule` counts from 1, as the messages do; None means that no rule matched. `error_weight`,
    `method` (None for rounding to nearest), `transform` and `activations` are the rule's.
    """

    action: Literal["quantize", "keep", "drop"]
    format: str | None
    search: str | None
    global_scale: str | None
    if_not_divisible: Literal["error", "keep"]
    reason: str
    rule: int | None
    error_weight: Literal["importance", "none"] | None = None
    method: Method | None = None
    transform: Literal["awq", "hadamard", "duquant"] | None = None
    activations: Literal["none", "dynamic", "static"] | None = None


# the search's names for what a block's scale is judged by when its turn comes
_MODES = {"gptq_loss": "in_loop", "local_hessian": "local_hessian", "squared_error": "compensated"}
_EXAMPLES = 1_000  # weights that a hint looks at
UNMATCHED = Decision("keep", None, None, None, "error", "no rule of the recipe selects it", None)


def resolve(recipe: Recipe, weights: Sequence[Weight]) -> list[Decision]:
    """One decision per weight, in the same order; of the rules that match a weight, the last wins.

    Raises `RecipeError` if an entry of a rule matches nothing (unless the rule is `optional`), if it matches
    only some source tensors of a fused weight, or if a fusion group would get two formats.
    """
    result = [UNMATCHED] * len(weights)
    by_role: dict[str, list[int]] = {}
    for index, weight in enumerate(weights):
        by_role.setdefault(weight.role, []).append(index)
    for number, rule in enumerate(recipe.rules, start=1):
        decision = _decision(rule, number, recipe.name)
        for entry in rule.match:
            where = f"recipe {recipe.name}, rule {number}"
            matching = _matches(entry, weights, by_role, where)
            if not matching and not rule.optional:
                raise RecipeError(_nothing(entry, weights, by_role, where))
            for index in matching:
                result[index] = decision
    _check_groups(weights, result, recipe.name)
    return result


def _decision(rule: Rule, number: int, recipe: str) -> Decision:
    reason = rule.reason or f"rule {number} of {recipe}"
    if rule.action != "quantize":
        return Decision(rule.action, None, None, None, "error", reason, number)
    return Decision(
        "quantize",
        _format(rule, number, recipe),
        rule.scale_search,
        rule.global_scale,
        rule.if_not_divisible,
        reason,
        number,
        rule.error_weight,
        _method(rule),
        rule.transform,
        rule.activations,
    )


def _format(rule: Rule, number: int, recipe: str) -> str | None:
    """The format's name; a rotation is part of what codes mean, and so of the format."""
    if not rule.rotates or rule.format is None or rule.transform is None:
        return rule.format
    try:
        return str(rotated(get_format(rule.format), rule.transform).name)
    except FormatError as error:
        raise RecipeError(f"recipe {recipe}, rule {number}: {error}") from error


def _method(rule: Rule) -> Method | None:
    if rule.rounding == "gptq":
        mode = "static" if rule.static_groups else _MODES[rule.objective or "gptq_loss"]
        given: dict[str, Any] = {"mode": mode, "order": rule.order, "damping": rule.damping}
        given["target"] = rule.target
        given |= {"output": rule.output, "refine": rule.refine}
        return Method("gptq", **{key: value for key, value in given.items() if value is not None})
    return Method("local_hessian") if rule.objective == "local_hessian" else None


def _matches(entry: str, weights: Sequence[Weight], by_role: dict[str, list[int]], where: str) -> Sequence[int]:
    if entry.startswith(REGEX):
        return _regex_matches(entry, weights, where)
    if entry == "all":
        return range(len(weights))
    prefixes = LINEAR if entry == "linear" else (entry,)
    under = [i for role, ids in by_role.items() if any(is_under(role, p) for p in prefixes) for i in ids]
    return [i for i in under if len(weights[i].shape) >= 2] if entry == "linear" else under


def _regex_matches(entry: str, weights: Sequence[Weight], where: str) -> list[int]:
    search = Patterns([entry], where, anywhere=True).match
    matching = []
    for index, weight in enumerate(weights):
        if search(weight.name):
            matching.append(index)
            continue
        hits = [piece.source for piece in weight.pieces if search(piece.source)]
        if hits and len(hits) < len(weight.pieces):
            raise RecipeError(
                f"{where}: {entry!r} matches only {len(hits)} of the {len(weight.pieces)} tensors of "
                f"{weight.name} (e.g. {hits[0]}), but a fused weight has one format; match all of it or none"
            )
        if hits:
            matching.append(index)
    # `mtp.layers.0.mlp.experts` looks like a layer of the main model to most expressions
    main = [index for index in matching if not weights[index].role.startswith("mtp.")]
    return main if main and "mtp" not in entry else matching


def _nothing(entry: str, weights: Sequence[Weight], by_role: dict[str, list[int]], where: str) -> str:
    if entry.startswith(REGEX):
        # by pattern, so that one layer speaks for all and a huge checkpoint is still compared in no time
        examples = {normalise(weight.name): weight.name for weight in weights[:_EXAMPLES]}
        hint = nearest(entry[len(REGEX) :].replace("\\", ""), list(examples.values()))
    else:
        roles = sorted(by_role)
        if any(is_under(role, f"quantized.{entry}") for role in roles):
            return (
                f"{where}: {entry!r} matches nothing, because this checkpoint holds it already quantized; "
                "start from an unquantized checkpoint or mark the rule `optional: true`"
            )
        hint = nearest(entry, roles) or f"; the roles here are {', '.join(roles)}"
    return f"{where}: {entry!r} matches nothing{hint}; correct it or mark the rule `optional: true`"


def _check_groups(weights: Sequence[Weight], decisions: list[Decision], recipe: str) -> None:
    first: dict[str, int] = {}
    for index, weight in enumerate(weights):
        if weight.group is None:
            continue
        other = first.setdefault(weight.group, index)
        if other != index and _fate(decisions[other]) != _fate(decisions[index]):
            raise RecipeError(
                f"recipe {recipe} splits the fusion group {weight.group}: "
                f"{_in_words(weights[other], decisions[other])} but {_in_words(weight, decisions[index])}; "
                "engines fuse these tensors, so give all of them the same format and global scale"
            )


def _fate(decision: Decision) -> tuple[str | None, ...]:
    # Four Over Six leaves room above the largest scale, so that its global scales are others
    room = "room" if decision.search and get_search(decision.search).only == "four_over_six" else None
    return decision.action, decision.format, decision.global_scale, room, decision.activations


def _in_words(weight: Weight, decision: Decision) -> str:
    what = decision.format if decision.action == "quantize" else decision.action
    by = f"rule {decision.rule}" if decision.rule else "no rule"
    how = f" by {decision.search}" if decision.search not in (None, "sweep") else ""
    return f"{weight.name} gets {what}{how} ({by})"
