"""What a calibration costs: time beside a plain forward pass, peak memory, and what a large model would need.

    python benchmarks/calibration_cost.py ../shared/data [-o benchmarks/results/calibration_cost.json] [--docs FILE]
    python benchmarks/calibration_cost.py ../shared/data --shapes qwen36_35b_a3b --layers 4 --scratch DIR

For the demo model and ``models/*-wiki``, each kind of calibration and a plain forward pass of the whole model over the
same samples run in processes of their own, one after the other; times are given as ratios, since they depend on the
machine. Memory is the peak above that of the imports. The estimate comes from the headers in ``inventories`` beside
the data and a formula, not from a run. Needs ``halfbyte[transformers]``; takes about a minute on one core.

``--shapes`` instead calibrates and converts a few layers of a large model with random weights, which needs 25 GB in DIR
and an hour on two cores (``calibration_at_scale.py``), and leaves the other results as they are.
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

import calibration_at_scale as scale
from common import REPOSITORY, RESULTS, head, replace_part
from halfbyte.calibrate.collect import HESSIAN_BYTES
from halfbyte.calibrate.samples import BATCH_TOKENS
from halfbyte.checkpoint import Inventory, nbytes
from halfbyte.demo import MODEL as DEMO
from halfbyte.models import Weight, family_for

SAMPLES, LENGTH = 32, 256
NAMES = ("qwen36_35b_a3b", "qwen3_0_6b", "llama_3_2_1b")
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
    from halfbyte.calibrate.collect import CollectOptions, collect_statistics

    with tempfile.TemporaryDirectory() as out:
        options = CollectOptions(
            SAMPLES, LENGTH, hessians=kind != "importance", all_experts=kind.endswith("all experts")
        )
        collect_statistics(model, Path(out) / "s", [text], options)


def worker(model: Path, text: Path, kind: str) -> None:
    """One kind, in this process: processor seconds and peak memory, as JSON."""
    import resource
    import time

    import torch
    import transformers

    assert transformers
    torch.set_num_threads(1)
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
    """The largest decoder layer in memory, its weights and Hessians; activations depend on the model's code.

    All in FP32, but for stacks of experts, which are in the checkpoint's type, with one expert of each also in FP32.
    """
    checkpoint = Inventory.from_json(inventory)
    layers: dict[int, list[Weight]] = {}
    for weight in family_for(checkpoint.config).weights(checkpoint):
        if weight.layer is not None and not weight.role.startswith(("mtp", "vision")):
            layers.setdefault(weight.layer, []).append(weight)

    def sizes(weights: list[Weight]) -> tuple[int, int]:
        stacks = [w for w in weights if len(w.shape) == 3 and w.role.startswith("experts.")]
        held = sum(math.prod(w.shape) * dtype_bytes for w in weights if w not in stacks)
        held += sum(nbytes(w.dtype, w.shape) + math.prod(w.shape[1:]) * dtype_bytes for w in stacks)
        hessians: dict[tuple[str, int], int] = {}
        for w in weights:
            if len(w.shape) < 2:
                continue
            e, k = (w.shape[0] if len(w.shape) == 3 else 1), w.shape[-1]
            own = e * k * k * dtype_bytes
            # matrices with one input share a sum: told apart here by what they follow and how wide they are
            reads = w.group or ("norm" if w.role.endswith((".q", ".k", ".v", ".gate", ".up", "router")) else w.name)
            hessians[reads, k] = own if own <= HESSIAN_BYTES else k * k * dtype_bytes
        return held, sum(hessians.values())

    config = checkpoint.config.get("text_config", checkpoint.config)
    each = [sizes(weights) for weights in layers.values()]
    weights, hessians = max(each, key=sum)
    return {
        "inventory": inventory.stem,
        "layer_weights": weights,
        "hessians": hessians,
        "states_on_disk": 2 * 128 * 512 * config["hidden_size"] * 4,
        "statistics_on_disk": sum(s[1] for s in each),
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['date']}, {results['machine']['cpu']}, one thread, {SAMPLES} × {LENGTH} tokens. Processor time "
        "relative to a plain forward pass of the whole model over the same samples (all include loading), and peak "
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
    return "\n".join([*lines, "", *scale.table(results["estimates"], results.get("at_scale", {}))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "calibration_cost.json")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs/accuracy.md")
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "TEXT", "KIND"), help="internal: one measurement")
    parser.add_argument("--shapes", metavar="NAME", help="an inventory of a large model, to be measured at scale")
    parser.add_argument("--layers", type=int, default=4, help="how many of its layers")
    parser.add_argument("--scratch", type=Path, help="a folder for its checkpoint, outputs and statistics")
    args = parser.parse_args()
    if args.worker:
        worker(Path(args.worker[0]), Path(args.worker[1]), args.worker[2])
        return
    inventories = args.data.parent / "inventories"
    results = head("torch", "transformers")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        content = lzma.decompress((args.data / "text/enwiki2015/train_first12MB.txt.xz").read_bytes())[:500_000]
        text.write_text(content.decode(errors="ignore"), "utf-8")
        before = json.loads(args.output.read_text()) if args.output.exists() else {}
        if args.shapes:
            if not args.scratch:
                parser.error("--shapes needs --scratch")
            found = scale.at_scale(inventories / f"{args.shapes}.json", args.layers, args.scratch, args.data, text)
            results = {**before, "at_scale": {**before.get("at_scale", {}), args.shapes: {**results, **found}}}
        else:
            models = [DEMO, *sorted((args.data / "models").glob("*-wiki"))]
            results["models"] = [measured(model, text) for model in models]
            results |= {"at_scale": before["at_scale"]} if "at_scale" in before else {}
    results["estimates"] = [estimate(inventories / f"{name}.json") for name in NAMES]
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    replace_part(args.docs, "calibration cost", table(results))


if __name__ == "__main__":
    main()
