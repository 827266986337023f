"""AWQ folding and importance on small trained models: function preserved, weighted error, KL divergence.

    python benchmarks/awq.py ../shared/data [-o benchmarks/results/awq.json] [--docs docs/methods.md]

Importance (mean squared input of every linear weight, per routed expert) is collected from training text; errors
and divergences are measured on held-out text. Models: ``models/*-wiki``. All linear weights are quantized with
``sweep``; the rest stays BF16, rounded again where it was scaled. The table between the markers in the document
is written anew. Needs ``halfbyte[transformers]``; takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import lzma
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.calibrate import Importance, match_importance
from halfbyte.checkpoint import Reader
from halfbyte.evaluate.divergence import divergence, log_softmax
from halfbyte.formats import get_format
from halfbyte.models.folds import FoldGroup, find_groups
from halfbyte.models.roles import LINEAR, is_under
from halfbyte.search import awq, encode
from halfbyte.view import Checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
FORMATS = ("mxfp4", "nvfp4", "int4_g32", "int4_g128")
# name: (norms folded, products folded, errors weighted by importance in the search)
METHODS = {
    "sweep": (False, False, False),
    "sweep, importance": (False, False, True),
    "AWQ norms": (True, False, False),
    "AWQ norms, up/down": (True, True, False),
    "AWQ norms, up/down, importance": (True, True, True),
}
ALPHAS = awq.ALPHAS
LENGTH, CALIBRATION, HELD_OUT = 512, 64, 24
START, END = "<!-- table of benchmarks/awq.py -->", "<!-- end of table -->"


def collect(model: Any, tokens: torch.Tensor, names: set[str]) -> Importance:
    """Mean squared inputs by weight name; of stacked experts, over the tokens that each one gets."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}

    def add(name: str, squares: torch.Tensor, rows: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0) + squares.double()
        counts[name] = counts.get(name, 0) + rows

    def linear(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            add(name, x.square().sum(0), torch.tensor(len(x)))

        return hook

    def experts(name: str, module: Any) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x, chosen = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1]
            before, after, rows = [], [], []
            for e in range(len(module.gate_up_proj)):
                routed = x[(chosen == e).any(-1)]
                gate, up = (routed @ module.gate_up_proj[e].T).chunk(2, dim=-1)
                before.append(routed.square().sum(0))
                after.append((torch.nn.functional.silu(gate) * up).square().sum(0))
                rows.append(len(routed))
            add(f"{name}.gate_up_proj", torch.stack(before), torch.tensor(rows))
            add(f"{name}.down_proj", torch.stack(after), torch.tensor(rows))

        return hook

    handles = []
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
            handles.append(module.register_forward_pre_hook(experts(name, module)))
        elif f"{name}.weight" in names and module.weight.ndim == 2 and "embed" not in name:
            handles.append(module.register_forward_pre_hook(linear(f"{name}.weight")))
    with torch.no_grad():
        for batch in tokens.split(8):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    means = {n: (s / counts[n].clamp(min=1)[..., None]).float().numpy() for n, s in sums.items()}
    return Importance(means, {n: np.asarray(c.numpy(), np.int64) for n, c in counts.items()})


