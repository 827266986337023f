"""Conversions that go on without what their format cannot hold: such weights stay unquantized, in a plan of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from halfbyte.convert.conversion import Announce, Conversion
from halfbyte.errors import UnconvertibleError
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.keeping import Remake, continued_recipe, kept_by, recipe_keeping


def convert_keeping(
    plan: Plan, out: Path, remake: Remake, run: Callable[[Plan], Conversion], announce: Announce
) -> tuple[Plan, Conversion]:
    """Run a conversion; where weights are refused, once more by a recipe that keeps them. Returns the last plan, too.

    ``run`` converts and collects what is refused. Sizes are known before the work, so the second conversion begins
    anew; both together take the time of two. An output that was begun or finished in this way is continued as such.
    UnconvertibleError for weights that are not finite, PlanError where no weight is left to quantize.
    """
    recipe = continued_recipe(plan, out)
    if recipe is not None:
        plan = remake(recipe)
    while True:
        try:
            return plan, run(plan)
        except UnconvertibleError as refused:
            if not set(refused.weights) - set(kept_by(plan)):
                raise
            for name, reason in sorted(refused.weights.items()):
                announce(f"{name} stays unquantized: {reason}")
            announce("the conversion begins anew, since sizes are known before the work")
            plan = remake(recipe_keeping(plan, refused.weights))
