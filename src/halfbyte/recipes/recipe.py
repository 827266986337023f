"""The recipe language: ordered rules from roles or name patterns to a format, or keep, or drop."""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from halfbyte.checkpoint.files import read_small
from halfbyte.errors import CheckpointError, RecipeError
from halfbyte.formats.rotation import ROTATIONS
from halfbyte.models.regex import REGEX, check_expression
from halfbyte.models.roles import ROLES, is_known
from halfbyte.models.strict_yaml import MAX_LENGTH, load_yaml
from halfbyte.recipes.old_keys import replace_old_keys

ALIASES = ("linear", "all")
_COMPARED = 200
OF_GPTQ = frozenset({"static_groups", "order", "damping", "target", "output", "refine"})
OF_FORMATS = frozenset(
    {
        "scale_search",
        "global_scale",
        "if_not_divisible",
        "error_weight",
        "rounding",
        "objective",
        "transform",
        "activations",
    }
)


class Rule(BaseModel):
    """One rule: which weights (`match`) get which fate (`format`, `keep` or `drop`, exactly one of them).

    `match` entries are role prefixes (`experts` covers `experts.gate_up`), the aliases `linear` and `all`, or
    `re:` and a Python regex that is searched in the names of the weight and of its source tensors. `error_weight`
    weighs the errors of the scale search; None: importance, where a file is given and holds it. `rounding`: each value
    to the nearest (`rtn`, also None) or with error feedback (`gptq`). `objective`: what the scale search minimises;
    None: the squared error, or for GPTQ its own loss. `static_groups`, `order` and `damping` are those of GPTQ.
    `target`: what GPTQ comes close to, the weight itself (`weight`, also None) or the weight refitted to the inputs and
    the error in the residual stream that the quantized layers before it leave (`residual`).
    `output: fisher` weighs its error by the gradients at the outputs, `refine: descent` moves single codes afterwards.
    `activations`: whether engines quantize what these weights are multiplied by, and how their scales are found; None:
    as is usual for the format in the dialect. Keys of before 0.2 are read, too (`halfbyte.recipes.old_keys`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    match: tuple[str, ...] = Field(min_length=1)
    format: str | None = None
    keep: Literal[True] | None = None
    drop: Literal[True] | None = None
    scale_search: str = "sweep"
    global_scale: Literal["amax", "power_of_two", "soar"] = "amax"
    if_not_divisible: Literal["error", "keep"] = "error"
    error_weight: Literal["importance", "none"] | None = None
    rounding: Literal["rtn", "gptq"] | None = None
    objective: Literal["squared_error", "local_hessian", "gptq_loss"] | None = None
    static_groups: bool | None = None
    order: Literal["none", "act"] | None = None
    damping: float | None = Field(default=None, ge=0, lt=1)
    target: Literal["weight", "residual"] | None = None
    output: Literal["fisher"] | None = None
    refine: Literal["descent"] | None = None
    transform: Literal["awq", "hadamard", "duquant"] | None = None
    activations: Literal["none", "dynamic", "static"] | None = None
    optional: bool = False
    reason: str | None = None
    _old_keys: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def action(self) -> Literal["quantize", "keep", "drop"]:
        """What the rule does with the weights that it matches."""
        return "quantize" if self.format else "keep" if self.keep else "drop"

    @property
    def rotates(self) -> bool:
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
                problem = check_expression(entry[len(REGEX) :])
                if problem:
                    raise ValueError(f"{entry[:100]!r} is not a valid regular expression here: {problem}")
            elif entry not in ALIASES and not is_known(entry):
                raise ValueError(f"there is no role {entry[:100]!r}{nearest(entry, known_roles())}")
        return entries

    @model_validator(mode="wrap")
    @classmethod
    def _read_old_keys(cls, content: Any, handler: ModelWrapValidatorHandler[Rule]) -> Rule:
        """Translate keys of recipes from before 0.2, and remember which ones they were."""
        if not isinstance(content, dict):
            return handler(content)
        renamed = replace_old_keys(content)
        rule = handler(renamed.content)
        rule._old_keys = renamed.replaced
        return rule

    @model_validator(mode="after")
    def _one_fate(self) -> Rule:
        if [bool(self.format), bool(self.keep), bool(self.drop)].count(True) != 1:
            raise ValueError("give exactly one of `format: <name>`, `keep: true`, `drop: true`")
        if self.drop and not (self.reason or "").strip():
            raise ValueError("a rule that drops weights must give a `reason`")
        if not self.format:
            useless = (OF_FORMATS & self.model_fields_set) | self._given(OF_GPTQ)
            if useless:
                raise ValueError(f"`{sorted(useless)[0]}` has no meaning without `format`")
            return self
        if self.target == "residual" and (self.transform == "awq" or self.global_scale == "soar"):
            key = "transform: awq" if self.transform == "awq" else "global_scale: soar"
            raise ValueError(f"`target: residual` finds scales for weights that it refits; leave `{key}` out")
        if self.rotates and self.error_weight == "importance":
            raise ValueError(f"`transform: {self.transform}` mixes columns, so importance of single ones cannot weigh")
        if self.output and self.transform == "awq":
            raise ValueError("`output: fisher` weighs rows that `transform: awq` rescales; leave one of them out")
        return self._one_objective()

    def _one_objective(self) -> Rule:
        """Refuse keys that contradict each other about what the scale search minimises."""
        if self.rounding != "gptq":
            useless = self._given(OF_GPTQ)
            if useless:
                raise ValueError(f"`{sorted(useless)[0]}` has no meaning without `rounding: gptq`")
            if self.objective == "gptq_loss":
                raise ValueError("`objective: gptq_loss` has no meaning without `rounding: gptq`")
            if self.objective == "local_hessian" and self.error_weight is not None:
                raise ValueError("`objective: local_hessian` weighs errors itself; leave `error_weight` out")
        elif self.error_weight is not None:
            raise ValueError("`rounding: gptq` judges by its own loss; leave `error_weight` out, or see `objective`")
        elif self.static_groups and self.objective not in (None, "squared_error"):
            raise ValueError(
                f"`static_groups: true` chooses scales before the first column is rounded, but `objective: "
                f"{self.objective}` judges them at their turn; leave one of them out"
            )
        return self

    def _given(self, keys: frozenset[str]) -> set[str]:
        return {key for key in keys if getattr(self, key) is not None}


class Recipe(BaseModel):
    """Rules in order, the last match wins; weights that no rule matches are kept as they are.

    `dialect` is what the recipe is written in when the user names none. `calibration`: whether what rules ask of
    activations (`error_weight: importance`, `rounding: gptq`, `objective: local_hessian`, `transform: awq`, `duquant`)
    may be left out if nothing is known.
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
            rule.rounding == "gptq"
            or rule.error_weight == "importance"
            or rule.objective == "local_hessian"
            or rule.transform in ("awq", "duquant")
            for rule in self.rules
        )
        return self.calibration == "required" and (self.kv_cache is not None or any(asks))

    @property
    def refits(self) -> bool:
        """Whether weights are refitted while a calibration rounds them, so that it needs text."""
        return any(rule.target == "residual" for rule in self.rules)

    @property
    def needs_output_hessians(self) -> bool:
        """Whether a rule asks for gradients at the outputs."""
        return any(rule.output == "fisher" for rule in self.rules)

    @property
    def notes(self) -> list[str]:
        """Say which old keys the recipe uses, in at most one sentence."""
        replaced = dict.fromkeys(pair for rule in self.rules for pair in rule._old_keys.items())
        if not replaced:
            return []
        keys = ", ".join(f"`{old}` is now `{new}`" for old, new in replaced)
        return [f"recipe {self.name} uses keys that only this release still reads: {keys}"]

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
            text = read_small(path, MAX_LENGTH).decode("utf-8")
        except (CheckpointError, UnicodeDecodeError) as error:
            cause = getattr(error.__cause__, "strerror", None) or str(error)
            reason = cause if isinstance(error, CheckpointError) else "it is not UTF-8 text"
            raise RecipeError(f"the recipe {path} cannot be read: {reason}") from None
        return parse_recipe(text, str(path), path.stem)
    wanted = str(name_or_path).lower().replace("_", "-")
    recipes = _all()
    for recipe in recipes:
        if wanted == recipe.name or wanted in recipe.aliases:
            return recipe
    known = [name for recipe in recipes for name in (recipe.name, *recipe.aliases)]
    raise RecipeError(
        f"there is no recipe {str(name_or_path)!r}{_of_llama(wanted) or nearest(wanted, known)}; "
        "`halfbyte recipes` lists all, and a file is given by its path"
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
    return {recipe.name: recipe.description for recipe in sorted(_all(), key=lambda recipe: recipe.name)}


def register_recipe(text: str) -> Recipe:
    """Add a recipe, given as YAML, to the built-in ones; RecipeError where its name or an alias is taken."""
    recipe = parse_recipe(text, "the recipe of a plugin")
    taken = {name for known in _all() for name in (known.name, *known.aliases)}
    for name in (recipe.name, *recipe.aliases):
        if name in taken:
            raise RecipeError(f"there is a recipe {name!r} already; give the new one another name")
    _ADDED.append(recipe)
    return recipe


def known_roles() -> list[str]:
    """All roles, their prefixes and the aliases: what a rule may match by name."""
    prefixes = {role.split(".")[0] for role in ROLES}
    return sorted({*ROLES, *prefixes, *ALIASES})


def _of_llama(word: str) -> str:
    """What to take instead of llama.cpp's K and I quantizations, which halfbyte does not write."""
    if not re.fullmatch(r"(ud-)?i?q[1-8]-(k|[01x])(-?[a-z]+)?|iq\d-[a-z]+", word):
        return ""
    return ", which is llama.cpp's; of its formats halfbyte writes MXFP4 and NVFP4 (--recipe mxfp4 --for llama.cpp)"


def nearest(word: str, known: list[str], count: int = 3) -> str:
    """`; nearest: a, b` with the most similar of `known`, or nothing if none is similar."""
    # comparing takes the square of the length
    short = [name for name in known if len(name) <= _COMPARED]
    matches = difflib.get_close_matches(word[:_COMPARED], short, n=count, cutoff=0.5)
    return f"; nearest: {', '.join(matches)}" if matches else ""


_ADDED: list[Recipe] = []


def _all() -> list[Recipe]:
    return [*_builtin(), *_ADDED]


@cache
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
