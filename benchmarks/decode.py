"""Decoding with models of real shapes: CPU milliseconds per token of halfbyte and of transformers on dense weights.

    python benchmarks/decode.py [--work DIR] [--rounds 2] [--tokens 16] [--threads 1]

Weights are random: speed does not depend on them. Each engine runs in a process of its own, all of them in turn, round
after round; the best token and the best prefill of all rounds count, in CPU time, since the machine may be shared.
Results go to benchmarks/results/decode.json and into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import REPOSITORY, RESULTS, head, replace_part, write_results

DENSE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
MOE = DENSE | {
    "vocab_size": 4096,
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "num_key_value_heads": 2,
}
KINDS = {"dense": ("Qwen3", DENSE), "moe": ("Qwen3Moe", MOE)}
QUANTIZED = {
    "dense": {"mixfp4": None, "mxfp4": None, "mixfp4-head8": "q8_0", "mixfp4-head4": "mixfp4"},
    "moe": {"mixfp4": None},
}
RUNS = [
    ("dense", "bf16", "transformers, BF16"),
    ("dense", "fp32", "transformers, FP32"),
    ("dense", "mixfp4:exact", "halfbyte MixFP4, head BF16, exact"),
    ("dense", "mixfp4:int8", "halfbyte MixFP4, head BF16, int8"),
    ("dense", "mxfp4:int8", "halfbyte MXFP4, head BF16, int8"),
    ("dense", "mixfp4-head8:int8", "halfbyte MixFP4, head 8 bit, int8"),
    ("dense", "mixfp4-head4:exact", "halfbyte MixFP4, head 4 bit, exact"),
    ("dense", "mixfp4-head4:int8", "halfbyte MixFP4, head 4 bit, int8"),
    ("moe", "bf16", "transformers, BF16"),
    ("moe", "mixfp4:exact", "halfbyte MixFP4, exact"),
    ("moe", "mixfp4:int8", "halfbyte MixFP4, int8"),
]
PROMPT, PREFILL = 16, 128


def make_model(kind: str, folder: Path) -> None:
    """Write a model with random BF16 weights."""
    import torch
    import transformers

    name, settings = KINDS[kind]
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    config = getattr(transformers, f"{name}Config")(**settings, dtype="bfloat16")
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def quantize(source: Path, out: Path, fmt: str, head_format: str | None) -> None:
    """Write a quantized copy by absmax, which is quick."""
    from halfbyte import quantize as run
    from halfbyte.recipes import Recipe

    rules = [{"match": "linear", "format": fmt, "scale_search": "absmax"}]
    if head_format:
        rules.append({"match": "lm_head", "format": head_format, "scale_search": "absmax"})
    run(source, out, Recipe.model_validate({"name": out.name, "dialect": "halfbyte", "rules": rules}))


def resident() -> float:
    """Memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def measure(path: str, how: str, tokens: int, threads: int) -> dict[str, float]:
    """Load a model, read a prompt, decode, and read a longer prompt; milliseconds of CPU."""
    import torch
    import transformers

    from halfbyte.runtime import load

    torch.set_num_threads(threads)
    before, start = resident(), time.process_time()
    if how in ("bf16", "fp32"):
        dtype = torch.bfloat16 if how == "bf16" else torch.float32
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    else:
        model = load(path, mode=how)
    loading, times = time.process_time() - start, []
    with torch.inference_mode():
        out = model(input_ids=torch.arange(100, 100 + PROMPT)[None], use_cache=True, logits_to_keep=1)
        for _ in range(tokens):
            token, start = out.logits[:, -1:].argmax(-1), time.process_time()
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            times.append(time.process_time() - start)
        start = time.process_time()
        model(input_ids=torch.arange(100, 100 + PREFILL)[None], use_cache=True, logits_to_keep=1)
        prefill = time.process_time() - start
    return {"load_s": loading, "ms": min(times) * 1e3, "prefill": PREFILL / prefill, "rss_mb": resident() - before}


def prepare(work: Path) -> None:
    """Write the models that are not there yet."""
    for kind, variants in QUANTIZED.items():
        if not (work / kind / "config.json").exists():
            make_model(kind, work / kind)
        for name, head_format in variants.items():
            if not (work / f"{kind}-{name}" / "halfbyte.json").exists():
                quantize(work / kind, work / f"{kind}-{name}", name.partition("-")[0], head_format)


def run_all(work: Path, rounds: int, tokens: int, threads: int) -> Iterator[list[dict[str, Any]]]:
    """Every engine in turn, round after round; what is measured so far, after each."""
    rows: list[dict[str, Any]] = [{"model": kind, "engine": label, "how": how} for kind, how, label in RUNS]
    for number in range(rounds):
        for row in rows:
            variant, _, mode = row["how"].partition(":")
            path = work / (f"{row['model']}-{variant}" if mode else row["model"])
            command = [sys.executable, __file__, "--child", str(path), mode or variant]
            command += ["--tokens", str(tokens), "--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            for key, value in found.items():
                choose = max if key == "prefill" else min
                row[key] = choose(row.get(key, value), value)
            row["file_mb"] = (path / "model.safetensors").stat().st_size / 1e6
            print(number, row["model"], row["engine"], found, file=sys.stderr, flush=True)
            yield [row for row in rows if "ms" in row]


def table(found: dict[str, Any]) -> str:
    """The results as Markdown, ratios against transformers' BF16."""
    lines = [
        "| model | engine | ms/token | against BF16 | prefill tokens/s | load s | file MB | memory MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = {row["model"]: row["ms"] for row in found["rows"] if row["how"] == "bf16"}
    for row in (row for row in found["rows"] if row["model"] in base):
        cells = [row["model"], row["engine"], f"{row['ms']:.1f}", f"{base[row['model']] / row['ms']:.2f}×"]
        cells += [f"{row['prefill']:.0f}", f"{row['load_s']:.1f}", f"{row['file_mb']:.0f}", f"{row['rss_mb']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    machine, isa = found["machine"], found["isa"]
    return "\n".join(
        [
            *lines,
            "",
            f"CPU time, best of {found['tokens']} tokens, {found['rounds']} round(s), {found['threads']} thread, "
            f"on {machine['cpu']} "
            f"({machine['cores']} cores, instruction set {isa}), shared with other work "
            f"(load {found['load_at_start'][0]} at the start); {found['date']}.",
        ]
    )


def main() -> None:
    """Measure, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder for models, kept (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=2, metavar=("PATH", "HOW"))
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child, args.tokens, args.threads)))
        return
    from halfbyte.kernels.linear import isa

    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        prepare(work)
        found = head("torch", "transformers") | {
            "isa": isa(),
            "rounds": args.rounds,
            "tokens": args.tokens,
            "threads": args.threads,
        }
        for found["rows"] in run_all(work, args.rounds, args.tokens, args.threads):
            write_results(RESULTS / "decode.json", found, "rows")
            if any(row["how"] == "bf16" for row in found["rows"]):
                replace_part(REPOSITORY / "docs" / "benchmarks.md", "decode", table(found))


if __name__ == "__main__":
    main()
