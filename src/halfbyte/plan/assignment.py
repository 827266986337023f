"""One weight's fate: what a recipe's decision means for it in a source and a dialect."""

from __future__ import annotations

from dataclasses import replace

from halfbyte.dialects import Dialect, OutputTensor
from halfbyte.errors import PlanError
from halfbyte.formats import Format, get_format
from halfbyte.models import Weight
from halfbyte.plan.global_scales import check_fitted
from halfbyte.plan.refusal import Refusal, enforce
from halfbyte.plan.shards import Item
from halfbyte.plan.transcoding import check_shape, check_transcoding, describe_transcoding, respelled
from halfbyte.recipes import Decision
from halfbyte.search import get_search
from halfbyte.source.checkpoint import FLOATS, Checkpoint


def assign(checkpoint: Checkpoint, weight: Weight, decision: Decision, dialect: Dialect) -> Item:
    """Make the item of one weight; RecipeError, FormatError or PlanError where it cannot be as the recipe wants."""
    if decision.action == "drop":
        return Item(weight, "drop", decision.reason)
    if decision.action == "keep":
        return _keep(checkpoint, weight, decision.reason, dialect)
    assert decision.format is not None and decision.search is not None
    fmt = dialect.spelling.format_for(weight, get_format(decision.format))
    get_search(decision.search, fmt)
    enforce(check_fitted(weight, decision, dialect))
    enforce(check_matrix(weight, decision))
    unfit = check_shape(weight, fmt, dialect)
    if unfit and decision.if_not_divisible == "keep":
        return replace(_keep(checkpoint, weight, unfit.reason, dialect), declined=fmt.name)
    enforce(unfit, weight.name, "; say `if_not_divisible: keep` in the rule or choose another format")
    enforce(check_spelling(weight, fmt, dialect), weight.name)
    return _quantize(checkpoint, weight, fmt, decision, dialect)


def check_matrix(weight: Weight, decision: Decision) -> Refusal | None:
    """Refuse weights that hold no floating-point numbers, and vectors unless the recipe keeps what does not fit."""
    if weight.dtype in FLOATS and (len(weight.shape) >= 2 or decision.if_not_divisible != "error"):
        return None
    return Refusal(
        f"rule {decision.rule} of the recipe wants to quantize {weight.name} ({weight.dtype} {list(weight.shape)}), "
        "which is no floating-point matrix; narrow the rule or keep this tensor"
    )


def check_spelling(weight: Weight, fmt: Format, dialect: Dialect) -> Refusal | None:
    """Refuse a format that the dialect cannot spell for this weight."""
    problem = dialect.spelling.problem(weight, fmt)
    return Refusal(problem) if problem else None


def _quantize(checkpoint: Checkpoint, weight: Weight, fmt: Format, decision: Decision, dialect: Dialect) -> Item:
    """Encode the weight anew, or keep its codes where the source has them and the format takes them."""
    assert decision.search is not None
    before, source = checkpoint.formats.get(weight.name), checkpoint.dialect
    if before:
        checkpoint.stored(weight)  # a missing part is found now and not in the middle of the conversion
    item = Item(
        weight,
        "quantize",
        decision.reason,
        fmt,
        decision.search,
        decision.global_scale == "power_of_two" or dialect.spelling.power_of_two,
        fitted=decision.global_scale == "soar",
    )
    promise = describe_transcoding(weight, before, fmt, source, dialect) if before and source else None
    if promise is None:
        return replace(item, outputs=tuple(dialect.spelling.outputs(weight, fmt)))
    outputs = tuple(respelled(checkpoint, weight, fmt, dialect))
    return replace(item, action="transcode", reason=promise, outputs=outputs)


def _keep(checkpoint: Checkpoint, weight: Weight, reason: str, dialect: Dialect) -> Item:
    """Keep a weight's tensors as the source has them; in another dialect a quantized one keeps its codes."""
    before, source = checkpoint.formats.get(weight.name), checkpoint.dialect
    if before is None or source is None:
        return _keep_unquantized(checkpoint, weight, reason, dialect)
    tensors = checkpoint.inventory.tensors
    if source is dialect:
        stored = [(tensors[o.name], o.expert) for o in checkpoint.stored(weight)]
        outputs = tuple(OutputTensor(t.name, t.dtype, t.shape, "copy", expert) for t, expert in stored)
        return Item(weight, "keep", reason, outputs=outputs)
    refusal = check_transcoding(weight, before, dialect)
    if refusal:
        raise PlanError(
            f"{weight.name} is {before.name} in the source and kept by the recipe, but {refusal.reason}, "
            "or give it a rule with a format"
        )
    promise = describe_transcoding(weight, before, before, source, dialect) or ""
    outputs = tuple(respelled(checkpoint, weight, before, dialect))
    return Item(weight, "transcode", promise, before, "absmax", outputs=outputs)


def _keep_unquantized(checkpoint: Checkpoint, weight: Weight, reason: str, dialect: Dialect) -> Item:
    omitted = dialect.unquantized.omitted(weight)
    if omitted:
        return Item(weight, "drop", omitted)
    tensors = checkpoint.inventory.tensors
    if checkpoint.dialect is dialect:
        lying = [tensors[name] for name in checkpoint.tensors_of(weight)]
        return Item(
            weight, "keep", reason, outputs=tuple(OutputTensor(t.name, t.dtype, t.shape, "copy") for t in lying)
        )
    if checkpoint.tensors_of(weight) != list(weight.sources):
        return Item(
            weight,
            "keep",
            reason,
            outputs=tuple(dialect.unquantized.outputs(weight, [_as_in_a_plain_checkpoint(weight)])),
        )
    copied = [(tensors[piece.source], piece.expert) for piece in weight.pieces]
    outputs = [OutputTensor(t.name, t.dtype, t.shape, "copy", expert) for t, expert in copied]
    return Item(weight, "keep", reason, outputs=tuple(dialect.unquantized.outputs(weight, outputs)))


def _as_in_a_plain_checkpoint(weight: Weight) -> OutputTensor:
    """The tensor of a weight that the source spells in its own way."""
    lying = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2]) if weight.transposed else weight.shape
    return OutputTensor(weight.sources[0], weight.dtype, lying, "transposed" if weight.transposed else "values")
