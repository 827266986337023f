"""The same quantized weights in another dialect: a recipe that keeps everything, and what it cannot keep."""

from __future__ import annotations

import re

from halfbyte.dialects import Dialect
from halfbyte.errors import PlanError
from halfbyte.plan.refusal import enforce
from halfbyte.plan.source_check import check_source
from halfbyte.plan.transcoding import check_transcoding
from halfbyte.recipes import Recipe, parse_recipe
from halfbyte.recipes.recipe import Rule
from halfbyte.source.checkpoint import Checkpoint

NAME = "as-is"
_SHOWN = 5


def recipe_for(
    checkpoint: Checkpoint, dialect: Dialect, requantize: str | None = None, search: str = "sweep"
) -> Recipe:
    """The recipe under which a quantized checkpoint keeps every code in ``dialect``.

    Weights whose format the dialect cannot spell get the format ``requantize``; without one PlanError names them. It
    is also raised for a checkpoint that is not quantized, or in this dialect already.
    """
    if checkpoint.dialect is None:
        enforce(check_source(checkpoint))
    if checkpoint.dialect is None or not checkpoint.formats:
        raise PlanError(
            f"{checkpoint.inventory.source} holds no quantized weights, so there is nothing to convert; use "
            "`halfbyte quantize`"
        )
    source = checkpoint.dialect
    if source.name == dialect.name:
        raise PlanError(f"{checkpoint.inventory.source} is in the dialect {dialect.name} already; copy the folder")
    # a source that cannot be written in any other form is refused by the plan
    upright = [
        w.untransposed() for w in checkpoint.weights if w.name in checkpoint.formats and not source.package.standalone
    ]
    refusals = ((w.name, check_transcoding(w, checkpoint.formats[w.name], dialect)) for w in upright)
    problems = {name: refusal.reason for name, refusal in refusals if refusal}
    recipe = parse_recipe(f"name: {NAME}\nrules: [{{match: all, keep: true, reason: as in the source}}]", NAME)
    if not problems:
        return recipe
    if requantize is None:
        names = list(problems)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        held = sorted({checkpoint.formats[name].name for name in names})
        raise PlanError(
            f"the dialect {dialect.name} cannot hold {', '.join(names[:_SHOWN])}{more} ({', '.join(held)}): "
            f"{problems[names[0]].split(';')[0]}; choose another dialect, or requantize them, with a new error "
            "(--requantize FORMAT)"
        )
    lossy = Rule(
        match=tuple(f"re:^{re.escape(name)}$" for name in problems),
        format=requantize,
        reason=f"the dialect {dialect.name} cannot hold what the source has",
    )
    return recipe.model_copy(update={"rules": (*recipe.rules, lossy)})
