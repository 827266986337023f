"""Calibration methods on small trained models, through halfbyte's own steps: calibrate, quantize, evaluate.

    python benchmarks/calibration.py ../shared/data [--only MODEL...] [--parts FORMAT... tokens] [--docs FILE]

The folder holds ``models/NAME`` and ``text/...``. Models named ``*-wiki`` are calibrated with the first 3 MB of
``enwiki2015/train_first12MB.txt.xz`` and judged on ``enwiki2015/valid.txt``; the others with the first half of
``calibration/tiny.utf8`` and judged on the second. All linear weights are quantized where their K allows. For the wiki
models also: fewer and more tokens, stronger damping and, with experts, all tokens for all experts; and weights with
rotated blocks, for which activations are rounded too (W4A4).
One results file per model in ``benchmarks/results/calibration``, which grows part by part (``--parts``, default all
that it lacks); the tables between the markers in the document are written anew from all of them.
Each row has the divergence and perplexity of the model, and the mean error of the outputs of its weights.
Needs ``halfbyte[transformers]``; takes about thirty minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import numpy as np

import calibration_tables
import halfbyte
from common import REPOSITORY, RESULTS, head, replace_part, write_results
from halfbyte.calibrate.collect import CollectOptions, collect_statistics
from halfbyte.calibration.statistics import Statistics
from halfbyte.checkpoint import Reader
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import Settings, measure
from halfbyte.formats import get_format
from halfbyte.plan.smoothing_use import stored_smoothings
from halfbyte.recipes import Recipe
from halfbyte.search import get_search
from halfbyte.source.checkpoint import Checkpoint

FORMATS = ("nvfp4", "mixfp4", "mxfp4", "int4_g32", "int4_g128")
GPTQ = {"scale_search": "sweep", "rounding": "gptq"}
METHODS: dict[str, dict[str, Any]] = {
    "absmax": {"scale_search": "absmax", "error_weight": "none"},
    "4/6": {"scale_search": "four_over_six", "error_weight": "none"},
    "sweep": {"scale_search": "sweep", "error_weight": "none"},
    "sweep, importance": {"scale_search": "sweep", "error_weight": "importance"},
    "sweep, importance, AWQ": {"scale_search": "sweep", "error_weight": "importance", "transform": "awq"},
    "sweep, local Hessian": {"scale_search": "sweep", "objective": "local_hessian"},
    "GPTQ absmax": {"scale_search": "absmax", "rounding": "gptq", "objective": "squared_error"},
    "GPTQ static": {**GPTQ, "static_groups": True},
    "GPTQ static, act": {**GPTQ, "static_groups": True, "order": "act"},
    "GPTQ in-loop": {**GPTQ, "objective": "gptq_loss"},
    "GPTQ in-loop, act": {**GPTQ, "objective": "gptq_loss", "order": "act"},
    "GPTQ in-loop, act, AWQ": {**GPTQ, "objective": "gptq_loss", "order": "act", "transform": "awq"},
    "sweep, Hadamard": {"scale_search": "sweep", "error_weight": "none", "transform": "hadamard"},
    "GPTQ static, act, Hadamard": {**GPTQ, "static_groups": True, "order": "act", "transform": "hadamard"},
    "GPTQ static, act, DuQuant": {**GPTQ, "static_groups": True, "order": "act", "transform": "duquant"},
    "GPTQ in-loop, act, damping 0.05": {**GPTQ, "objective": "gptq_loss", "order": "act", "damping": 0.05},
}
STUDY = ("sweep, importance", "GPTQ in-loop, act", "GPTQ in-loop, act, damping 0.05")
TOKENS = "tokens"  # the part that varies these
# parts in which activations are rounded to the format of the weights
W4A4 = {
    "mxfp4 W4A4": ("sweep", "sweep, Hadamard", *(m for m in METHODS if m.startswith("GPTQ static, act"))),
    "nvfp4 W4A4": ("sweep", "GPTQ in-loop, act"),
}
SAMPLES = 128
FEWER_AND_MORE = (16, 64, 256)


@dataclass
class Case:
    """One checkpoint to be made; ``statistics`` is None where a method needs none."""

    format: str
    method: str
    samples: int | None = None
    all_experts: bool = False
    kept: int = 0
    quantized: int = 0
    output_error: float = 0.0

    @property
    def name(self) -> str:
        """A folder's name."""
        more = "" if self.samples is None else f"-{self.samples}"
        return f"{self.format}-{''.join(c if c.isalnum() else '-' for c in self.method)}{more}" + (
            "-all" if self.all_experts else ""
        )


