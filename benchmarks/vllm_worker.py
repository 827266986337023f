"""In vLLM's Python, for engines_vllm.py: checkpoints one after the other, their log-probabilities and drafters.

python benchmarks/vllm_worker.py JOBS.json NAME...
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def run(job: dict[str, Any], tokens: list[int], out: Path) -> dict[str, Any]:
    """Load one checkpoint and score the tokens; writes [tokens - 1, vocabulary] beside the result."""
    from vllm import LLM, SamplingParams

    began = time.monotonic()
    options: dict[str, Any] = {}
    if job["mtp"]:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": 1}
    engine = LLM(
        job["path"],
        dtype="bfloat16",
        quantization=job["quantization"],
        enforce_eager=True,
        max_model_len=len(tokens) + 8,
        max_num_seqs=2,
        max_logprobs=-1,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 0, "video": 0},
        **options,
    )
    found: dict[str, Any] = {"quantization": engine.llm_engine.vllm_config.model_config.quantization}
    if job["mtp"]:
        # drafting needs kernels that vLLM has on GPUs only, so it is loaded here and taken away again
        found["drafter"] = engine.collective_rpc(take_drafter)[0]
    scored = engine.generate(
        {"prompt_token_ids": tokens}, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1), use_tqdm=False
    )[0].prompt_logprobs[1:]
    rows = np.full((len(scored), max(max(row) for row in scored) + 1), -np.inf, np.float32)
    for row, entries in zip(rows, scored, strict=True):
        for token, entry in entries.items():
            row[token] = entry.logprob
    np.save(out / f"{job['name']}.npy", rows)
    return found | {"seconds": round(time.monotonic() - began, 1)}


def take_drafter(worker: Any) -> dict[str, str]:
    """sha256 of every parameter of the drafter, which then no longer takes part."""
    import torch

    runner = worker.model_runner
    parameters = dict(runner.drafter.model.named_parameters())
    found = {n: hashlib.sha256(p.data.contiguous().view(torch.uint8).numpy().tobytes()) for n, p in parameters.items()}
    runner.speculative_config = None
    return {name: digest.hexdigest() for name, digest in found.items()}


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    given = json.loads(Path(sys.argv[1]).read_text())
    out = Path(given["out"])
    for job in given["jobs"]:
        if job["name"] not in sys.argv[2:]:
            continue
        try:
            found = run(job, given["tokens"], out)
        except Exception as error:  # whatever vLLM says when it cannot load a checkpoint
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        (out / f"{job['name']}.json").write_text(json.dumps(found))
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
