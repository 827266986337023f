"""GPTQ, local Hessians and plain searches compared: a synthetic layer, and small trained models on held-out text.

    python benchmarks/gptq.py ../shared/data [-o benchmarks/results/gptq.json] [--docs docs/accuracy.md] [--quick]

The synthetic layer has Gaussian weights; its inputs are Gaussian with channels of different size and a few common
directions. The models are ``models/*-wiki``: Hessians from training text, output error and KL divergence on
held-out text, all linear weights quantized, the rest left alone. The tables between the markers in the document are
written anew. Needs ``halfbyte[transformers]``; takes about half an hour on one core (``--quick``: fewer tokens).
"""

from __future__ import annotations

import argparse
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import REPOSITORY, RESULTS, head, replace_part, write_results
from halfbyte.checkpoint import Reader
from halfbyte.formats import QuantizedTensor
from halfbyte.models.roles import LINEAR, is_under
from halfbyte.search import encode
from halfbyte.search.gptq import gptq
from halfbyte.search.local_hessian import prepare_local
from halfbyte.source.checkpoint import Checkpoint

LENGTH = 512
Method = Callable[..., QuantizedTensor]


def output_error(weight: Any, decoded: Any, hessian: Any) -> float:
    """Relative output error of a quantized weight: trace(E H E^T) / trace(W H W^T), [..., N, K] and [..., K, K]."""
    w = np.asarray(weight).astype(np.float64)
    e = np.asarray(decoded).astype(np.float64) - w
    h = np.asarray(hessian, dtype=np.float64)
    energy = float(np.sum((w @ h) * w))
    return float(np.sum((e @ h) * e)) / energy if energy else 0.0


def _rtn(search: str, weighted: bool = False) -> Method:
    def method(w: Any, fmt: str, h: Any, amax: Any) -> QuantizedTensor:
        return encode(w, fmt, search, np.diagonal(h, axis1=-2, axis2=-1) if weighted else None, amax=amax)

    return method


def _local(codes: Any) -> Method:
    def method(w: Any, fmt: str, h: Any, amax: Any) -> QuantizedTensor:
        each = np.reshape(h, (-1, *np.shape(h)[-2:]))
        return gptq(w, fmt, "sweep", [prepare_local(one, fmt, codes=codes) for one in each], amax=amax)

    return method


def _gptq(search: str, mode: Any, order: Any = "none", damping: float = 0.01) -> Method:
    return lambda w, fmt, h, amax: gptq(w, fmt, search, h, mode=mode, order=order, damping=damping, amax=amax)


def _static(first: Method, order: Any = "none") -> Method:
    """GPTQ with the scales that another method chose."""
    return lambda w, fmt, h, amax: gptq(
        w, fmt, "sweep", h, mode="static", order=order, given=first(w, fmt, h, amax=amax)
    )


METHODS: dict[str, Method] = {
    "absmax": _rtn("absmax"),
    "4/6": _rtn("four_over_six"),
    "sweep": _rtn("sweep"),
    "sweep, importance": _rtn("sweep", True),
    "sweep, local Hessian": _local("nearest"),
    "sweep, local Hessian with feedback": _local("feedback"),
    "GPTQ absmax": _gptq("absmax", "static"),
    "GPTQ 4/6": _gptq("four_over_six", "static"),
    "GPTQ static": _gptq("sweep", "static"),
    "GPTQ static, act order": _gptq("sweep", "static", "act"),
    "GPTQ static, importance": _static(_rtn("sweep", True)),
    "GPTQ static, local Hessian": _static(_local("nearest")),
    "GPTQ compensated": _gptq("sweep", "compensated"),
    "GPTQ compensated, local Hessian": _gptq("sweep", "local_hessian"),
    "GPTQ in-loop": _gptq("sweep", "in_loop"),
    "GPTQ in-loop, act order": _gptq("sweep", "in_loop", "act"),
    "GPTQ in-loop, damping 0.05": _gptq("sweep", "in_loop", damping=0.05),
}
FORMATS = ("nvfp4", "mixfp4", "mxfp4", "int4_g32", "int4_g128")
# signed tables, not for every method
EXTRA = (("iq4_nl", "sweep"), ("iq4_nl", "GPTQ in-loop"))
SYNTHETIC = (
    *(("nvfp4", m) for m in METHODS),
    ("mixfp4", "GPTQ static"),
    ("mixfp4", "GPTQ in-loop"),
    ("iq4_nl", "GPTQ in-loop"),
)
SAMPLES = (256, 512, 1024, 4096)


