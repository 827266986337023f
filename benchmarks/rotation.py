"""Block rotations on small trained models: output errors of quantized linear layers.

    python benchmarks/rotation.py ../shared/data [-o benchmarks/results/rotation.json] [--docs docs/accuracy.md]

For each linear weight of ``models/*-wiki`` (stacked experts left out) its inputs are collected on training text, from
which DuQuant's rotations are made, and on held-out text, on which outputs are compared: weights quantized
alone (W4A16), or weights and inputs (W4A4). The table between the markers in the document is written anew. Needs
``halfbyte[transformers]``; takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import lzma
import os
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import REPOSITORY, RESULTS, head, replace_part, write_results
from halfbyte.formats.rotation import hadamard_matrix
from halfbyte.search import encode
from halfbyte.search.gptq import gptq
from halfbyte.search.rotated_space import duquant_swaps
from rotations import fold_values, rotate_columns, rotation_matrices

LENGTH, WINDOWS = 512, 4
ROTATIONS = ("none", "Hadamard", "DuQuant")
# name: format, search, GPTQ, inputs quantized too
COLUMNS = {
    "`mxfp4` absmax": ("mxfp4", "absmax", False, False),
    "`mxfp4` sweep": ("mxfp4", "sweep", False, False),
    "`mxfp4` GPTQ": ("mxfp4", "sweep", True, False),
    "`mxfp4` W4A4": ("mxfp4", "sweep", False, True),
    "`mxfp4` W4A4, GPTQ": ("mxfp4", "sweep", True, True),
    "`nvfp4` sweep": ("nvfp4", "sweep", False, False),
    "`nvfp4` W4A4": ("nvfp4", "sweep", False, True),
}


def collect(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """Inputs [tokens, K] of the linear layers of the decoder, by name."""
    found: dict[str, list[Any]] = {}

    def hook(name: str) -> Any:
        return lambda _, inputs: found.setdefault(name, []).append(inputs[0].reshape(-1, inputs[0].shape[-1]).numpy())

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name and module.out_features % 32 == 0
    ]
    with torch.no_grad():
        for window in tokens:
            model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in found.items()}


def rotation(kind: str, inputs: Any, block: int) -> Any:
    if kind == "none":
        return np.eye(block)
    swaps = None if kind == "Hadamard" else duquant_swaps(inputs.T.astype(np.float64) @ inputs, block)
    return rotation_matrices(block, swaps)


def error(weight: Any, seen: Any, fresh: Any, kind: str, column: str) -> float:
    """Squared error of the outputs on fresh inputs, over the outputs' energy."""
    fmt, search, calibrated, both = COLUMNS[column]
    r = rotation(kind, seen, 32 if fmt == "mxfp4" else 16)
    w, x, known = (rotate_columns(a, r) for a in (weight, fresh, seen))
    if calibrated:
        tensor = gptq(w, fmt, search, known.T.astype(np.float64) @ known, mode="static", order="act")
    else:
        tensor = encode(w, fmt, search)
    given = encode(x, fmt, "absmax").decode() if both else x
    expected = fresh @ weight.T
    return float(np.square(given @ tensor.decode().T - expected).sum() / np.square(expected).sum())


def folded(model: Any, tokens: torch.Tensor) -> dict[str, float] | None:
    """Largest change of logits when the value channels of every layer are rotated; None where a gate forbids it."""
    config = model.config.get_text_config()
    if getattr(config, "attn_output_gate", False) or config.model_type != "qwen3":
        return None
    with torch.no_grad():
        before = model(input_ids=tokens[:2], use_cache=False).logits
        for layer in model.model.layers:
            v, o = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
            turned = fold_values(v.numpy(), o.numpy(), hadamard_matrix(32), config.head_dim)
            v.copy_(torch.from_numpy(turned[0]))
            o.copy_(torch.from_numpy(turned[1]))
        after = model(input_ids=tokens[:2], use_cache=False).logits
    return {"logits": float((after - before).abs().max()), "largest": float(before.abs().max())}


def table(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [f"{results['date']}, {versions}. Mean over the weights of the relative error of outputs, × 1000."]
    for model in results["models"]:
        lines += ["", f"**{model['model']}**", "", "| rotation | " + " | ".join(COLUMNS) + " |"]
        lines.append("|---|" + "---:|" * len(COLUMNS))
        for kind in ROTATIONS:
            lines.append(f"| {kind} | " + " | ".join(f"{1000 * model['errors'][kind][c]:.2f}" for c in COLUMNS) + " |")
        if model["folded"]:
            lines += [
                "",
                f"Value channels rotated in every layer: logits up to {model['folded']['largest']:.1f} change by at "
                f"most {model['folded']['logits']:.1e}.",
            ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "rotation.json")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs/accuracy.md")
    args = parser.parse_args()
    results: dict[str, Any] = {
        **head("torch", "transformers"),
        "models": [],
    }
    train = lzma.decompress((args.data / "text/enwiki2015/train_first12MB.txt.xz").read_bytes())[:200_000]
    texts = (train.decode(errors="ignore"), (args.data / "text/enwiki2015/valid.txt").read_text("utf-8"))
    for folder in sorted((args.data / "models").glob("*-wiki")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(t, add_special_tokens=False)["input_ids"][: WINDOWS * LENGTH] for t in texts]
        tokens = [torch.tensor(i).reshape(WINDOWS, LENGTH) for i in ids]
        seen, fresh = (collect(model, t) for t in tokens)
        weights = {n: model.get_submodule(n).weight.detach().numpy().copy() for n in seen}
        errors: dict[str, dict[str, float]] = {}
        for kind in ROTATIONS:
            errors[kind] = {}
            for column in COLUMNS:
                each = [error(w, seen[n], fresh[n], kind, column) for n, w in weights.items()]
                errors[kind][column] = float(np.mean(each))
            print(folder.name, kind, *(f"{1000 * e:.2f}" for e in errors[kind].values()), flush=True)
        found = {"model": folder.name, "weights": len(weights), "errors": errors}
        results["models"].append({**found, "folded": folded(model, tokens[1])})
        print(folder.name, results["models"][-1]["folded"], flush=True)
    write_results(args.output, results)
    replace_part(args.docs, "rotation", f"\n{table(results)}\n")


if __name__ == "__main__":
    main()
