"""What the matrix has: dialects and formats from the registries, models for each, and the checkpoints themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from halfbyte.convert.conversion import convert
from halfbyte.dialects import Dialect, get_dialect, list_dialects
from halfbyte.formats import BlockFormat, Format, get_format, list_formats
from halfbyte.models import Piece, Weight
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.transcoding import check_shape
from halfbyte.source.checkpoint import Checkpoint
from matrix.sources import MODELS, write
from small_models import recipe

_QUANTIZED = re.compile(r"(_proj(\.weight)?|shared_expert_gate\.weight|embed_tokens\.weight|lm_head\.weight)$")
_PROBES = tuple(
    Weight(name, role, 0, shape, "BF16", (Piece(name),), interleaved=len(shape) == 3)
    for name, role, shape in (
        ("model.layers.0.self_attn.q_proj.weight", "attention.q", (256, 256)),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts.gate_up", (2, 256, 256)),
    )
)
# engines that have one architecture, or not all
_MODELS = {
    "gpt-oss": [model for model in MODELS if model.startswith("gpt-oss")],
    "gguf": [model for model in MODELS if "fused" not in model],
}


class Case(NamedTuple):
    """A format in a dialect on a model."""

    dialect: str
    format: str
    model: str


class Pair(NamedTuple):
    """A format in a dialect, converted to another one and back."""

    dialect: str
    other: str
    format: str
    model: str


def _holds(fmt: Format, *dialects: Dialect) -> bool:
    """Whether there is a weight that all of these dialects can hold."""
    return any(all(dialect.spelling.problem(weight, fmt) is None for dialect in dialects) for weight in _PROBES)


HELD = [(d, f) for d in list_dialects() for f in map(get_format, list_formats()) if _holds(f, d)]
CASES = [Case(d.name, f.name, model) for d, f in HELD for model in _MODELS.get(d.name, MODELS)]


def has_global_scale(fmt: Format) -> bool:
    return isinstance(fmt, BlockFormat) and fmt.has_global_scale


def _pairs() -> list[Pair]:
    found = []
    for (one, fmt), (two, same) in product(HELD, HELD):
        # GGUF is no source, and MLX cannot store every global scale
        if (
            one is two
            or fmt is not same
            or not _holds(fmt, one, two)
            or one.package.standalone
            or (two.spelling.power_of_two and has_global_scale(fmt))
        ):
            continue
        models = [m for m in MODELS if all(m in _MODELS.get(d.name, MODELS) for d in (one, two))]
        kinds = ("dense", "per expert", "fused") if "gpt-oss" not in (one.name, two.name) else ("gpt-oss",)
        if one.spelling.format_for(_PROBES[0], fmt) is not fmt:
            # in experts only
            kinds = kinds[1:]
        found += [Pair(one.name, two.name, fmt.name, model) for model in models if model in kinds]
    return found


PAIRS = _pairs()


@dataclass
class Made:
    """A quantized checkpoint in the folder ``out``; ``errors``: squared error by weight, as counted while encoding."""

    source: Path
    out: Path
    errors: dict[str, float]


def make(root: Path, dialect: str, fmt: Format, model: str, other: str | None = None) -> Made:
    """Quantize all matrices that a dialect, and the ``other`` one, can hold, in the smallest model where any can be."""
    source, plan = planned(root, dialect, fmt, model, other)
    done = convert(plan, root / "out", threads=1)
    return Made(source, root / "out", {error.name: error.squared_error for error in done.errors})


def planned(root: Path, dialect: str, fmt: Format, model: str, other: str | None = None) -> tuple[Path, Plan]:
    """The source of such a checkpoint, written below ``root``, and its plan."""
    for k in _widths(fmt, model):
        source = root / f"{model}-{k}"
        if not source.exists():
            write(source, model, k)
        checkpoint = Checkpoint.open(source)
        bound = [get_dialect(name).for_model(checkpoint.inventory) for name in (dialect, other) if name]
        matrices = [w for w in checkpoint.weights if _QUANTIZED.search(w.name)]
        names = [w.name for w in matrices if _fits(w.untransposed(), fmt, bound)]
        if names:
            rule = {
                "match": [f"re:^{re.escape(name)}$" for name in names],
                "format": fmt.name,
                "scale_search": "absmax",
            }
            return source, make_plan(checkpoint, recipe(rule), dialect)
    raise AssertionError(f"{dialect} holds no weight of the model {model!r} in {fmt.name}")


def _fits(weight: Weight, fmt: Format, dialects: list[Dialect]) -> bool:
    stands = dialects[0].spelling.format_for(weight, fmt)
    return all(
        d.spelling.problem(weight, stands) is None
        and check_shape(weight, stands, d) is None
        and d.spelling.format_for(weight, stands) is stands
        for d in dialects
    )


def _widths(fmt: Format, model: str) -> list[int]:
    rows, columns = fmt.block
    if rows > 1:
        # a square that is cut at the edge, where the dialect takes it
        return [columns + 8, columns] if "odd" in model else [columns]
    return [columns * times for times in (1, 2, 4)] if columns > 0 else [32]
