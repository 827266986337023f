"""Automatic allocation against hand-written recipes of the same size, on small trained models.

    python benchmarks/allocation.py ../shared/data [--only MODEL...] [--docs docs/accuracy.md]

For each hand-written recipe: its bytes, then ``allocate`` with just as many bytes for all tensors and the formats and
roles that the recipe chooses from, with losses predicted (a) from errors of weights, all units alike, (b) from errors
and the model's structure, which is what the command does by itself, (c) from (b) with errors weighted by importance,
(d) from these errors and measured sensitivities; and (d) once more with MixFP4 among the formats. All outputs are
quantized with the same searches and without a calibration, verified, and judged on text that neither importance nor
sensitivities have seen. Then the measured divergence of allocations of several sizes (d), beside that of recipes with
one format. Models: the bundled demo model (its text cut in half) and ``models/*-wiki``. One results file per model in
``benchmarks/results/allocation``; the tables between the markers in the document are written anew from all of them.
Needs ``halfbyte[transformers,allocate]``; takes about eight minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import yaml

import allocation_tables
import halfbyte
from common import REPOSITORY, RESULTS, head, replace_part
from halfbyte.allocate import Allocated, AllocateOptions, allocate_recipe
from halfbyte.calibrate.collect import CollectOptions, collect_statistics
from halfbyte.calibration import Calibration, calibration_of
from halfbyte.demo import MODEL as DEMO
from halfbyte.dialects import get_dialect
from halfbyte.evaluate import Settings, TextSettings, measure, sensitivity
from halfbyte.recipes import load_recipe
from halfbyte.source.checkpoint import Checkpoint

# hand-written recipe: what it chooses from
UD_ROLES = ("linear", "embedding", "lm_head", "router", "shared_expert_gate")
HAND: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ud-mxfp4": (("mxfp4", "affine8_g64", "keep"), UD_ROLES),
    "nvfp4-fp8": (("nvfp4", "fp8_channel", "keep"), ("linear",)),
    "nvfp4": (("mxfp4", "nvfp4", "fp8_channel", "keep"), ("linear",)),
}
WAYS = ("errors", "structure", "importance", "sensitivity")
PLAIN = ("mxfp4-sweep", "nvfp4", "mixfp4", "fp8")
CURVE_FORMATS = ("mxfp4", "mixfp4", "fp8_channel", "keep")
CURVE_POINTS = 5
BASE = "mxfp4"  # what sensitivities are measured in
SENSITIVITY_TOKENS, HELD_TOKENS, SAMPLES = 4096, 8192, 32


class Bench:
    """One model, its texts, and what is known of its weights."""

    def __init__(self, source: Path, data: Path, work: Path) -> None:
        self.source, self.work = source, work
        self.checkpoint = Checkpoint.open(source)
        self.length = 256 if source == DEMO else 512
        self.known_text, self.held_out = work / "known.txt", work / "held-out.txt"
        if source == DEMO:
            whole = (DEMO / "heldout.txt").read_text("utf-8")
            middle = whole.index("\n", len(whole) // 2)
            parts = whole[:middle], whole[middle:]
        else:
            texts = data / "text" / "enwiki2015"
            content = lzma.decompress((texts / "train_first12MB.txt.xz").read_bytes())[:1_000_000]
            parts = content.decode(errors="ignore"), (texts / "valid.txt").read_text("utf-8")
        for path, text in zip((self.known_text, self.held_out), parts, strict=True):
            path.write_text(text, "utf-8")
        self.outputs: dict[str, Path] = {}
        self.entries: list[dict[str, Any]] = []

    def prepare(self) -> None:
        """Importance, and the divergence that each unit causes alone in the smallest format."""
        statistics = self.work / "statistics"
        collect_statistics(
            self.source, statistics, [self.known_text], CollectOptions(SAMPLES, self.length, hessians=False)
        )
        self.calibration: Calibration = calibration_of(statistics, self.checkpoint.weights)
        recipe = self.work / "everything.yaml"
        present = {w.role.split(".")[0] for w in self.checkpoint.weights}
        roles = [r for r in UD_ROLES if r == "linear" or r in present]
        recipe.write_text(yaml.safe_dump({"rules": [{"match": roles, "format": BASE, "if_not_divisible": "keep"}]}))
        self.sensitivities = self.work / "sensitivity.jsonl"
        self.groups = sensitivity(
            self.source,
            recipe,
            self.sensitivities,
            TextSettings(self.known_text, length=self.length, max_tokens=SENSITIVITY_TOKENS),
        )["groups"]

    def hand(self, name: str) -> None:
        """A hand-written recipe and its rivals."""
        plan = halfbyte.plan(self.source, name, dialect="halfbyte")
        self.quantize(f"{name}, by hand", plan, kind="hand", recipe=name)
        formats, roles = HAND[name]
        for way in WAYS:
            self.allocated(f"{name}, {way}", plan.bits_per_weight, formats, roles, way, recipe=name)
        mixed = tuple("mixfp4" if f == "nvfp4" else f for f in formats)
        mixed = mixed if mixed != formats else ("mxfp4", "mixfp4", *formats[1:])
        self.allocated(f"{name}, sensitivity, mixfp4", plan.bits_per_weight, mixed, roles, "sensitivity", recipe=name)

    def allocated(
        self, label: str, bits: float, formats: tuple[str, ...], roles: tuple[str, ...], way: str, **facts: Any
    ) -> Allocated:
        """An allocation, quantized."""
        present = tuple(r for r in roles if any(r == "linear" or w.role == r for w in self.checkpoint.weights))
        options = AllocateOptions(
            bits=bits,
            formats=formats,
            roles=present,
            alike=way == "errors",
            calibration=None if way in ("errors", "structure") else self.calibration,
            sensitivity=self.sensitivities if way == "sensitivity" else None,
        )
        found = allocate_recipe(self.checkpoint, get_dialect("halfbyte"), options)
        facts |= {"way": way, "formats": list(formats), "predicted": found.allocation.loss}
        facts["bytes_by_format"] = {f: sum(c.bytes for c in found.allocation.chosen if c.format == f) for f in formats}
        self.quantize(label, found.plan, kind="allocated", **facts)
        return found

    def quantize(self, label: str, plan: Any, **facts: Any) -> None:
        """Carry a plan out and verify it."""
        out = self.work / "".join(c if c.isalnum() else "-" for c in label)
        done = halfbyte.quantize(plan, out)
        problems = halfbyte.verify(out, self.source).problems
        if problems:
            raise SystemExit(f"{self.source.name}, {label}: {problems[0]}")
        print(f"{self.source.name}, {label}: {plan.data_bytes} bytes, relMSE {done.relmse:.5f}", flush=True)
        self.outputs[label] = out
        self.entries.append({"label": label, **facts, "bytes": plan.data_bytes, "bits": plan.bits_per_weight})

    def curve(self) -> list[dict[str, float]]:
        """One format, and allocations of several sizes; returns the predicted curve."""
        for name in PLAIN:
            plan = halfbyte.plan(self.source, name, dialect="halfbyte")
            self.quantize(f"{name}, plain", plan, kind="plain", recipe=name)
        bits = sorted(e["bits"] for e in self.entries if e["kind"] == "plain")
        found = None
        for k in range(CURVE_POINTS):
            at = bits[0] + (bits[-1] + 1 - bits[0]) * k / (CURVE_POINTS - 1)
            label = f"curve, {at:.2f} bits"
            found = self.allocated(label, at + 1e-6, CURVE_FORMATS, ("linear",), "sensitivity", curve=True)
        assert found is not None
        return [{"data_bytes": found.other_bytes + a.bytes, "loss": a.loss} for a in found.frontier]

    def run(self) -> dict[str, Any]:
        """Everything on one model."""
        self.prepare()
        for name in HAND:
            if name != "nvfp4-fp8" or any(w.role.startswith("experts") for w in self.checkpoint.weights):
                self.hand(name)
        predicted = self.curve()
        settings = Settings(
            text=self.held_out, length=self.length, max_tokens=HELD_TOKENS, dequantize=True, noise_floor=True
        )
        document = measure(list(self.outputs.values()), self.source, settings)
        labels = {out.name: label for label, out in self.outputs.items()}
        for entry, row in zip(self.entries, document["rows"][1:], strict=True):
            entry |= {"kl": row["kl"]["mean"], "kl_ci": row["kl_ci"]["mean"], "top1": row["kl"]["top1"]}
            entry["perplexity"] = row["perplexity"]
            entry["same"] = sorted(labels[n] for n in row["indistinguishable"]["kl"] if n in labels)
        return {
            "model": self.source.name,
            "held_out": document["rows"][0]["protocol"],
            "perplexity": document["rows"][0]["perplexity"],
            "noise_floor": document["noise_floor"]["kl"]["mean"],
            "sensitivity": {
                "format": BASE,
                "sum": sum(g["kl"]["mean"] for g in self.groups[:-1]),
                "all": self.groups[-1]["kl"]["mean"],
                "groups": {g["group"]: g["kl"]["mean"] for g in self.groups[:-1]},
            },
            "predicted_curve": predicted,
            "rows": self.entries,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "allocation")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs/accuracy.md")
    parser.add_argument("--only", nargs="*", metavar="MODEL", help="without names: write the tables anew, no more")
    args = parser.parse_args()
    for name in HAND:
        load_recipe(name)
    args.output.mkdir(parents=True, exist_ok=True)
    for model in (DEMO, *sorted((args.data / "models").glob("*-wiki"))):
        if args.only is not None and model.name not in args.only:
            continue
        about = head("torch", "transformers", "highspy")
        with tempfile.TemporaryDirectory(prefix="halfbyte-allocation-") as work:
            found = Bench(model, args.data, Path(work)).run()
        (args.output / f"{model.name}.json").write_text(json.dumps({**about, **found}, indent=1) + "\n")
    documents = [json.loads(path.read_text()) for path in sorted(args.output.glob("*.json"))]
    for name, text in allocation_tables.tables(documents, list(HAND)).items():
        replace_part(args.docs, name, text)


if __name__ == "__main__":
    main()
