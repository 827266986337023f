"""Recipes: which weights get which format and search, as data, and what that means for a checkpoint."""

from halfbyte.recipes.recipe import Recipe, Rule, list_recipes, load_recipe, parse_recipe, register_recipe
from halfbyte.recipes.resolve import Decision, Method, resolve

__all__ = [
    "Decision",
    "Method",
    "Recipe",
    "Rule",
    "list_recipes",
    "load_recipe",
    "parse_recipe",
    "register_recipe",
    "resolve",
]
