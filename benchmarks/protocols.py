"""The protocols that people publish, on a small model: WikiText-2 perplexity, conversations, MMLU-Pro, W4A4.

    python benchmarks/protocols.py ../shared/data [--model qwen35moe-tiny-wiki] [-o benchmarks/results/protocols.json]

Quantizes the model with a few recipes and calls `halfbyte evaluate` twice, the second time with NVFP4 activations. The
first document is written, with the rows of the second added under the names `RECIPE-a4`. Takes about 15 minutes on two
cores. Accuracy on MMLU-Pro of models this small is chance; the run shows that the protocol works.
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
from halfbyte.cli import main as command

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = ("mxfp4", "nvfp4-absmax", "nvfp4", "mixfp4", "fp8")
A4 = ("mxfp4", "nvfp4", "mixfp4")


def evaluate(folder: Path, model: Path, names: tuple[str, ...], out: Path, *options: str) -> dict[str, Any]:
    code = command(["evaluate", *(str(folder / n) for n in names), "--against", str(model), "-o", str(out), *options])
    if code:
        raise SystemExit(code)
    return json.loads(out.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="qwen35moe-tiny-wiki")
    parser.add_argument("-o", "--output", type=Path, default=REPOSITORY / "benchmarks/results/protocols.json")
    parser.add_argument("--max-tokens", default="65536", help="of WikiText-2 (default 65536: 32 windows)")
    parser.add_argument("--limit", default="280", help="questions")
    args = parser.parse_args()
    data, model = args.data, args.data / "models" / args.model
    texts = ("--text", str(data / "text/wiki.test.raw"), "--protocol", "wikitext2", "--max-tokens", args.max_tokens)
    chats = ("--conversations", str(data / "text/chat/sharegpt_style_190.json"), "--dequantize")
    questions = str(data / "eval/mmlu_pro/mmlu_pro_test_subset280.jsonl")
    tasks = ("--tasks", "mmlu_pro", "--questions", questions, "--limit", args.limit)
    with tempfile.TemporaryDirectory(prefix="halfbyte-protocols-") as name:
        folder = Path(name)
        for recipe in RECIPES:
            halfbyte.quantize(model, folder / recipe, recipe)
        cache = ("--cache", str(folder / "cache"))
        found = evaluate(folder, model, RECIPES, folder / "w4.json", *texts, *chats, *tasks, *cache, "--errors")
        narrow = ("--activations", "nvfp4", "--no-noise-floor")
        more = evaluate(folder, model, A4, folder / "a4.json", *texts, *chats, *cache, *narrow)
    for row in more["rows"][1:]:
        same = row["indistinguishable"]
        same |= {key: [n if n == args.model else f"{n}-a4" for n in same[key]] for key in ("kl", "perplexity")}
        found["rows"].append({**row, "name": f"{row['name']}-a4"})
    options = f"--model {args.model} --max-tokens {args.max_tokens} --limit {args.limit}"
    found["command"] = f"python benchmarks/protocols.py DATA {options}"
    for row in found["rows"]:
        row["path"], row["seconds"] = row["name"], None
        if row["errors"]:
            row["errors"] |= {"out": row["name"], "against": args.model}
            for weight in row["errors"]["weights"]:
                weight["scales"] = None
    text = json.dumps(rounded(found), separators=(",", ":")).replace('{"name":', '\n{"name":')
    args.output.write_text(text + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """Floats to seven digits, so that files stay small."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
