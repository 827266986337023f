"""``halfbyte recipes``: the built-in recipes, or what one of them says."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from halfbyte.cli.output import print_json, say, table, warn

if TYPE_CHECKING:
    from halfbyte.recipes import Recipe

SUMMARY = "list the built-in recipes, or show the rules of one"
EXAMPLES = """\
  halfbyte recipes
  halfbyte recipes mixfp4
  halfbyte recipes my-recipe.yaml          (also checks the file)
"""

SHOWN = ("error_weight", "rounding", "objective", "static_groups", "order", "transform")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("name", metavar="NAME_OR_FILE", nargs="?", help="show the rules of this recipe")


def run(args: argparse.Namespace) -> int:
    """List the built-in recipes, or show one."""
    from halfbyte.recipes import list_recipes, load_recipe

    if args.name is None:
        recipes = list_recipes()
        if args.json:
            print_json({"recipes": [{"name": n, "description": d} for n, d in recipes.items()]})
        else:
            table(("recipe", "~effect"), list(recipes.items()))
        return 0
    recipe = load_recipe(args.name)
    for note in recipe.notes:
        warn(note)
    if args.json:
        print_json(recipe.model_dump(mode="json", exclude_none=True))
    else:
        _show(recipe)
    return 0


def _show(recipe: Recipe) -> None:
    say(f"{recipe.name}: {recipe.description}" if recipe.description else recipe.name)
    if recipe.source:
        say(f"after       {recipe.source}")
    if recipe.dialect:
        say(f"dialect     {recipe.dialect}")
    if recipe.calibration == "optional":
        say("calibration optional: what needs an importance file is left out without one")
    say("")
    table(
        ("", "~matches", "fate", "search", "~notes"),
        [
            (
                number,
                ", ".join(rule.match),
                rule.format or rule.action,
                rule.scale_search if rule.format else "",
                "; ".join(
                    (
                        *(["keeps what the format cannot hold"] if rule.if_not_divisible == "keep" else []),
                        *(["may match nothing"] if rule.optional else []),
                        *(f"{key}: {value}" for key in SHOWN if (value := getattr(rule, key)) is not None),
                        *(["global scales are powers of two"] if rule.global_scale == "power_of_two" else []),
                        *(["global scales are fitted (SOAR)"] if rule.global_scale == "soar" else []),
                        *([rule.reason] if rule.reason else []),
                    )
                ),
            )
            for number, rule in enumerate(recipe.rules, start=1)
        ],
    )
    say("", "the last rule that matches a weight wins; weights without a matching rule are kept")
