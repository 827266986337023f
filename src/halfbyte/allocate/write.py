"""An allocation as an ordinary recipe, with its reasons in comments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from halfbyte.allocate.choices import KEEP, AllocationUnit, Choice
from halfbyte.dialects.module_patterns import compact, spaces
from halfbyte.models import Weight


def recipe_text(
    name: str,
    units: Sequence[AllocationUnit],
    chosen: Sequence[Choice],
    weights: Sequence[Weight],
    searches: Mapping[str, str],
    comments: Sequence[str] = (),
    dialect: str | None = None,
) -> str:
    """The YAML of a recipe that gives every unit's weights their format and keeps all others of ``weights``.

    ``comments`` are lines for the comment on top; ``searches`` names a format's search where it is not ``sweep``.
    """
    lines = [f"# {line}" for line in comments]
    lines += [f"name: {name}", f'description: "{_described(units, chosen)}"']
    if dialect:
        lines.append(f"dialect: {dialect}")
    lines.append("rules:")
    apart = spaces(weights)
    everything = {w.name for w in weights}
    order = sorted({c.format for c in chosen}, key=lambda f: -sum(u.parameters for u in _those(units, chosen, f)))
    for fmt in order:
        members = _those(units, chosen, fmt)
        names = {w.name for unit in members for w in unit.weights}
        loss = sum(c.loss for c in chosen if c.format == fmt)
        size = sum(c.bytes for c in chosen if c.format == fmt)
        lines.append(f"  # {len(members)} units, {len(names)} weights, {size} bytes, predicted loss {loss:.3g}")
        lines.append("  - match:")
        for pattern in compact(sorted(names), everything - names, apart):
            # engines match such patterns from the beginning of a name, recipes anywhere
            lines.append(f"      - 're:^{pattern.removeprefix('re:').removeprefix('^')}'")
        if fmt == KEEP:
            lines.append("    keep: true")
            lines.append("    reason: the bytes that another format would save are better saved elsewhere")
        else:
            lines.append(f"    format: {fmt}")
            lines.append(f"    scale_search: {searches.get(fmt, 'sweep')}")
    return "\n".join(lines) + "\n"


def _those(units: Sequence[AllocationUnit], chosen: Sequence[Choice], fmt: str) -> list[AllocationUnit]:
    return [unit for unit, choice in zip(units, chosen, strict=True) if choice.format == fmt]


def _described(units: Sequence[AllocationUnit], chosen: Sequence[Choice]) -> str:
    size, count = sum(c.bytes for c in chosen), sum(u.parameters for u in units)
    return f"Allocated automatically: {8 * size / max(count, 1):.3f} bits per weight over {len(units)} units."
