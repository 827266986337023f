"""The recipe language: ordered rules from roles or name patterns to a format, or keep, or drop."""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from halfbyte.errors import RecipeError
from halfbyte.formats.rotation import ROTATIONS
from halfbyte.models.roles import ROLES, is_known
from halfbyte.models.strict_yaml import load_yaml

ALIASES = ("linear", "all")
REGEX = "re:"
# of recipes written before 0.2; they stay readable for one release
OLD_KEYS = {"tensor_scale": "global_scale"}


class Rule(BaseModel):
    """One rule: which weights (`match`) get which fate (`format`, `keep` or `drop`, exactly one of them).

    `match` entries are role prefixes (`experts` covers `experts.gate_up`), the aliases `linear` and `all`, or
    `re:` and a Python regex that is searched in the names of the weight and of its source tensors. `weight` says
    what weighs a search's errors; None: importance, where a file is given and holds it. `method`: how values are
    rounded; None: each to the nearest. `mode`, `order` and `damping` are those of GPTQ. `activations`: whether
    engines quantize what these weights are multiplied by, and how their scales are found; None: as is usual for
    the format in the dialect.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    match: tuple[str, ...] = Field(min_length=1)
    format: str | None = None
    keep: Literal[True] | None = None
    drop: Literal[True] | None = None
    search: str = "sweep"
    global_scale: Literal["amax", "power_of_two", "soar"] = "amax"
    indivisible: Literal["error", "keep"] = "error"
    weight: Literal["importance", "local_hessian", "none"] | None = None
    method: Literal["nearest", "gptq"] | None = None
    mode: Literal["in_loop", "local_hessian", "compensated", "static"] | None = None
    order: Literal["none", "act"] | None = None
    damping: float | None = Field(default=None, ge=0, lt=1)
    transform: Literal["awq", "hadamard", "duquant"] | None = None
    activations: Literal["none", "dynamic", "static"] | None = None
    optional: bool = False
    reason: str | None = None

    @property
    def action(self) -> Literal["quantize", "keep", "drop"]:
        """What the rule does with the weights that it matches."""
        return "quantize" if self.format else "keep" if self.keep else "drop"

    @property
    def turns(self) -> bool:
        """Whether blocks of columns are rotated."""
        return self.transform in ROTATIONS

    @field_validator("match", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("match")
    @classmethod
    def _entries_make_sense(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            if entry.startswith(REGEX):
                try:
                    re.compile(entry[len(REGEX) :])
                except re.error as error:
                    raise ValueError(f"{entry!r} is not a valid regular expression: {error}") from None
            elif entry not in ALIASES and not is_known(entry):
                raise ValueError(f"there is no role {entry!r}{nearest(entry, known_roles())}")
        return entries

    @model_validator(mode="before")
    @classmethod
    def _today(cls, content: Any) -> Any:
        """Keys of recipes from before 0.2 under the names of today."""
        if not isinstance(content, dict):
            return content
        twice = sorted(new for old, new in OLD_KEYS.items() if old in content and new in content)
        if twice:
            raise ValueError(f"`{twice[0]}` is given twice, once under its old name")
        return {OLD_KEYS.get(key, key) if isinstance(key, str) else key: value for key, value in content.items()}

    @model_validator(mode="after")
    def _one_fate(self) -> Rule:
        if [bool(self.format), bool(self.keep), bool(self.drop)].count(True) != 1:
            raise ValueError("give exactly one of `format: <name>`, `keep: true`, `drop: true`")
        if self.drop and not (self.reason or "").strip():
            raise ValueError("a rule that drops weights must give a `reason`")
        of_gptq = {key for key in ("mode", "order", "damping") if getattr(self, key) is not None}
        if not self.format:
            others = {"search", "global_scale", "indivisible", "weight", "method", "transform", "activations"}
            useless = others & self.model_fields_set | of_gptq
            if useless:
                raise ValueError(f"`{sorted(useless)[0]}` has no meaning without `format`")
        elif self.method != "gptq" and of_gptq:
            raise ValueError(f"`{sorted(of_gptq)[0]}` has no meaning without `method: gptq`")
        elif self.turns and self.weight == "importance":
            raise ValueError(f"`transform: {self.transform}` mixes columns, so importance of single ones cannot weigh")
        elif self.method == "gptq" and self.weight is not None:
            raise ValueError("`method: gptq` judges by its own loss; leave `weight` out, or see `mode`")
        return self


class Recipe(BaseModel):
    """Rules in order, the last match wins; weights that no rule matches are kept as they are.

    `dialect` is what the recipe is written in when the user names none. `calibration`: whether what rules ask of
    activations (`weight: importance`, `method: gptq`, `transform: awq`, `duquant`) may be left out if nothing is known.
    `kv_cache`: what engines are to keep keys and values in, with calibrated scales; None: as the source has it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    description: str = ""
    source: str = ""
    aliases: tuple[str, ...] = ()
    dialect: str | None = None
    calibration: Literal["required", "optional"] = "required"
    kv_cache: Literal["fp8"] | None = None
    rules: tuple[Rule, ...] = Field(min_length=1)

    @property
    def needs_calibration(self) -> bool:
        """Whether nothing can be done without knowing activations."""
        asks = (
            rule.method == "gptq" or rule.weight not in (None, "none") or rule.transform in ("awq", "duquant")
            for rule in self.rules
        )
        return self.calibration == "required" and (self.kv_cache is not None or any(asks))

    @field_validator("rules", "aliases", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A built-in recipe by name (hyphens and underscores are alike) or a recipe file by path.

    Raises `RecipeError` with the file, the rule's number (from 1) and, for an unknown name or key, the nearest.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or path.name != str(name_or_path) or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise RecipeError(f"the recipe {path} cannot be read: {reason}") from None
        return parse_recipe(text, str(path), path.stem)
    wanted = str(name_or_path).lower().replace("_", "-")
    recipes = _builtin()
    for recipe in recipes:
        if wanted == recipe.name or wanted in recipe.aliases:
            return recipe
    known = [name for recipe in recipes for name in (recipe.name, *recipe.aliases)]
    raise RecipeError(
        f"there is no recipe {str(name_or_path)!r}{nearest(wanted, known)}; "
        "`list_recipes` names all, and a file is given by its path"
    )


def parse_recipe(text: str, where: str, default_name: str | None = None) -> Recipe:
    """A recipe from YAML text; `where` names its origin in errors, `default_name` serves if it has no name."""
    try:
        data = load_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a mapping with the key `rules`")
    if default_name is not None:
        data = {"name": default_name, **data}
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_first_error(error, where)) from None


