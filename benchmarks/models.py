"""Small trained models in every recipe: size, weight error, perplexity and KL divergence on held-out text.

    python benchmarks/models.py ../shared/data [-o benchmarks/results/models.json] [--docs docs/results.md]

The folder holds ``models/NAME`` and ``text/...``; models named ``*-wiki`` are measured on ``enwiki2015/valid.txt``,
the others on ``calibration/tiny.utf8``. Formats that no recipe uses are applied to all linear weights with ``sweep``.
Recipes that do not fit a model are left out. The tables between the markers in the document are written anew.
Needs ``halfbyte[transformers]``; takes about ten minutes on two cores. ``--only`` names models.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.recipes import Recipe, parse_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
# by weight error, the largest first; then other formats and sizes
RECIPES = (
    *("mxfp4", "mxfp4-sweep", "nvfp4-absmax", "nvfp4-four-over-six", "nvfp4", "mixfp4-absmax", "mixfp4"),
    *("if4", "razer", "hif4", "nvfp4-fp8", "int4-g128", "int4-g64", "int4-g32", "fp8-block", "fp8"),
)
FORMATS = ("nvint4", "nf4", "iq4_nl", "affine4_g64", "int4_asym_g32", "mxfp8")
LENGTH, TOKENS = 256, 12_288
START, END = "<!-- tables of benchmarks/models.py -->", "<!-- end of tables -->"


def recipes() -> list[Recipe]:
    rules = "rules:\n  - {{match: linear, format: {name}, search: sweep, indivisible: keep}}\n"
    own = [parse_recipe(rules.format(name=name), name, name) for name in FORMATS]
    return [*(halfbyte.load_recipe(name) for name in RECIPES), *own]


def measure(model: Path, text: Path, folder: Path) -> dict[str, Any]:
    """All recipes on one model."""
    rows, outputs = [], []
    for recipe in recipes():
        try:
            plan = halfbyte.plan(model, recipe, dialect="halfbyte")
        except HalfbyteError as error:
            print(f"{model.name}: {recipe.name} does not fit: {error}")
            continue
        out = folder / recipe.name
        done = halfbyte.quantize(plan, out)
        checked = halfbyte.verify(out, model)
        if not checked.ok:
            raise SystemExit(f"{model.name}, {recipe.name}: {checked.problems[0]}")
        classes = [c for c in plan.summary()["classes"] if c["action"] == "quantize"]
        parameters = sum(c["parameters"] for c in classes)
        rows.append(
            {
                "recipe": recipe.name,
                "bytes": plan.data_bytes,
                "bits_per_weight": plan.bits_per_weight,
                "quantized_parameters": parameters,
                "quantized_bits": 8 * sum(c["bytes"] for c in classes) / parameters,
                "relmse": done.relmse,
            }
        )
        outputs.append(out)
        print(f"{model.name}: {recipe.name} relMSE {done.relmse:.5f}", flush=True)
    source, *found = halfbyte.evaluate(
        outputs, against=model, text=text, length=LENGTH, max_tokens=TOKENS, dequantize=True
    )
    for row, values in zip(rows, found, strict=True):
        row.update(perplexity=values["perplexity"], kl=values["kl"])
        print(f"{model.name}: {row['recipe']} perplexity {row['perplexity']:.3f}, KL {row['kl']['mean']:.5f}")
    return {
        "model": model.name,
        "bytes": source["bytes"],
        "perplexity": source["perplexity"],
        "protocol": source["protocol"],
        "rows": rows,
    }


def machine() -> dict[str, Any]:
    cpu, info = platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.+)", info.read_text())):
        cpu = found.group(1)
    packages = ("numpy", "ml_dtypes", "torch", "transformers")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "versions": {
            "halfbyte": halfbyte.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }


def tables(results: dict[str, Any]) -> str:
    """Markdown: KL divergence, then perplexity, a column per model."""
    models = results["models"]
    by_recipe: dict[str, dict[str, dict[str, Any]]] = {}
    for model in models:
        for row in model["rows"]:
            by_recipe.setdefault(row["recipe"], {})[model["model"]] = row
    names = [model["model"] for model in models]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    tokens = ", ".join(f"{m['model']} {m['protocol']['tokens']:,}" for m in models)
    lines = [
        f"{results['date']}, {results['cpu']} ({results['cores']} cores), {versions}. "
        f"Windows of {LENGTH} tokens, FP32; tokens scored: {tokens}.",
        "",
        "KL divergence from the source, nats per token × 1000. Bits: of the quantized weights, scales included.",
        "",
        f"| recipe | bits | {' | '.join(names)} |",
        f"|---|---:|{'---:|' * len(names)}",
    ]
    for recipe, found in by_recipe.items():
        bits = max(row["quantized_bits"] for row in found.values())
        cells = [f"{1000 * found[n]['kl']['mean']:.2f}" if n in found else "–" for n in names]
        lines.append(f"| {recipe} | {bits:.3g} | {' | '.join(cells)} |")
    lines += ["", "Perplexity.", "", f"| recipe | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines.append("| source | " + " | ".join(f"{m['perplexity']:.3f}" for m in models) + " |")
    for recipe, found in by_recipe.items():
        cells = [f"{found[n]['perplexity']:.3f}" if n in found else "–" for n in names]
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_docs(path: Path, text: str) -> None:
    content = path.read_text(encoding="utf-8")
    before, rest = content.split(START)
    path.write_text(f"{before}{START}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=REPOSITORY / "benchmarks/results/models.json")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs/results.md")
    parser.add_argument("--only", nargs="*", metavar="MODEL")
    args = parser.parse_args()
    results: dict[str, Any] = {**machine(), "models": []}
    for model in sorted(p for p in (args.data / "models").iterdir() if (p / "config.json").exists()):
        if args.only and model.name not in args.only:
            continue
        wiki = model.name.endswith("-wiki")
        text = args.data / "text" / ("enwiki2015/valid.txt" if wiki else "calibration/tiny.utf8")
        with tempfile.TemporaryDirectory(prefix="halfbyte-models-") as folder:
            results["models"].append(measure(model, text, Path(folder)))
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_docs(args.docs, tables(results))


if __name__ == "__main__":
    main()