def recipe(fmt: str, method: str) -> Recipe:
    rule = {"match": "linear", "format": fmt, "if_not_divisible": "keep", **METHODS[method]}
    return Recipe.model_validate({"name": "calibration", "rules": [rule]})


def exists(fmt: str, method: str) -> bool:
    if fmt != "mxfp4" and METHODS[method].get("transform") in ("hadamard", "duquant"):
        return False  # blocks of 32 with coarse scales are what rotations are for
    try:
        get_search(str(METHODS[method]["search"]), get_format(fmt))
    except HalfbyteError:
        return False
    return True


def cases(part: str, wiki: bool, experts: bool) -> list[Case]:
    """What a part consists of: one format by all methods, or one method with other statistics."""
    found = []
    if part in W4A4:
        if wiki:
            fmt = part.split()[0]
            for method in W4A4[part]:
                # each expert has a rotation of its own there, which the emulation does not follow
                if not (experts and METHODS[method].get("transform") == "duquant"):
                    found.append(Case(fmt, method, SAMPLES if "rounding" in METHODS[method] else None))
    elif part != TOKENS:
        for method, rule in METHODS.items():
            if exists(part, method) and "damping" not in rule:
                needs = rule.get("error_weight") != "none"
                found.append(Case(part, method, SAMPLES if needs else None))
    elif wiki:
        for method in STUDY:
            for samples in sorted((*FEWER_AND_MORE, SAMPLES)):
                found.append(Case("nvfp4", method, samples))
                if experts and samples in (FEWER_AND_MORE[0], SAMPLES):
                    found.append(Case("nvfp4", method, samples, all_experts=True))
    return found


