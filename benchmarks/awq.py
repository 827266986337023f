"""AWQ folding and importance on small trained models: weighted error and KL divergence of converted checkpoints.

    python benchmarks/awq.py ../shared/data [-o benchmarks/results/awq.json] [--docs docs/accuracy.md]

As a user would do it: statistics of activations are collected from training text, checkpoints are quantized with
them, verified, and judged on held-out text. Models: ``models/*-wiki``. All linear weights are quantized with
``sweep``; the rest stays BF16, rounded again where it was scaled. The table between the markers in the document is
written anew. Needs ``halfbyte[transformers]``; takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import lzma
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import halfbyte
from common import REPOSITORY, RESULTS, head, replace_part, write_results
from halfbyte.calibrate.collect import CollectOptions, collect_statistics
from halfbyte.evaluate.errors_document import tensor_errors
from halfbyte.recipes import Recipe, load_recipe

FORMATS = ("mxfp4", "nvfp4", "int4_g32", "int4_g128")
# name: (errors weighted by importance, weights folded)
METHODS = {
    "sweep": (False, False),
    "sweep, importance": (True, False),
    "AWQ": (False, True),
    "AWQ, importance": (True, True),
}
BUILTIN = ("ud-mxfp4", "ud-q4")
LENGTH, CALIBRATION, HELD_OUT = 512, 64, 24


def recipe(fmt: str, method: str) -> Recipe:
    """All linear weights in a format by a method."""
    weighted, folded = METHODS[method]
    rule = {"match": "linear", "format": fmt, "error_weight": "importance" if weighted else "none"}
    return Recipe.model_validate(
        {"name": "awq", "calibration": "optional", "rules": [rule | ({"transform": "awq"} if folded else {})]}
    )


class Bench:
    """One model, and statistics of its activations on two texts."""

    def __init__(self, folder: Path, data: Path, work: Path) -> None:
        self.source, self.work = folder, work
        texts = data / "text" / "enwiki2015"
        self.held_out = texts / "valid.txt"
        train = work / "train.txt"
        if not train.exists():
            content = lzma.decompress((texts / "train_first12MB.txt.xz").read_bytes())[:1_500_000]
            train.write_text(content.decode(errors="ignore"), "utf-8")
        self.seen, self.judge = (work / f"{folder.name}-{name}" for name in ("seen", "judge"))
        collect_statistics(folder, self.seen, [train], CollectOptions(CALIBRATION, LENGTH, hessians=False))
        collect_statistics(folder, self.judge, [self.held_out], CollectOptions(HELD_OUT, LENGTH, hessians=False))
        self.count = 0

    def measure(self, what: Recipe, with_importance: bool) -> dict[str, Any]:
        """Quantize, verify, measure."""
        self.count += 1
        out = self.work / f"{self.source.name}-{self.count}"
        done = halfbyte.quantize(self.source, out, what, importance=self.seen if with_importance else None)
        problems = halfbyte.verify(out, self.source).problems
        if problems:
            raise SystemExit(f"{self.source.name} {what.name}: {problems[0]}")
        errors = [w["weighted_relmse"] for w in tensor_errors(out, self.source, self.judge)["weights"]]
        judged = [error for error in errors if error is not None]
        limit = HELD_OUT * LENGTH
        row = halfbyte.evaluate([out], self.source, self.held_out, length=LENGTH, stride=LENGTH, max_tokens=limit)[-1]
        smoothings = [group for group in done.smoothings if group.alpha]
        return {
            "weighted_error": sum(judged) / len(judged),
            "relmse": done.relmse,
            "kl": row["kl"]["mean"],
            "top1": row["kl"]["top1"],
            "groups": len(done.smoothings),
            "folded": len(smoothings),
            "rounding": max((error for group in smoothings for error in group.rounding.values()), default=0.0),
        }


def table(results: dict[str, Any]) -> str:
    """The measured numbers as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"{results['date']}, {versions}. Importance from {CALIBRATION} × {LENGTH} tokens; evaluated on {HELD_OUT} × "
        f"{LENGTH} others. Error: mean over the weights of the importance-weighted squared error relative to the "
        "output's energy. KL: nats per token × 1000.",
        "",
    ]
    for model in results["models"]:
        lines += [
            f"**{model['model']}**",
            "",
            "| method | " + " | ".join(f"{f} error | KL" for f in FORMATS) + " |",
            "|---|" + "---:|---:|" * len(FORMATS),
        ]
        for method in METHODS:
            rows = [r for f in FORMATS for r in model["rows"] if (r["format"], r["method"]) == (f, method)]
            cells = [f"{r['weighted_error']:.5f} | {1000 * r['kl']:.2f}" for r in rows]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines += ["", "| recipe | error | KL | with importance: error | KL | groups smoothed |", "|---|" + "---:|" * 5]
        for name in BUILTIN:
            plain, given = (r for r in model["builtin"] if r["recipe"] == name)
            lines.append(
                f"| `{name}` | {plain['weighted_error']:.5f} | {1000 * plain['kl']:.2f} | "
                f"{given['weighted_error']:.5f} | {1000 * given['kl']:.2f} | {given['folded']} of {given['groups']} |"
            )
        rounding = max(r["rounding"] for r in model["rows"] + model["builtin"])
        if rounding:
            lines += [
                "",
                f"Scaled weights that stay BF16 are rounded again: a relative error of at most {rounding:.1e}.",
            ]
        lines.append("")
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "awq.json")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs/accuracy.md")
    args = parser.parse_args()
    builtin = {name: load_recipe(name) for name in BUILTIN}
    results: dict[str, Any] = {
        **head("torch", "transformers"),
        "models": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((args.data / "models").glob("*-wiki")):
            bench = Bench(source, args.data, Path(folder))
            model: dict[str, Any] = {"model": source.name, "rows": [], "builtin": []}
            results["models"].append(model)
            for fmt in FORMATS:
                for method, wishes in METHODS.items():
                    row = bench.measure(recipe(fmt, method), any(wishes))
                    model["rows"].append({"format": fmt, "method": method, **row})
                    print(f"{source.name} {fmt} {method}: {row}", flush=True)
            for name, what in builtin.items():
                for given in (False, True):
                    row = bench.measure(what, given)
                    model["builtin"].append({"recipe": name, "importance": given, **row})
                    print(f"{source.name} {name} {'with' if given else 'without'} importance: {row}", flush=True)
    write_results(args.output, results)
    replace_part(args.docs, "awq", f"\n{table(results)}\n")


if __name__ == "__main__":
    main()
