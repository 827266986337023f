"""Speed of vLLM on a CPU: a model as it is and quantized, by halfbyte's plugin and by vLLM's own kernels.

    python benchmarks/engines_vllm_speed.py NAME=FOLDER[:METHOD] ... --python VLLM/bin/python
        [-o benchmarks/results/vllm_speed.json] [--docs docs/engines.md]

VLLM/bin/python is that of engines_vllm.py. METHOD is a quantization method by vLLM's name where the checkpoint is not
to be loaded by the one that vLLM chooses. Every model is loaded in a process of its own, one after the other, and all
of them again (A B A B), on one thread. The first model is the one that the others are compared with.

Times are processor time of the whole process, which other work on the machine disturbs less than the clock: per token
of decoding from the difference between many tokens and one, per token of a prompt of 512.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from engines_vllm import ENV, _machine, engine_version, plugin_path, write_between

START = "<!-- table of benchmarks/engines_vllm_speed.py -->"
END = "<!-- end of the table of benchmarks/engines_vllm_speed.py -->"
DECODED, PROMPT = 32, 512


def measure_here(folder: str, method: str | None) -> dict[str, Any]:
    """In vLLM's Python: load one checkpoint and time it."""
    import resource
    import time

    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        dtype="bfloat16",
        quantization=method,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=PROMPT + DECODED,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )

    def seconds(prompt: int, tokens: int) -> float:
        began = time.process_time()
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        engine.generate({"prompt_token_ids": list(range(1, prompt + 1))}, sampling, use_tqdm=False)
        return time.process_time() - began

    seconds(16, 4)
    one = min(seconds(16, 1) for _ in range(2))
    decode = min(seconds(16, DECODED + 1) - one for _ in range(2)) / DECODED
    prefill = min(seconds(PROMPT, 1) for _ in range(2)) / PROMPT
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    by = engine.llm_engine.vllm_config.model_config.quantization
    return {"by": by, "decode_ms": 1e3 * decode, "prefill_ms": 1e3 * prefill, "peak_mb": memory}


def measure(python: Path, name: str, where: str, scratch: Path) -> dict[str, Any]:
    """One load in a process of its own."""
    folder, _, method = where.partition(":")
    env = {**os.environ, **ENV, "PYTHONPATH": plugin_path(Path(tempfile.mkdtemp(dir=scratch)))}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "0"}
    command = [str(python), __file__, "--here", folder, method]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line]
        return {"name": name, "error": lines[-1][:300] if lines else f"exit code {done.returncode}"}
    return {"name": name, **json.loads(found[0].removeprefix("RESULT "))}


def table(result: dict[str, Any]) -> str:
    """Markdown: a row per model, the medians of its loads and what they are of the first model's."""
    rows, names = result["rows"], list(dict.fromkeys(row["name"] for row in result["rows"]))
    lines = [
        f"{result['date']}, {result['machine']} ({result['isa']}), load {result['load']}, "
        f"vllm-cpu {result['vllm-cpu']}. "
        f"One thread, BF16, eager; processor time, medians of {result['rounds']} loads each.",
        "",
        "| weights | method | decoding, ms per token | prompt of 512, ms per token | peak of memory, MB |",
        "|---|---|---|---|---|",
    ]
    first: dict[str, float] = {}
    for name in names:
        loads = [row for row in rows if row["name"] == name]
        if any("error" in row for row in loads):
            lines.append(f"| {name} | – | does not run | – | – |")
            continue
        found = {key: median(row[key] for row in loads) for key in ("decode_ms", "prefill_ms", "peak_mb")}
        first = first or found
        cells = [f"{found[key]:.{digits}f} ({first[key] / found[key]:.2f} ×)" for key, digits in
                 (("decode_ms", 1), ("prefill_ms", 2))]  # fmt: skip
        lines.append(f"| {name} | {loads[0]['by'] or 'unquantized'} | {' | '.join(cells)} | {found['peak_mb']:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--here"]:
        print("RESULT " + json.dumps(measure_here(sys.argv[2], sys.argv[3] or None)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER[:METHOD]")
    parser.add_argument("--python", type=Path, required=True, help="of the environment with vllm-cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()
    from halfbyte.kernels.linear import isa

    engine = engine_version(args.python)
    load, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(args.rounds):
            for model in args.models:
                rows.append(measure(args.python, *model.split("=", 1), Path(scratch)))
                print(json.dumps(rows[-1]), flush=True)
    result = {"date": datetime.date.today().isoformat(), "machine": _machine(), "isa": isa(), "load": round(load, 1)}
    result |= {"vllm-cpu": engine, "rounds": args.rounds, "rows": rows}
    print(table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.docs:
        write_between(args.docs, START, table(result), END)


if __name__ == "__main__":
    main()