def list_recipes() -> dict[str, str]:
    """The built-in recipes: name -> one-line description, sorted by name."""
    return {recipe.name: recipe.description for recipe in sorted(_builtin(), key=lambda recipe: recipe.name)}


def known_roles() -> list[str]:
    """All roles, their prefixes and the aliases: what a rule may match by name."""
    prefixes = {role.split(".")[0] for role in ROLES}
    return sorted({*ROLES, *prefixes, *ALIASES})


def nearest(word: str, known: list[str], count: int = 3) -> str:
    """`; nearest: a, b` with the most similar of `known`, or nothing if none is similar."""
    found = difflib.get_close_matches(word, known, n=count, cutoff=0.5)
    return f"; nearest: {', '.join(found)}" if found else ""


def _builtin() -> list[Recipe]:
    folder = resources.files("halfbyte.recipes") / "builtin"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return [parse_recipe(file.read_text(encoding="utf-8"), file.name) for file in files]


def _first_error(error: ValidationError, where: str) -> str:
    """One sentence for the first problem: place, what is wrong, the nearest known key."""
    # an unknown key is often the cause of a missing one
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    place, fields = where, [str(part) for part in problem["loc"]]
    known = list(Recipe.model_fields)
    if len(problem["loc"]) > 1 and problem["loc"][0] == "rules" and isinstance(problem["loc"][1], int):
        place, fields, known = f"{where}, rule {problem['loc'][1] + 1}", fields[2:], list(Rule.model_fields)
    key = fields[0] if fields else ""
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key {key!r}{nearest(key, known)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {key}: {message}" if key else f"{place}: {message}"
