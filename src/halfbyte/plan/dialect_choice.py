"""The dialect of an output that names none: the one that most engines load, or the one for a given engine."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.compatibility.engine_facts import Engine, engines
from halfbyte.dialects import Dialect, get_dialect, list_dialects
from halfbyte.errors import PlanError
from halfbyte.formats import get_format
from halfbyte.models import Weight
from halfbyte.models.weight import Piece
from halfbyte.recipes import Recipe

ENGINES = {
    "vllm": "vLLM",
    "transformers": "transformers",
    "mlx": "mlx-lm",
    "llama.cpp": "llama.cpp",
    "sglang": "SGLang",
}
"""What users call engines, and their names in ``engine_facts.yaml``."""
OWN = "halfbyte"
GENERAL = ("compressed-tensors", "modelopt", "mlx")
"""Dialects for any model, in folders with a config.json; the others are for one format, one model or one engine."""
_WITH = "halfbyte installed"
_NAME, _STACK = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.experts.down_proj"
_SAMPLES = (
    Weight(_NAME, "mlp.down", 0, (4096, 4096), "BF16", (Piece(_NAME),)),
    Weight(_STACK, "experts.down", 0, (2, 4096, 4096), "BF16", (Piece(_STACK),)),
)


def formats_of(recipe: Recipe) -> list[str]:
    """Names of the formats that a recipe's rules give."""
    return list(dict.fromkeys(rule.format for rule in recipe.rules if rule.format))


def best_dialect(recipe: Recipe, engine: str | None = None) -> str:
    """The dialect in which most engines load all formats of a recipe by themselves, else ``halfbyte``.

    ``engine``, one of ENGINES: the dialect that this one loads, also where it needs halfbyte beside it; PlanError where
    none is known.
    """
    formats = [_stored(recipe, fmt) for fmt in formats_of(recipe)]
    if engine is not None:
        chosen = next(e for e in engines() if e.name == ENGINES[engine])
        for alone in (True, False):
            for dialect in _order():
                if _loads(chosen, dialect, formats, alone):
                    return dialect
        raise PlanError(
            f"{chosen.name} is not known to load {', '.join(formats)} in any dialect; `halfbyte formats` lists what "
            "each dialect holds, and docs/engines.md what each engine loads"
        )
    votes = {d: sum(_loads(e, d, formats) for e in engines() if e.name != OWN) for d in _order() if d in GENERAL}
    most = max(votes.values(), default=0)
    return next(d for d, count in votes.items() if count == most) if most else OWN


def _order() -> list[str]:
    """Dialects, the most general engines' first; ``halfbyte`` is the last resort."""
    names = [dialect.name for dialect in list_dialects()]
    return sorted(names, key=lambda name: (name == OWN, name != "compressed-tensors"))


def _loads(engine: Engine, dialect: str, formats: Sequence[str], alone: bool = True) -> bool:
    if not all(_holds(dialect, fmt) for fmt in formats):
        return False
    loads = [engine.load(dialect, fmt) for fmt in formats]
    if not loads or any(load is None for load in loads):
        return False
    wrong = [f for f in engine.facts if dialect in f.dialects and f.effect in ("wrong", "refuses") and not f.hardware]
    if any(not fact.roles and set(fact.formats) & set(formats) for fact in wrong) and alone:
        return False
    return not alone or not any(load and (_WITH in load.where or "import halfbyte" in load.where) for load in loads)


def _stored(recipe: Recipe, name: str) -> str:
    """A format as engines know it, with the rotation that a rule's transform adds."""
    rule = next(rule for rule in recipe.rules if rule.format == name)
    return f"{name}_{rule.transform}" if rule.transform in ("hadamard", "duquant") else name


def _holds(dialect: str, name: str) -> bool:
    """Whether a dialect can spell a format, of a matrix or of a stack of experts."""
    return any(get_dialect(dialect).spelling.problem(weight, get_format(name)) is None for weight in _SAMPLES)


def suggestion(name: str) -> str:
    """What to say of an engine's name given for a dialect's; "" where it is none."""
    key = str(name).lower().replace("mlx-lm", "mlx")
    if key not in ENGINES or any(dialect.name == str(name) for dialect in list_dialects()):
        return ""
    engine = next(e for e in engines() if e.name == ENGINES[key])
    reads = [dialect for dialect in engine.reads if dialect not in ("plain", OWN) and get_dialect(dialect)]
    return f"{engine.name} is an engine; it reads {', '.join(reads)}"


def find_dialect(name: str | Dialect) -> Dialect:
    """The dialect of this name; PlanError where there is none, with those of an engine that is named instead."""
    if not isinstance(name, Dialect) and (advice := suggestion(name)):
        raise PlanError(f"there is no dialect {name!r}: {advice}")
    return get_dialect(name)
