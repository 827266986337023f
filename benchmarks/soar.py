"""Global scales by amax and by SOAR's alternation on small trained models, through conversions as a user makes them.

    python benchmarks/soar.py ../shared/data [-o benchmarks/results/soar.json] [--docs docs/accuracy.md]

All linear weights of ``models/*-wiki`` in NVFP4, by each search with both kinds of global scales; every checkpoint is
verified and judged on ``enwiki2015/valid.txt``. The table between the markers in the document is written anew. Needs
``halfbyte[transformers]``; takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import numpy as np

import halfbyte
from common import REPOSITORY, RESULTS, head, replace_part, write_results
from halfbyte.checkpoint import Reader
from halfbyte.evaluate import Settings, measure
from halfbyte.plan.conversion_plan import Plan
from halfbyte.recipes import Recipe
from halfbyte.search.soar import soar_global_scale

SEARCHES = ("absmax", "four_over_six", "sweep")
SCALES = ("amax", "soar")
LENGTH, WINDOWS = 512, 24


def recipe(search: str, scale: str) -> Recipe:
    rule = {"match": "linear", "format": "nvfp4", "scale_search": search, "global_scale": scale}
    return Recipe.model_validate({"name": "soar", "rules": [rule]})


def passes(plan: Plan, search: str) -> float:
    """How many encodings a fit takes, mean over the fusion groups and stacks (of which the slowest expert counts)."""
    groups: dict[str, list[Any]] = {}
    for item in plan.items:
        if item.fitted:
            groups.setdefault(item.weight.group or item.weight.name, []).append(item.weight)
    with Reader(plan.checkpoint.inventory) as reader:
        read = plan.checkpoint.read
        counts = [
            len(soar_global_scale([read(reader, w) for w in weights], "nvfp4", search).errors)
            for weights in groups.values()
        ]
    return float(np.mean(counts))


def run(source: Path, text: Path, work: Path) -> dict[str, Any]:
    """All rows of one model."""
    made: list[dict[str, Any]] = []
    folders = []
    for search in SEARCHES:
        for scale in SCALES:
            out = work / f"{source.name}-{search}-{scale}"
            plan = halfbyte.plan(source, recipe(search, scale), dialect="halfbyte")
            done = halfbyte.quantize(plan, out)
            found = passes(plan, search) if scale == "soar" else None
            made.append({"search": search, "global_scale": scale, "relmse": done.relmse, "passes": found})
            folders.append(out)
    settings = Settings(text=text, length=LENGTH, max_tokens=WINDOWS * LENGTH, dequantize=True, noise_floor=True)
    document = measure(folders, source, settings)
    reference, *rows = document["rows"]
    for entry, row in zip(made, rows, strict=True):
        entry |= {"kl": row["kl"]["mean"], "kl_ci": row["kl_ci"]["mean"], "top1": row["kl"]["top1"]}
        entry["same"] = sorted(row["indistinguishable"]["kl"])
        print(source.name, entry, flush=True)
    return {"model": source.name, "protocol": reference["protocol"], "rows": made}


def table(results: dict[str, Any]) -> str:
    named = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"{results['date']}, {named}. `nvfp4`, all linear weights, converted and evaluated on {WINDOWS} windows of "
        f"{LENGTH} tokens. KL divergence from the source in nats per token × 1000, 95 % intervals in brackets; "
        "*italic*: not distinguishable from that of amax (paired). Passes: additional encodings per fit.",
        "",
        "| model | search | relative squared error, amax | `soar` | change | KL, amax | `soar` | passes |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model in results["models"]:
        by = {(row["search"], row["global_scale"]): row for row in model["rows"]}
        for search in SEARCHES:
            amax, soar = (by[search, scale] for scale in SCALES)
            kl = [
                f"{1000 * r['kl']:.3g} ({1000 * r['kl_ci'][0]:.3g} to {1000 * r['kl_ci'][1]:.3g})" for r in (amax, soar)
            ]
            if any(name.endswith(f"-{search}-amax") for name in soar["same"]):
                kl[1] = f"*{kl[1]}*"
            lines.append(
                f"| {model['model']} | {search} | {amax['relmse']:.6f} | {soar['relmse']:.6f} | "
                f"{100 * (soar['relmse'] / amax['relmse'] - 1):+.2f} % | {kl[0]} | {kl[1]} | {soar['passes']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "soar.json")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs/accuracy.md")
    args = parser.parse_args()
    results: dict[str, Any] = {**head("torch", "transformers"), "models": []}
    with tempfile.TemporaryDirectory(prefix="halfbyte-soar-") as work:
        for source in sorted((args.data / "models").glob("*-wiki")):
            results["models"].append(run(source, args.data / "text/enwiki2015/valid.txt", Path(work)))
    write_results(args.output, results)
    replace_part(args.docs, "soar", f"\n{table(results)}\n")


if __name__ == "__main__":
    main()
