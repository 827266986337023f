"""What a calibration costs: time beside a plain forward pass, peak memory, and an estimate for a large model.

    python benchmarks/calibration_cost.py ../shared/data [-o benchmarks/results/calibration_cost.json] [--docs FILE]

For the demo model and ``models/*-wiki``, each kind of calibration and a plain forward pass of the whole model over the
same samples run in processes of their own, one after the other; times are given as ratios, since they depend on the
machine. Memory is the peak above that of the imports. The estimate comes from the headers in ``inventories`` beside
the data and a formula, not from a run. Needs ``halfbyte[transformers]``; takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

from common import REPOSITORY, RESULTS, head, replace_part
from halfbyte.calibrate.collect import BATCH_TOKENS, HESSIAN_BYTES
from halfbyte.checkpoint.inventory import Inventory
from halfbyte.demo import MODEL as DEMO
from halfbyte.models import Weight, family_for

SAMPLES, LENGTH = 32, 256
KINDS = ("importance", "hessians", "hessians, all experts")


def forward(model: Path, text: Path) -> None:
    """The whole model over the samples, in batches as large as those of a calibration."""
    import torch

    from halfbyte.calibrate.samples import make_samples
    from halfbyte.runtime.loading import load, load_tokenizer

    loaded = load(model, "float32")
    ids = torch.tensor(make_samples([text], load_tokenizer(model), SAMPLES, LENGTH).tokens)
    with torch.inference_mode():
        for batch in ids.split(BATCH_TOKENS // LENGTH):
            loaded.get_decoder()(input_ids=batch, use_cache=False)


def calibrate(model: Path, text: Path, kind: str) -> None:
    from halfbyte.calibrate.collect import collect_statistics

    with tempfile.TemporaryDirectory() as out:
        collect_statistics(
            model, Path(out) / "s", [text], SAMPLES, LENGTH,
            hessians=kind != "importance", all_experts=kind.endswith("all experts"),
        )  # fmt: skip


def worker(model: Path, text: Path, kind: str) -> None:
    """One kind, in this process: processor seconds and peak memory, as JSON."""
    import resource
    import time

    import torch
    import transformers

    assert torch and transformers
    scale = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    began = time.process_time()
    forward(model, text) if kind == "forward" else calibrate(model, text, kind)
    seconds = time.process_time() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    print(json.dumps({"seconds": seconds, "bytes": after - before}))


def measured(model: Path, text: Path) -> dict[str, Any]:
    """All kinds on one model; loading is part of each."""
    found: dict[str, Any] = {"model": model.name}
    experts = "num_experts" in json.loads((model / "config.json").read_text())
    for kind in ("forward", *KINDS):
        if kind.endswith("all experts") and not experts:
            continue
        command = [sys.executable, __file__, "", "--worker", str(model), str(text), kind]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[kind] = json.loads(done.stdout.strip().splitlines()[-1])
        print(model.name, kind, found[kind], flush=True)
    return found


def estimate(inventory: Path, dtype_bytes: int = 4) -> dict[str, Any]:
    """The largest decoder layer in memory: its weights and Hessians, and the activations of one batch.

    Activations: hidden states twice, and the widest product of a batch of ``BATCH_TOKENS`` tokens. What transformers
    needs on top while it fills a layer (a copy of one stack of experts at most) is not counted. All in FP32.
    """
    checkpoint = Inventory.from_json(inventory)
    layers: dict[int, list[Weight]] = {}
    for weight in family_for(checkpoint.config).weights(checkpoint):
        if weight.layer is not None and not weight.role.startswith(("mtp", "vision")):
            layers.setdefault(weight.layer, []).append(weight)

    def sizes(weights: list[Weight]) -> tuple[int, int, int]:
        elements = sum(math.prod(w.shape) for w in weights)
        hessians: dict[tuple[str, int], int] = {}
        for w in weights:
            if len(w.shape) < 2:
                continue
            e, k = (w.shape[0] if len(w.shape) == 3 else 1), w.shape[-1]
            own = e * k * k * dtype_bytes
            # matrices with one input share a sum: told apart here by what they follow and how wide they are
            reads = w.group or ("norm" if w.role.endswith((".q", ".k", ".v", ".gate", ".up", "router")) else w.name)
            hessians[reads, k] = own if own <= HESSIAN_BYTES else k * k * dtype_bytes
        widest = max(w.shape[-2] for w in weights if len(w.shape) > 1)
        return elements * dtype_bytes, sum(hessians.values()), widest

    config = checkpoint.config.get("text_config", checkpoint.config)
    each = [sizes(weights) for weights in layers.values()]
    weights, hessians, widest = max(each, key=lambda s: s[0] + s[1])
    activations = BATCH_TOKENS * (2 * config["hidden_size"] + widest) * dtype_bytes
    return {
        "inventory": inventory.stem,
        "layer_weights": weights,
        "hessians": hessians,
        "activations": activations,
        "sum": weights + hessians + activations,
        "states_on_disk": 2 * 128 * 512 * config["hidden_size"] * 4,
        "statistics_on_disk": sum(s[1] for s in each),
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['date']}, {results['machine']['cpu']}, one thread, {SAMPLES} × {LENGTH} tokens. Processor time "
        "relative to a plain forward pass of the whole model over the same samples (loading included in all), and peak "
        "memory above that of the imports.",
        "",
        "| model | forward | " + " | ".join(KINDS) + " |",
        "|---|" + "---:|" * (1 + len(KINDS)),
    ]
    for found in results["models"]:
        base = found["forward"]
        cells = [f"1, {base['bytes'] / 2**20:.0f} MiB"]
        for kind in KINDS:
            one = found.get(kind)
            cells.append(f"{one['seconds'] / base['seconds']:.1f}, {one['bytes'] / 2**20:.0f} MiB" if one else "–")
        lines.append(f"| {found['model']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Estimated, not measured: memory by formula for shapes of large models, in GiB.",
        "",
        "| | weights of the largest layer, FP32 | its Hessians | activations of a batch | together | on disk: states, "
        "128 × 512 tokens | statistics |",
        "|---|" + "---:|" * 6,
    ]
    for e in results["estimates"]:
        keys = ("layer_weights", "hessians", "activations", "sum", "states_on_disk", "statistics_on_disk")
        lines.append(f"| {e['inventory']} | " + " | ".join(f"{e[k] / 2**30:.2f}" for k in keys) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "calibration_cost.json")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs/methods.md")
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "TEXT", "KIND"), help="internal: one measurement")
    args = parser.parse_args()
    if args.worker:
        worker(Path(args.worker[0]), Path(args.worker[1]), args.worker[2])
        return
    results = head("torch", "transformers")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        content = lzma.decompress((args.data / "text/enwiki2015/train_first12MB.txt.xz").read_bytes())[:500_000]
        text.write_text(content.decode(errors="ignore"), "utf-8")
        models = [DEMO, *sorted((args.data / "models").glob("*-wiki"))]
        results["models"] = [measured(model, text) for model in models]
    names = ("qwen36_35b_a3b", "qwen3_0_6b", "llama_3_2_1b")
    results["estimates"] = [estimate(args.data.parent / "inventories" / f"{name}.json") for name in names]
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    replace_part(args.docs, "calibration cost", table(results))


if __name__ == "__main__":
    main()
