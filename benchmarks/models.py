"""Small trained models in every recipe: size, weight error, perplexity and KL divergence on held-out text.

    python benchmarks/models.py ../shared/data [-o benchmarks/results/models] [--docs docs/results.md]

The folder holds ``models/NAME`` and ``text/...``; models named ``*-wiki`` are measured on ``enwiki2015/valid.txt``,
the others on ``calibration/tiny.utf8``. Formats that no recipe uses are applied to all linear weights with ``sweep``.
Recipes that do not fit a model are left out. One results file per model (docs/evaluation.md); it holds the errors of
each weight for the wiki models only, without the histograms of scales. The tables between the markers in the document
are written anew from all results files.
Needs ``halfbyte[transformers]``; takes about ten minutes on two cores. ``--only`` names models.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import halfbyte
from common import REPOSITORY, replace_part
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import Settings
from halfbyte.evaluate import measure as evaluate
from halfbyte.recipes import Recipe, parse_recipe

# by weight error, the largest first; then other formats and sizes
RECIPES = (
    *("mxfp4", "mxfp4-sweep", "nvfp4-absmax", "nvfp4-four-over-six", "nvfp4", "mixfp4-absmax", "mixfp4"),
    *("if4", "razer", "hif4", "nvfp4-fp8", "int4-g128", "int4-g64", "int4-g32", "fp8-block", "fp8"),
)
FORMATS = ("nvint4", "nf4", "iq4_nl", "affine4_g64", "int4_asym_g32", "mxfp8")
LENGTH, TOKENS = 256, 12_288


def recipes() -> list[Recipe]:
    rules = "rules:\n  - {{match: linear, format: {name}, scale_search: sweep, if_not_divisible: keep}}\n"
    own = [parse_recipe(rules.format(name=name), name, name) for name in FORMATS]
    return [*(halfbyte.load_recipe(name) for name in RECIPES), *own]


def measure(model: Path, text: Path, folder: Path) -> dict[str, Any]:
    """All recipes on one model: the results document."""
    outputs = []
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
        outputs.append(out)
        print(f"{model.name}: {recipe.name} relMSE {done.relmse:.5f}", flush=True)
    settings = Settings(text=text, length=LENGTH, max_tokens=TOKENS, dequantize=True, noise_floor=True, errors=True)
    document = evaluate(outputs, model, settings)
    for row in document["rows"]:
        row["path"] = row["name"]
        row["seconds"] = None  # of a machine that may do other things
        if row["errors"]:
            weights = row["errors"]["weights"] if is_wiki(model) else []
            row["errors"] |= {"out": row["name"], "against": model.name, "weights": weights}
            for weight in weights:
                weight["scales"] = None
        print(f"{model.name}: {row['name']} perplexity {row['perplexity']:.3f}, KL {row['kl']['mean']:.5f}")
    return document


def is_wiki(model: Path) -> bool:
    return model.name.endswith("-wiki")


def quantized_bits(row: dict[str, Any]) -> float:
    """Bits of the quantized weights, scales included."""
    return row["errors"]["total"]["bits"]


def rounded(value: Any) -> Any:
    """Floats to seven digits, so that files stay small."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def tables(documents: dict[str, dict[str, Any]]) -> str:
    """Markdown: KL divergence, then perplexity, a column per model."""
    by_recipe: dict[str, dict[str, dict[str, Any]]] = {}
    for name, document in documents.items():
        for row in document["rows"][1:]:
            by_recipe.setdefault(row["name"], {})[name] = row
    names = list(documents)
    first = documents[names[0]]
    about = first["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    tokens = ", ".join(f"{name} {d['rows'][0]['tokens']:,}" for name, d in documents.items())
    lines = [
        f"{first['created'][:10]}, {about['machine']} ({about['cores']} cores), {versions}. "
        f"Windows of {LENGTH} tokens, FP32; tokens scored: {tokens}.",
        "",
        "KL divergence from the source, nats per token × 1000; parentheses give half the width of its 95 % interval, "
        "resampling windows. Bits: of the quantized weights, including scales.",
        "",
        f"| recipe | bits | {' | '.join(names)} |",
        f"|---|---:|{'---:|' * len(names)}",
    ]
    for recipe, found in by_recipe.items():
        bits = max(quantized_bits(row) for row in found.values())
        cells = [divergence(found[n]) if n in found else "–" for n in names]
        lines.append(f"| {recipe} | {bits:.3g} | {' | '.join(cells)} |")
    cells = [divergence(documents[n]["noise_floor"]) for n in names]
    lines.append(f"| *source in bfloat16* | | {' | '.join(cells)} |")
    lines += [
        "",
        "Perplexity. *: not distinguishable from the source's (the paired 95 % interval of the ratio contains 1).",
    ]
    lines += ["", f"| recipe | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines.append("| source | " + " | ".join(f"{documents[n]['rows'][0]['perplexity']:.3f}" for n in names) + " |")
    for recipe, found in by_recipe.items():
        cells = [perplexity(found[n]) if n in found else "–" for n in names]
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def divergence(row: dict[str, Any]) -> str:
    low, high = row["kl_ci"]["mean"]
    return f"{1000 * row['kl']['mean']:.3g} ({500 * (high - low):.2g})"


def perplexity(row: dict[str, Any]) -> str:
    low, high = row["perplexity_ratio"]["ci"]
    return f"{row['perplexity']:.3f}{'*' if low <= 1 <= high else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=REPOSITORY / "benchmarks/results/models")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs/results.md")
    parser.add_argument("--only", nargs="*", metavar="MODEL")
    args = parser.parse_args()
    documents: dict[str, dict[str, Any]] = {}
    args.output.mkdir(parents=True, exist_ok=True)
    for model in sorted(p for p in (args.data / "models").iterdir() if (p / "config.json").exists()):
        if args.only and model.name not in args.only:
            continue
        text = args.data / "text" / ("enwiki2015/valid.txt" if is_wiki(model) else "calibration/tiny.utf8")
        with tempfile.TemporaryDirectory(prefix="halfbyte-models-") as folder:
            found = rounded(measure(model, text, Path(folder)))
        found["command"] = f"python benchmarks/models.py DATA --only {model.name}"
        path = args.output / f"{model.name}.json"
        path.write_text(
            json.dumps(found, separators=(",", ":")).replace('{"name":', '\n{"name":') + "\n", encoding="utf-8"
        )
    for path in sorted(args.output.glob("*.json")):
        documents[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    replace_part(args.docs, "models", f"\n{tables(documents)}\n")


if __name__ == "__main__":
    main()
