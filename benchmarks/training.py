"""What training gains over post-training quantization on small trained models: benchmarks/results/training.json.

    python benchmarks/training.py MODELS TEXTS [--rows NAME ...] [--draws N] [--work DIR] [--table-only]

MODELS holds the folders of the models, TEXTS ``enwiki2015/`` and other texts (docs/training.md names them). Each row
starts from a quantized checkpoint, which is made once with a calibration on 64k tokens, and trains it on other text.
Divergences from the source are measured on texts that neither saw, window by window; intervals are of the paired
relative change, 95 %, from 2,000 resamples of windows. Costs are CPU seconds of one thread.
The table between the markers in docs/training.md is written anew from all results.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import halfbyte
from common import REPOSITORY, RESULTS, head, replace_part, write_results
from halfbyte.calibrate.collect import CollectOptions, collect_statistics
from halfbyte.runtime.loading import load_tokenizer
from halfbyte.train.objectives import Distillation, SecondModel, distillation_loss
from halfbyte.train.student import rounded_once, student_of
from halfbyte.train.token_batches import make_batches
from halfbyte.train.training_loop import TrainingOptions, fit, rate_of

TEXTS = {
    "valid": "enwiki2015/valid.txt",
    "WikiText": "wiki.test.raw",
    "C4": "calibration/c4.utf8",
    "technical": "calibration/technical.utf8",
}
WINDOWS, LENGTH = {"valid": 24, "WikiText": 24, "C4": 12, "technical": 12}, 512
CALIBRATION_BYTES = 600_000  # of the training text; training takes the rest


@dataclass(frozen=True)
class Row:
    """A training: the model, the recipe of its start, and how it is trained."""

    model: str
    recipe: str
    method: str = "distill"
    steps: int = 100
    master: str = "cell"
    scales: str = "frozen"
    rate: float | None = None
    activations: str | None = None


DENSE, MOE = "qwen3-tiny-wiki", "qwen35moe-tiny-wiki"
ROWS = {
    "dense": Row(DENSE, "nvfp4-gptq"),
    "dense-decoded": Row(DENSE, "nvfp4-gptq", master="decoded"),
    "dense-long": Row(DENSE, "nvfp4-gptq", steps=450),
    "dense-rtn": Row(DENSE, "nvfp4"),
    "dense-local": Row(DENSE, "nvfp4-gptq", "local", steps=100),
    "dense-mixfp4": Row(DENSE, "mixfp4-gptq"),
    "dense-mxfp4": Row(DENSE, "mxfp4-gptq"),
    "dense-int4": Row(DENSE, "int4-gptq"),
    "dense-w4a4": Row(DENSE, "nvfp4-gptq", activations="nvfp4", steps=60),
    "moe": Row(MOE, "nvfp4-gptq"),
    "moe-local": Row(MOE, "nvfp4-gptq", "local", steps=100),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--table-only", action="store_true", help="only write the table anew")
    parser.add_argument("--work", type=Path, default=Path("training-benchmark"))
    parser.add_argument("--results", type=Path, default=RESULTS / "training.json")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs" / "training.md")
    args = parser.parse_args()
    results = json.loads(args.results.read_text()) if args.results.exists() else {"rows": {}}
    if not args.table_only:
        measure_rows(args, results)
    replace_part(args.docs, "training", table(results))


def measure_rows(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """All rows and draws that the results lack."""
    torch.set_num_threads(1)
    args.work.mkdir(exist_ok=True)
    for name in args.rows:
        for draw in range(args.draws):
            if f"{name}/{draw}" in results["rows"]:
                continue
            results["rows"][f"{name}/{draw}"] = measure(ROWS[name], draw, args)
            write_results(args.results, {**head("torch", "transformers"), **results})
            print(name, draw, json.dumps(results["rows"][f"{name}/{draw}"]["kl"]), flush=True)


def table(results: dict[str, Any]) -> str:
    """The results as docs/training.md shows them: KL x 1000 before -> after, and the interval of the change."""
    lines = ["| start, method | tokens | CPU s | " + " | ".join(TEXTS) + " |", "|---|---|---|" + "---|" * len(TEXTS)]
    for key, result in sorted(results["rows"].items()):
        row, draw = Row(**result["row"]), key.rpartition("/")[2]
        what = f"{row.model}, {row.recipe}, {row.method} {row.steps}" + (", W4A4" if row.activations else "")
        cells = [
            f"{before * 1e3:.3f} → {after * 1e3:.3f} ({low:+.1%} to {high:+.1%})"
            for before, after, low, high in (result["kl"][name] for name in TEXTS)
        ]
        tokens, seconds = result["tokens"], result["cpu_seconds"]
        lines.append(f"| {what}, draw {draw} | {tokens:,} | {seconds:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(row: Row, draw: int, args: argparse.Namespace) -> dict[str, Any]:
    source = args.models / row.model
    start = quantized(row, source, args)
    text = training_text(args)
    tokenizer = load_tokenizer(source)
    teacher = SecondModel(halfbyte.load(source, "float32"))
    before = divergences(make_student(row, source, start), teacher, tokenizer, args)
    began = time.process_time()
    if row.method == "local":
        from halfbyte.train.local_training import LocalOptions, train_layers

        samples = make_batches([text], tokenizer, 256, 2, draw)
        out = args.work / f"local-{row.model}-{draw}"
        outcome = train_layers(source, start, out, samples, LocalOptions(row.steps))
        spent = time.process_time() - began
        trained = halfbyte.load(out, "float32", dequantize=True)
        tokens, best = outcome.tokens, None
    else:
        trained = make_student(row, source, start)
        batches = make_batches([text], tokenizer, 256, 2, draw)
        rate = row.rate or rate_of(student_of(trained), row.master)
        options = TrainingOptions(row.steps, check_every=max(50, row.steps // 4))
        done = fit(trained, Distillation(teacher), batches, options, rate)
        spent, tokens, best = time.process_time() - began, done.tokens, done.best
    after = divergences(trained, teacher, tokenizer, args)
    return {
        "row": asdict(row),
        "draw": draw,
        "tokens": tokens,
        "best_step": best,
        "cpu_seconds": round(spent, 1),
        "kl": {
            name: [float(before[name].mean()), float(after[name].mean()), *interval(before[name], after[name])]
            for name in TEXTS
        },
    }


def make_student(row: Row, source: Path, start: Path) -> Any:
    model = halfbyte.load(source, "float32")
    return halfbyte.prepare(model, start, row.scales, row.master, row.activations)


def quantized(row: Row, source: Path, args: argparse.Namespace) -> Path:
    out = args.work / f"{row.model}-{row.recipe}"
    if (out / "config.json").exists():
        return out
    statistics = args.work / f"{row.model}-statistics"
    training_text(args)
    collect_statistics(source, statistics, [args.work / "calibration.txt"], CollectOptions(samples=128))
    halfbyte.quantize(source, out, row.recipe, importance=statistics if "gptq" in row.recipe else None)
    return out


def training_text(args: argparse.Namespace) -> Path:
    path = args.work / "training.txt"
    if not path.exists():
        with lzma.open(args.texts / "enwiki2015" / "train_first12MB.txt.xz") as file:
            whole = file.read(6_000_000)
        (args.work / "calibration.txt").write_bytes(whole[:CALIBRATION_BYTES].rsplit(b"\n", 1)[0])
        path.write_bytes(whole[CALIBRATION_BYTES:].split(b"\n", 1)[1].rsplit(b"\n", 1)[0])
    return path


def divergences(model: Any, teacher: SecondModel, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """KL (nats) of each window of each text."""
    kl = {}
    for name, file in TEXTS.items():
        batches = make_batches([args.texts / file], tokenizer, LENGTH)
        windows = torch.cat([batches.sequences, batches.held_out])[: WINDOWS[name]]
        with rounded_once(model):
            each = [float(distillation_loss(model(w[None]).logits, teacher(w[None]))) for w in windows]
        kl[name] = np.array(each)
    return kl


def interval(before: Any, after: Any) -> list[float]:
    """95 % of the relative change of the mean, windows resampled in pairs."""
    draws = np.random.default_rng(0).integers(0, len(before), (2000, len(before)))
    change = after[draws].mean(axis=1) / before[draws].mean(axis=1) - 1
    return [float(value) for value in np.quantile(change, [0.025, 0.975])]


if __name__ == "__main__":
    main()