def applies(method: str, fmt: str) -> bool:
    return "4/6" not in method or fmt in ("nvfp4", "mixfp4")


def synthetic() -> list[dict[str, Any]]:
    """Relative output error on 16,384 fresh inputs, K = 256, calibrated on fewer ones."""
    r = np.random.RandomState(0)
    n = k = 256
    weight = r.standard_normal((n, k)).astype(np.float32)
    spread = np.diag(np.exp(0.5 * r.standard_normal(k)))
    mixing = np.concatenate([spread, 2 * r.standard_normal((16, k)) / 4])

    def draw(count: int) -> Any:
        x = r.standard_normal((count, len(mixing))) @ mixing
        return x.T @ x

    fresh = draw(16384)
    hessians = {count: draw(count) for count in SAMPLES}
    rows = []
    for fmt, method in SYNTHETIC:
        found = [
            output_error(weight, METHODS[method](weight, fmt, hessians[c], amax=None).decode(), fresh) for c in SAMPLES
        ]
        rows.append({"format": fmt, "method": method, "errors": found})
        print(fmt, method, *(f"{e:.5f}" for e in found), flush=True)
    return rows


def collect(model: Any, tokens: torch.Tensor, names: set[str]) -> dict[str, torch.Tensor]:
    """Sums of x x^T of every linear weight's inputs; of stacked experts, one over the tokens that each one gets."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor, expert: int | None = None, count: int = 0) -> None:
        k = x.shape[-1]
        if name not in sums:
            sums[name] = torch.zeros((count, k, k) if count else (k, k))
        target = sums[name] if expert is None else sums[name][expert]
        target += x.T @ x

    def linear(name: str) -> Any:
        return lambda _, inputs: add(name, inputs[0].reshape(-1, inputs[0].shape[-1]))

    def experts(name: str, module: Any) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x, chosen = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1]
            count = len(module.gate_up_proj)
            for e in range(count):
                routed = x[(chosen == e).any(-1)]
                gate, up = (routed @ module.gate_up_proj[e].T).chunk(2, dim=-1)
                add(f"{name}.gate_up_proj", routed, e, count)
                add(f"{name}.down_proj", torch.nn.functional.silu(gate) * up, e, count)

        return hook

    handles = []
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
            handles.append(module.register_forward_pre_hook(experts(name, module)))
        elif f"{name}.weight" in names:
            handles.append(module.register_forward_pre_hook(linear(f"{name}.weight")))
    with torch.no_grad():
        for batch in tokens.split(8):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


def _kl(source: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (source.exp() * (source - other)).sum(-1).mean()


class Bench:
    """One model: its weights, Hessians from two texts, and its log-probabilities on held-out text."""

    def __init__(self, folder: Path, data: Path, calibration: int, held_out: int) -> None:
        checkpoint = Checkpoint.open(folder)
        with Reader(checkpoint.inventory) as reader:
            weights = {w.name: w for w in checkpoint.weights if any(is_under(w.role, p) for p in LINEAR)}
            self.arrays = {n: np.asarray(checkpoint.read(reader, w), np.float32) for n, w in weights.items()}
        self.amax: dict[str, float] = {}
        for name, weight in weights.items():
            same = [np.abs(self.arrays[n]).max() for n, w in weights.items() if w.group and w.group == weight.group]
            self.amax[name] = float(max(same, default=np.abs(self.arrays[name]).max()))
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        train = lzma.decompress((data / "text/enwiki2015/train_first12MB.txt.xz").read_bytes())[:2_500_000]
        seen = self._cut(tokenizer, train.decode(errors="ignore"), calibration)
        self.held_out = self._cut(tokenizer, (data / "text/enwiki2015/valid.txt").read_text("utf-8"), held_out)
        self.hessians = {n: h.numpy() for n, h in collect(self.model, seen, set(self.arrays)).items()}
        self.judge = {n: h.numpy() for n, h in collect(self.model, self.held_out, set(self.arrays)).items()}
        self.source = self.log_probs()

    def _cut(self, tokenizer: Any, text: str, count: int) -> torch.Tensor:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: count * LENGTH]
        return torch.tensor(ids).reshape(count, LENGTH)

    def log_probs(self) -> torch.Tensor:
        """Log-probabilities on the held-out text."""
        with torch.no_grad():
            parts = [self.model(input_ids=b, use_cache=False).logits.log_softmax(-1) for b in self.held_out.split(4)]
        return torch.cat(parts)

    def load(self, arrays: dict[str, Any]) -> None:
        """Put weights into the model."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, array in arrays.items():
                parameters[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))

    def measure(self, fmt: str, method: str) -> dict[str, Any]:
        """Quantize every linear weight; output error and divergence on the held-out text."""
        decoded, errors = {}, []
        for name, array in self.arrays.items():
            tensor = METHODS[method](array, fmt, self.hessians[name], amax=self.amax[name])
            decoded[name] = tensor.decode()
            errors.append(output_error(array, decoded[name], self.judge[name]))
        self.load(decoded)
        pairs = list(zip(self.source, self.log_probs(), strict=True))
        self.load(self.arrays)
        kl = float(torch.stack([_kl(a.double(), b.double()) for a, b in pairs]).mean())
        same = float(torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs]).float().mean())
        return {"format": fmt, "method": method, "error": float(np.mean(errors)), "kl": kl, "top1": same}


