"""How well the model's structure predicts which weights matter, against measured sensitivities.

    python benchmarks/allocation_prior.py ../shared/data [--docs docs/accuracy.md]

For each small model the divergence that each unit of weights causes alone in MXFP4 (of the demo model and ``*-wiki``
those that ``allocation.py`` measured, of the story models measured here), beside what ``halfbyte allocate`` predicts
without a text: error times factor (``halfbyte.allocate.prior``). Rank correlations, and how the two scale: divergence
per predicted loss, relative to the head's (tied embeddings where there is no other). Writes
``benchmarks/results/allocation_prior.json`` and the table in the document. Needs ``halfbyte[transformers,allocate]``;
takes about a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

from common import REPOSITORY, RESULTS, head, replace_part, write_results
from halfbyte.allocate import smallest_recipe
from halfbyte.allocate.choices import AllocationUnit, make_units, measure
from halfbyte.allocate.prior import structure_factors
from halfbyte.demo import MODEL as DEMO
from halfbyte.dialects import get_dialect
from halfbyte.evaluate import TextSettings, sensitivity
from halfbyte.models.tied import is_tied
from halfbyte.source.checkpoint import Checkpoint

ROLES = ("linear", "embedding", "lm_head", "router", "shared_expert_gate")
BASE = "mxfp4"
STORIES = {"tiny1m": 256, "stories260K": 512, "TinyStories-656K": 512}
TOKENS = 4096


def divergences(checkpoint: Checkpoint, roles: list[str], data: Path) -> dict[str, float]:
    """Mean KL by unit."""
    name = checkpoint.inventory.source.rsplit("/", 1)[-1]
    if name not in STORIES:
        found = json.loads((RESULTS / "allocation" / f"{name}.json").read_text())
        return dict(found["sensitivity"]["groups"])
    with tempfile.TemporaryDirectory(prefix="halfbyte-prior-") as work:
        text = TextSettings(data / "text/calibration/tiny.utf8", length=STORIES[name], max_tokens=TOKENS)
        recipe = smallest_recipe(checkpoint, (BASE,), roles)
        groups = sensitivity(checkpoint.inventory.source, recipe, Path(work) / "s.jsonl", text)["groups"]
    return {g["group"]: g["kl"]["mean"] for g in groups[:-1]}


def one(source: Path, data: Path) -> dict[str, Any]:
    """Predicted and measured, of one model."""
    checkpoint = Checkpoint.open(str(source))
    present = {w.role.split(".")[0] for w in checkpoint.weights}
    roles = [r for r in ROLES if r == "linear" or r in present]
    kl = divergences(checkpoint, roles, data)
    units = [u for u in make_units(checkpoint, get_dialect("halfbyte"), (BASE,), roles) if u.name in kl]
    measure(checkpoint, units)
    factors = structure_factors(checkpoint.weights, is_tied(checkpoint.inventory.config))
    rows = [
        {
            "unit": unit.name,
            "error": unit.errors[BASE],
            "factor": statistics.fmean(factors[w.name] for w in unit.weights),
            "kl": kl[unit.name],
        }
        for unit in units
    ]
    top = next(r for r, u in zip(rows, units, strict=True) if _is(u, "lm_head", "embedding"))
    top = next((r for r, u in zip(rows, units, strict=True) if _is(u, "lm_head")), top)

    def scale(wanted: list[dict[str, Any]]) -> float | None:
        each = [math.log(r["kl"] / r["error"] / r["factor"] * top["error"] * top["factor"] / top["kl"]) for r in wanted]
        return math.exp(statistics.fmean(each)) if each else None

    pairs = list(zip(rows, units, strict=True))
    return {
        "model": source.name,
        "units": len(rows),
        "errors_alone": spearman([r["error"] for r in rows], [r["kl"] for r in rows]),
        "structure": spearman([r["error"] * r["factor"] for r in rows], [r["kl"] for r in rows]),
        "embedding": scale([r for r, u in pairs if _is(u, "embedding") and r is not top]),
        "sublayers": scale([r for r, u in pairs if not _is(u, "embedding", "lm_head")]),
        "rows": rows,
    }


def _is(unit: AllocationUnit, *roles: str) -> bool:
    return any(w.role in roles for w in unit.weights)


def spearman(first: list[float], second: list[float]) -> float:
    """Correlation of ranks."""
    ranks = [[sorted(values).index(v) for v in values] for values in (first, second)]
    return statistics.correlation(*ranks)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | units | rank correlation: errors alone | with structure | embeddings, measured ÷ predicted | "
        "sublayers, measured ÷ predicted |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        embedding = f"{row['embedding']:.2f}" if row["embedding"] else "(tied)"
        lines.append(
            f"| {row['model']} | {row['units']} | {row['errors_alone']:.2f} | {row['structure']:.2f} | {embedding} | "
            f"{row['sublayers']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "allocation_prior.json")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs/accuracy.md")
    args = parser.parse_args()
    models = [DEMO, *sorted((args.data / "models").glob("*-wiki")), *(args.data / "models" / n for n in STORIES)]
    found = [one(model, args.data) for model in models]
    write_results(args.output, {**head("torch", "transformers"), "models": found})
    replace_part(args.docs, "allocation prior", table(found))


if __name__ == "__main__":
    main()