class Bench:
    """One model: its weights, importance from two texts, and its logits on held-out text."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.weights = {w.name: w for w in self.checkpoint.weights}
        with Reader(self.checkpoint.inventory) as reader:
            self.arrays = {n: self.checkpoint.read(reader, w) for n, w in self.weights.items()}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        train = lzma.decompress((data / "text/enwiki2015/train_first12MB.txt.xz").read_bytes())[:1_500_000]
        self.train = self._cut(tokenizer, train.decode(errors="ignore"), CALIBRATION)
        self.held_out = self._cut(tokenizer, (data / "text/enwiki2015/valid.txt").read_text("utf-8"), HELD_OUT)
        names = set(self.weights)
        self.seen = match_importance(collect(self.model, self.train, names), self.checkpoint.weights)
        self.judge = match_importance(collect(self.model, self.held_out, names), self.checkpoint.weights)
        self.source = self.log_probs()

    def _cut(self, tokenizer: Any, text: str, count: int) -> torch.Tensor:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: count * LENGTH]
        return torch.tensor(ids).reshape(count, LENGTH)

    def log_probs(self) -> torch.Tensor:
        """Log-probabilities on the held-out text."""
        with torch.no_grad():
            parts = [log_softmax(self.model(input_ids=b, use_cache=False).logits) for b in self.held_out.split(4)]
        return torch.cat(parts)

    def load(self, arrays: dict[str, Any]) -> None:
        """Put weights into the model."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, array in arrays.items():
                parameters[name].copy_(torch.from_numpy(np.array(array, dtype=np.float32)))

    def is_quantized(self, name: str) -> bool:
        """Whether a weight is one of the large matrices."""
        return any(is_under(self.weights[name].role, prefix) for prefix in LINEAR)

    def preserved(self) -> float:
        """Largest difference of logits after folding every group in FP32 with alpha 0.5."""
        arrays = {n: a.astype(np.float32) for n, a in self.arrays.items()}
        for group in self.groups(True):
            choice = self.choose(group, arrays, "nvfp4", False, (0.5,), forced=True)
            arrays.update(self.fold(group, arrays, choice))
        with torch.no_grad():
            before = self.model(input_ids=self.held_out[:2], use_cache=False).logits
            self.load(arrays)
            after = self.model(input_ids=self.held_out[:2], use_cache=False).logits
        self.load(self.arrays)
        return float((before - after).abs().max())

    def groups(self, products: bool) -> list[FoldGroup]:
        """What can be folded and is quantized, norms first."""
        found = find_groups(self.checkpoint.weights, self.checkpoint.family, products=products)
        wanted = [g for g in found if g.refusal is None and any(self.is_quantized(c.name) for c in g.consumers)]
        # rows are divided after columns are multiplied; either order is right
        return sorted(wanted, key=lambda g: g.producers[0].kind == "rows")

    def choose(
        self, group: FoldGroup, arrays: dict[str, Any], fmt: str, weighted: bool, alphas: Any, forced: bool = False
    ) -> awq.FoldChoice:
        """The scale of one group; ``forced`` takes the exponent even where it does not pay."""
        consumers = [
            awq.Consumer(
                c.name,
                arrays[c.name],
                self.seen.values.get(c.name),
                get_format(fmt) if self.is_quantized(c.name) else None,
                counts=self.seen.counts[c.name] if len(c.shape) == 3 else None,
                share=c.group,
            )
            for c in group.consumers
        ]
        first = group.producers[0]
        norm = None if first.kind == "rows" else arrays[first.weight.name]
        choice = awq.choose_scale(
            consumers,
            norm,
            zero_centred=first.kind == "zero_centred",
            per_expert=group.experts is not None,
            alphas=alphas,
            weighted_search=weighted,
        )
        if forced and choice.scale is None:
            scale = awq.scale_from(np.asarray(consumers[0].importance), alphas[0])
            if scale.ndim == 2 and group.experts is None:
                scale = scale.mean(0)
            rounded = None
            if norm is not None:
                rounded, scale = awq.fold_norm(norm, scale, first.kind == "zero_centred")
            return awq.FoldChoice(alphas[0], scale, {0.0: 0.0, alphas[0]: 0.0}, rounded)
        return choice

    def fold(self, group: FoldGroup, arrays: dict[str, Any], choice: awq.FoldChoice) -> dict[str, Any]:
        """The tensors of a group, folded."""
        producers = [(p.weight.name, p.kind, p.rows) for p in group.producers]
        return awq.apply(arrays, choice, producers, [c.name for c in group.consumers])

    def measure(self, fmt: str, method: str) -> dict[str, Any]:
        """Quantize, then weighted error and divergence on the held-out text."""
        norms, products, weighted = METHODS[method]
        began = time.monotonic()
        arrays: dict[str, Any] = dict(self.arrays)
        # what a column's input is divided by, so that errors can be judged in the source's terms
        scales: dict[str, Any] = {}
        alphas, rounding = [], {}
        for group in self.groups(products) if norms else ():
            choice = self.choose(group, arrays, fmt, weighted, ALPHAS)
            alphas.append(choice.alpha)
            rounding.update(choice.rounding)
            arrays.update(self.fold(group, arrays, choice))
            for consumer in group.consumers if choice.scale is not None else ():
                scales[consumer.name] = choice.scale
        chosen = time.monotonic() - began
        amax = self._amax(arrays)
        error = energy = 0.0
        stored: dict[str, Any] = {}
        for name, array in arrays.items():
            if not self.is_quantized(name):
                stored[name] = np.asarray(array).astype(self.arrays[name].dtype)
                continue
            now, judged = self.seen.values[name], self.judge.values[name]
            if name in scales:
                now, judged = now / np.square(scales[name]), judged / np.square(scales[name])
            wide = np.asarray(array, np.float32)
            group = self.weights[name].group
            encoded = encode(wide, fmt, "sweep", now if weighted else None, amax=amax.get(group) if group else None)
            stored[name] = encoded.decode()
            counts = self.judge.counts[name] if wide.ndim == 3 else None
            scale = awq.weighted_error(wide, np.zeros_like(wide), judged, counts)
            error += awq.weighted_error(wide, stored[name], judged, counts) / scale
            energy += 1
        self.load(stored)
        found = self.log_probs()
        kl = torch.cat([divergence(a, b).flatten() for a, b in zip(self.source, found, strict=True)])
        same = (self.source.argmax(-1) == found.argmax(-1)).float().mean()
        self.load(self.arrays)
        return {
            "format": fmt,
            "method": method,
            "weighted_error": error / energy,
            "kl": float(kl.mean()),
            "top1": float(same),
            "alphas": {str(a): alphas.count(a) for a in sorted(set(alphas))},
            "kept_rounding": max(rounding.values(), default=0.0),
            "choose_seconds": chosen,
        }

    def _amax(self, arrays: dict[str, Any]) -> dict[str, float]:
        amax: dict[str, float] = {}
        for name, weight in self.weights.items():
            if weight.group:
                found = float(np.abs(np.asarray(arrays[name], np.float32)).max())
                amax[weight.group] = max(amax.get(weight.group, 0.0), found)
        return amax