def table(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"{results['date']}, {versions}.",
        "",
        "Synthetic layer: relative output error on 16,384 fresh inputs, calibrated on N inputs.",
        "",
        "| format, method | " + " | ".join(f"N = {n}" for n in SAMPLES) + " |",
        "|---|" + "---:|" * len(SAMPLES),
    ]
    for row in results["synthetic"]:
        cells = " | ".join(f"{e:.5f}" for e in row["errors"])
        lines.append(f"| `{row['format']}`, {row['method']} | {cells} |")
    for model in results["models"]:
        lines += [
            "",
            f"**{model['model']}**: Hessians from {model['calibration']} × {LENGTH} tokens, evaluated on "
            f"{model['held_out']} × {LENGTH} others. KL: nats per token × 1000; brackets give the output error, the "
            "mean over the weights of the squared error of their outputs over the outputs' energy, × 1000.",
            "",
            "| method | " + " | ".join(f"`{f}`" for f in (*FORMATS, "iq4_nl")) + " |",
            "|---|" + "---:|" * (len(FORMATS) + 1),
        ]
        found = {(r["format"], r["method"]): r for r in model["rows"]}
        for method in METHODS:
            cells = []
            for fmt in (*FORMATS, "iq4_nl"):
                row = found.get((fmt, method))
                cells.append(f"{1000 * row['kl']:.3f} ({1000 * row['error']:.2f})" if row else "")
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "gptq.json")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs/accuracy.md")
    parser.add_argument("--quick", action="store_true", help="16 windows for calibration, 4 to judge")
    args = parser.parse_args()
    results: dict[str, Any] = {
        **head("torch", "transformers"),
        "synthetic": synthetic(),
        "models": [],
    }
    calibration, held_out = (16, 4) if args.quick else (128, 24)
    cases = [(f, m) for f in FORMATS for m in METHODS if applies(m, f)] + list(EXTRA)
    for folder in sorted((args.data / "models").glob("*-wiki")):
        bench = Bench(folder, args.data, calibration, held_out)
        rows: list[dict[str, Any]] = []
        results["models"].append({"model": folder.name, "calibration": calibration, "held_out": held_out, "rows": rows})
        for fmt, method in cases:
            rows.append(row := bench.measure(fmt, method))
            print(
                f"{folder.name} {fmt} {method}: error {row['error']:.5f} KL {row['kl']:.6f} top-1 {row['top1']:.4f}",
                flush=True,
            )
        write_results(args.output, results)
    replace_part(args.docs, "gptq", f"\n{table(results)}\n")


if __name__ == "__main__":
    main()
