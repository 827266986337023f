"""Divergence of recipes that calibrate, over several texts and two calibration draws, with paired intervals.

    python benchmarks/accuracy.py ../shared/data [--models NAME...] [--recipes NAME...] [--draws N] [--docs FILE]

Every recipe runs as a user runs it: ``halfbyte quantize MODEL OUT --recipe NAME --calibration TEXT``, 128 samples
of 512 tokens. Draws are disjoint parts of the calibration text: of ``*-wiki`` models 3 MB each of the training
text, of story models quarters of ``calibration/tiny.utf8``. Texts that judge are never calibrated on. The
divergence is KL(source || quantized), mean over all next tokens of windows of 512, FP32 forward. Intervals (95 %)
of the change against ``BASE`` of the same format come from a bootstrap over windows, paired, all texts and draws
together: they do not see what another model would give. CPU seconds are those of the process and depend on what
else runs; their ratio is within one run. Results grow in ``benchmarks/results/accuracy.json``; the table between
the markers in the document is written anew from them.
Needs ``halfbyte[transformers]``.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import numpy as np
import torch

from common import REPOSITORY, RESULTS, head, replace_part, write_results
from halfbyte.runtime.loading import load, load_tokenizer

FORMATS = ("nvfp4", "mixfp4", "mxfp4", "int4")
RECIPES = tuple(f"{name}-{kind}" for name in FORMATS for kind in ("gptq", "best"))
MODELS = ("qwen3-tiny-wiki", "qwen35moe-tiny-wiki", "TinyStories-656K", "stories260K", "tiny1m")
SAMPLES, LENGTH, WINDOW = 128, 512, 512
RESAMPLES = 10_000
DRAW_BYTES = 3_000_000
# name -> file, windows of 512 tokens, and whether the first half of the text is left out
WIKI_TEXTS = {
    "enwiki": ("enwiki2015/valid.txt", 12, False),
    "wt2test": ("wiki.test.raw", 12, False),
    "c4": ("calibration/c4.utf8", 6, False),
    "technical": ("calibration/technical.utf8", 6, False),
    "chat": ("chat/sharegpt_style_190.json", 6, False),
}
STORY_TEXTS = {
    "stories": ("calibration/tiny.utf8", 12, True),
    "enwiki": ("enwiki2015/valid.txt", 4, False),
    "c4": ("calibration/c4.utf8", 4, False),
    "chat": ("chat/sharegpt_style_190.json", 4, False),
}
Windows = dict[str, torch.Tensor]


def main() -> None:
    """Quantize, judge, and write results and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="names, or YAML files")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS / "accuracy.json")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs" / "accuracy.md")
    parser.add_argument("--table-only", action="store_true", help="only write the table anew")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.results.read_text()) if args.results.is_file() else {"rows": []}
    if not args.table_only:
        for model in args.models:
            measure_model(args, model, found)
    replace_part(args.docs, "accuracy", table(found))


def measure_model(args: argparse.Namespace, model: str, found: dict[str, Any]) -> None:
    """All recipes and draws of one model that the results lack."""
    source = args.data / "models" / model
    known = {(row["model"], row["recipe"], row["draw"]) for row in found["rows"]}
    wanted = [
        (recipe, draw)
        for recipe in args.recipes
        for draw in range(args.draws)
        if (model, Path(recipe).stem, draw) not in known
    ]
    if not wanted:
        return
    windows = windows_of(args.data, source)
    reference = logs_of(source, windows)
    for recipe, draw in wanted:
        with tempfile.TemporaryDirectory() as folder:
            row = {"model": model, "recipe": Path(recipe).stem, "draw": draw}
            row |= quantized(source, recipe, text_of(args.data, model, draw, Path(folder)), Path(folder) / "out")
            row["kl"] = divergence(Path(folder) / "out", windows, reference)
        found |= {"head": head("torch", "transformers"), "samples": SAMPLES, "length": LENGTH}
        found["rows"].append(row)
        write_results(args.results, found, "rows")
        means = {text: f"{1000 * np.mean(values):.3f}" for text, values in row["kl"].items()}
        print(model, row["recipe"], draw, means, flush=True)