def table(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"{results['date']}, {versions}. Importance from {CALIBRATION} × {LENGTH} tokens; judged on {HELD_OUT} × "
        f"{LENGTH} others. Error: mean over the weights of the importance-weighted squared error relative to the "
        "output's energy. KL: nats per token × 1000.",
        "",
    ]
    for model in results["models"]:
        lines += [
            f"**{model['model']}**: folded in FP32 (every group, α = 0.5), its logits differ by at most "
            f"{model['preserved']:.1e}.",
            "",
            "| method | " + " | ".join(f"{f} error | KL" for f in FORMATS) + " |",
            "|---|" + "---:|---:|" * len(FORMATS),
        ]
        for method in METHODS:
            cells = [
                f"{r['weighted_error']:.5f} | {1000 * r['kl']:.2f}"
                for f in FORMATS
                for r in model["rows"]
                if r["format"] == f and r["method"] == method
            ]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        rounding = max(r["kept_rounding"] for r in model["rows"])
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
    parser.add_argument("-o", "--output", type=Path, default=REPOSITORY / "benchmarks/results/awq.json")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs/methods.md")
    args = parser.parse_args()
    packages = ("numpy", "torch", "transformers")
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "models": [],
    }
    for folder in sorted((args.data / "models").glob("*-wiki")):
        bench = Bench(folder, args.data)
        rows: list[dict[str, Any]] = []
        results["models"].append({"model": folder.name, "preserved": bench.preserved(), "rows": rows})
        print(f"{folder.name}: logits differ by {results['models'][-1]['preserved']:.2e}", flush=True)
        for fmt in FORMATS:
            for method in METHODS:
                rows.append(row := bench.measure(fmt, method))
                print(
                    f"{folder.name} {fmt} {method}: error {row['weighted_error']:.5f} KL {row['kl']:.6f} "
                    f"{row['alphas']} {row['choose_seconds']:.0f} s",
                    flush=True,
                )
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    content = args.docs.read_text(encoding="utf-8")
    before, rest = content.split(START)
    args.docs.write_text(f"{before}{START}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