class Bench:
    """One model, its texts, and statistics of its activations by number of samples."""

    def __init__(self, source: Path, data: Path, work: Path) -> None:
        self.source, self.work = source, work
        self.wiki = source.name.endswith("-wiki")
        config = json.loads((source / "config.json").read_text())
        self.experts = "num_experts" in config
        self.length = min(512, config["max_position_embeddings"])
        self.held_tokens = 24 * 512
        self.train, self.held_out = work / "train.txt", work / "held-out.txt"
        if self.wiki:
            texts = data / "text" / "enwiki2015"
            content = lzma.decompress((texts / "train_first12MB.txt.xz").read_bytes())[:3_000_000]
            parts = content.decode(errors="ignore"), (texts / "valid.txt").read_text("utf-8")
        else:
            whole = (data / "text" / "calibration" / "tiny.utf8").read_text("utf-8")
            middle = whole.index("\n", len(whole) // 2)
            parts = whole[:middle], whole[middle:]
        for path, content_of in zip((self.train, self.held_out), parts, strict=True):
            path.write_text(content_of, "utf-8")

    def statistics(self, samples: int, all_experts: bool) -> Path:
        """Collected when first asked for."""
        out = self.work / f"statistics-{samples}{'-all' if all_experts else ''}"
        collect_statistics(
            self.source, out, [self.train], CollectOptions(samples, self.length, all_experts=all_experts)
        )
        return out

    def make(self, case: Case) -> Path | None:
        """Quantize and verify; None where the format holds no weight of the model."""
        known = None if case.samples is None else self.statistics(case.samples, case.all_experts)
        try:
            plan = halfbyte.plan(self.source, recipe(case.format, case.method), dialect="halfbyte", importance=known)
        except HalfbyteError as error:
            print(f"{self.source.name} {case.name}: left out: {error}", flush=True)
            return None
        case.quantized = sum(item.action == "quantize" for item in plan.items)
        case.kept = sum(bool(entry["declined"]) * entry["tensors"] for entry in plan.summary()["kept"])
        if not case.quantized:
            return None
        out = self.work / case.name
        done = halfbyte.quantize(plan, out)
        case.output_error = self.output_error(out)
        print(f"{self.source.name} {case.name}: relMSE {done.relmse:.5f}, outputs {case.output_error:.5f}", flush=True)
        return out

    def output_error(self, out: Path) -> float:
        """Squared error of the outputs of quantized weights on the held-out text, over their energy; the mean of all.

        Every weight by itself, with the inputs that it has in the source. Experts of a stack are added up.
        """
        known = self.work / "held-out-statistics"
        samples = self.held_tokens // self.length
        collect_statistics(self.source, known, [self.held_out], CollectOptions(samples, self.length))
        statistics, ours, source = Statistics(known), Checkpoint.open(out), Checkpoint.open(self.source)
        twins = {w.name: w for w in source.weights}
        found = []
        with Reader(ours.inventory) as left, Reader(source.inventory) as right:
            smoothings = stored_smoothings(out, source, right)
            for weight in (w for w in ours.weights if w.name in ours.formats):
                hessian = statistics.array(weight.name, "hessian")
                if hessian is None:
                    continue
                values, smoothing = ours.read(left, weight).astype(np.float64), smoothings.get(weight.name)
                if smoothing and smoothing.rows is not None:
                    values *= smoothing.rows[..., None]
                if smoothing and smoothing.columns is not None:
                    values /= smoothing.columns[..., None, :]
                dense = source.read(right, twins[weight.name].untransposed()).astype(np.float64)
                error = values - dense
                lost, energy = (float(np.sum((a @ hessian) * a)) for a in (error, dense))
                found.append(lost / energy)
        return float(np.mean(found))

    def run(self, part: str) -> dict[str, Any]:
        """One part on one model; {} where there is nothing to do."""
        made = [(case, out) for case in cases(part, self.wiki, self.experts) if (out := self.make(case))]
        if not made:
            return {}
        settings = Settings(
            text=self.held_out,
            length=self.length,
            max_tokens=self.held_tokens,
            dequantize=True,
            noise_floor=True,
            cache=self.work / "cache",
            activations=part.split()[0] if part in W4A4 else None,
        )
        document = measure([out for _, out in made], self.source, settings)
        source, *rows = document["rows"]
        for _, out in made:
            shutil.rmtree(out)
        found = {
            "model": self.source.name,
            "calibration": {"samples": SAMPLES, "length": self.length},
            "held_out": source["protocol"],
            "perplexity": source["perplexity"],
            "noise_floor": document["noise_floor"],
            "rows": [_row(part, case, row) for (case, _), row in zip(made, rows, strict=True)],
        }
        if part == TOKENS and self.experts:
            found["experts"] = self.tokens_per_expert()
        return found

    def tokens_per_expert(self) -> dict[str, dict[str, int]]:
        """The fewest and the median number of tokens that an expert saw, by number of samples."""
        found = {}
        for samples in sorted((SAMPLES, *FEWER_AND_MORE)):
            statistics = Statistics(self.statistics(samples, False))
            counts = [c for n in statistics.names if (c := statistics.array(n, "count")) is not None and c.ndim]
            flat = sorted(int(n) for c in counts for n in c)
            found[str(samples)] = {"least": flat[0], "median": flat[len(flat) // 2]}
        return found


def _row(part: str, case: Case, row: dict[str, Any]) -> dict[str, Any]:
    """What a results file keeps of a checkpoint; ``same``: others of its part whose divergence may be the same."""
    return {
        "part": part,
        "format": case.format,
        "method": case.method,
        "samples": case.samples,
        "all_experts": case.all_experts,
        "name": case.name,
        "quantized": case.quantized,
        "kept": case.kept,
        "kl": row["kl"]["mean"],
        "kl_ci": row["kl_ci"]["mean"] if row["kl_ci"] else None,
        "top1": row["kl"]["top1"],
        "output_error": case.output_error,
        "perplexity": row["perplexity"],
        "perplexity_ratio": row["perplexity_ratio"],
        "same": sorted(row["indistinguishable"]["kl"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "calibration")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs/accuracy.md")
    parser.add_argument("--only", nargs="*", metavar="MODEL", help="without names: write the tables anew, no more")
    parser.add_argument("--parts", nargs="+", metavar="P", choices=(*FORMATS, *W4A4, TOKENS), help="to measure (again)")
    args = parser.parse_args()
    for model in sorted(p for p in (args.data / "models").iterdir() if (p / "config.json").exists()):
        if args.only is not None and model.name not in args.only:
            continue
        path = args.output / f"{model.name}.json"
        with tempfile.TemporaryDirectory(prefix="halfbyte-calibration-") as work:
            bench = Bench(model, args.data, Path(work))
            for part in args.parts or (*FORMATS, *W4A4, TOKENS):
                before = json.loads(path.read_text()) if path.exists() else {"rows": []}
                others = [row for row in before["rows"] if row["part"] != part]
                if len(others) < len(before["rows"]) and not args.parts:
                    continue
                about = head("torch", "transformers")
                if found := bench.run(part):
                    found["rows"] = others + found["rows"]
                    write_results(path, {**before, **about, **found}, "rows")
    documents = [json.loads(path.read_text()) for path in sorted(args.output.glob("*.json"))]
    for name, text in calibration_tables.tables(documents, FORMATS, METHODS, STUDY, TOKENS, tuple(W4A4)).items():
        replace_part(args.docs, name, text)


if __name__ == "__main__":
    main()