def text_of(data: Path, model: str, draw: int, folder: Path) -> Path:
    """The calibration text of a draw, written to a folder."""
    if model.endswith("-wiki"):
        with lzma.open(data / "text" / "enwiki2015" / "train_first12MB.txt.xz") as file:
            part = file.read(DRAW_BYTES * (draw + 1))[DRAW_BYTES * draw :]
    else:
        whole = (data / "text" / "calibration" / "tiny.utf8").read_bytes()
        part = whole[len(whole) * draw // 4 : len(whole) * (draw + 1) // 4]
    text = folder / "calibration.txt"
    text.write_text(part.decode("utf-8", "ignore"), encoding="utf-8")
    return text


def windows_of(data: Path, source: Path) -> Windows:
    """Windows of token ids [n, 512] by name of the text."""
    tokenizer = load_tokenizer(source)
    windows = {}
    for name, (file, count, second_half) in (WIKI_TEXTS if source.name.endswith("-wiki") else STORY_TEXTS).items():
        text = (data / "text" / file).read_text(encoding="utf-8")
        if file.endswith(".json"):
            text = "\n\n".join(turn["value"] for talk in json.loads(text) for turn in talk["conversations"])
        text = text[len(text) // 2 :] if second_half else text
        ids = tokenizer(text[: count * WINDOW * 8], add_special_tokens=False)["input_ids"]
        count = min(count, len(ids) // WINDOW)
        windows[name] = torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)
    return windows


@torch.inference_mode()
def logs_of(folder: Path, windows: Windows) -> dict[str, list[torch.Tensor]]:
    """Log-probabilities of all next tokens, window by window."""
    model = load(folder, "float32", dequantize=True)
    return {
        name: [model(input_ids=one[None], use_cache=False).logits.float().log_softmax(-1)[0] for one in ids]
        for name, ids in windows.items()
    }


def divergence(folder: Path, windows: Windows, reference: dict[str, list[torch.Tensor]]) -> dict[str, list[float]]:
    """Mean KL of each window by text."""
    ours = logs_of(folder, windows)
    return {
        name: [float((a.exp() * (a - b)).sum(-1).mean()) for a, b in zip(logs, ours[name], strict=True)]
        for name, logs in reference.items()
    }


def quantized(source: Path, recipe: str, text: Path, out: Path) -> dict[str, Any]:
    """Run the one command; its CPU seconds, and bytes of the output."""
    command = [sys.executable, "-m", "halfbyte", "quantize", str(source), str(out), "--recipe", recipe]
    command += ["--calibration", str(text), "--samples", str(SAMPLES), "--length", str(LENGTH), "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = sum(path.stat().st_size for path in out.iterdir() if path.suffix == ".safetensors")
    shutil.rmtree(out.parent / "out.statistics", ignore_errors=True)
    return {"cpu_seconds": round(seconds, 1), "bytes": size}


def change(ours: list[dict[str, list[float]]], base: list[dict[str, list[float]]]) -> tuple[float, float, float]:
    """Relative change of the mean over all windows, and its 95 % interval by a paired bootstrap over windows."""
    a, b = (np.concatenate([np.concatenate(list(row.values())) for row in rows]) for rows in (ours, base))
    picks = np.random.default_rng(0).integers(0, len(a), (RESAMPLES, len(a)))
    ratios = a[picks].mean(1) / b[picks].mean(1) - 1
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(a.mean() / b.mean() - 1), float(low), float(high)


def table(found: dict[str, Any]) -> str:
    """Markdown: for every model the recipes, KL x 1000 of each draw and text, change against GPTQ, CPU seconds."""
    rows = found["rows"]
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        texts = list(next(row for row in rows if row["model"] == model)["kl"])
        lines += ["", f"**{model}**, KL × 1000 of each draw", ""]
        lines += [f"| recipe | {' | '.join(texts)} | change [95 %] | CPU s |", f"|---|{'---:|' * (len(texts) + 2)}"]
        of_model = [row for row in rows if row["model"] == model]
        for recipe in dict.fromkeys(row["recipe"] for row in of_model):
            some = sorted((row for row in of_model if row["recipe"] == recipe), key=lambda row: row["draw"])
            cells = [" / ".join(f"{1000 * np.mean(row['kl'][text]):.3g}" for row in some) for text in texts]
            base = {r["draw"]: r for r in of_model if r["recipe"] == f"{recipe.split('-')[0]}-gptq"}
            both = [row for row in some if row["draw"] in base and row["recipe"] != base[row["draw"]]["recipe"]]
            against = "–"
            if both:
                parts = change([r["kl"] for r in both], [base[r["draw"]]["kl"] for r in both])
                against = "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*(100 * part for part in parts))
            seconds = np.mean([row["cpu_seconds"] for row in some])
            lines.append(f"| `{recipe}` | {' | '.join(cells)} | {against} | {seconds:.0f} |")
    facts = found.get("head", {})
    where = f"{facts['machine']['cpu']}, {facts['date']}" if facts else ""
    names = ", ".join(f"{name} {number}" for name, number in facts.get("versions", {}).items())
    return "\n".join([*lines[1:], "", f"{where}; {names}."])


if __name__ == "__main__":
    main()
