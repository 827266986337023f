"""Speed of products with weights that stay packed: milliseconds, beside torch's own products.

    python benchmarks/linear.py [--threads 1 2] [--rounds N] [-o benchmarks/results/linear.json]

A matrix of 4096x4096 is multiplied with 1, 4, 32 and 512 rows of BF16 activations; a mixture of 256 experts, of
1024x2048 and 2048x512, with 32 rows of 8 experts each. Every contender has several copies of its matrix, more than
the caches hold, and takes its turn in every round; a figure is the least time of all rounds: CPU time of the calling
thread where there is one, time on the clock where there are more. Peers: torch in BF16, in FP32, and with its INT4
weights (groups of 32) of ``_weight_int4pack_mm_for_cpu``. ``limit`` is the speed at which one thread reads memory, by
dot products of a long vector. Needs torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.nn.functional import linear as torch_linear

from common import RESULTS, head, write_results
from halfbyte.formats import QuantizedTensor
from halfbyte.kernels import linear
from halfbyte.kernels.linear import PackedDense, PackedExperts, PackedLinear, product_of
from halfbyte.search import encode

N = 4096
BATCHES = (1, 4, 32, 512)
FORMATS = ("mixfp4", "nvfp4", "mxfp4", "int4_g128")
EXPERTS, WIDTH, COLUMNS, TOKENS, SLOTS = 256, 512, 2048, 32, 8
Run = Callable[[torch.Tensor], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "linear.json")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    write_results(options.output, run_all(options.threads, options.rounds), "results")


@torch.no_grad()
def run_all(threads: Sequence[int], rounds: int) -> dict[str, Any]:
    """All figures, with the machine and the instruction set."""
    found = head("torch") | {"isa": linear.isa(), "unit": "ms", "limit_gb_per_s": round(read_limit(), 2)}
    torch.manual_seed(0)
    matrices, experts = contenders(), mixtures()
    results = []
    for count in threads:
        torch.set_num_threads(count)
        linear.set_threads(count)
        for batch in BATCHES:
            x = torch.randn(batch, N).bfloat16()
            times = race(matrices, x, count, rounds if batch < BATCHES[-1] else min(rounds, 3))
            results += [{"threads": count, "case": "matrix", "batch": batch, "who": w, "ms": t} for w, t in times]
        times = race(experts, torch.randn(TOKENS, COLUMNS).bfloat16(), count, rounds)
        results += [{"threads": count, "case": "experts", "batch": TOKENS, "who": w, "ms": t} for w, t in times]
    return found | {"bytes": sizes(), "results": results}


def race(runs: dict[str, list[Run]], x: torch.Tensor, threads: int, rounds: int) -> list[tuple[str, float]]:
    """The least milliseconds of each contender; all take turns."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for who, copies in runs.items():
            for run in copies:
                began = clock()
                run(x)
                best[who] = min(best[who], clock() - began)
    return [(who, round(1000 * seconds, 3)) for who, seconds in best.items()]


def contenders() -> dict[str, list[Run]]:
    """By name, the same product with several copies of a matrix."""
    w = torch.randn(N, N) * 0.02
    narrow = w.bfloat16()
    found: dict[str, list[Run]] = {}
    for name in FORMATS:
        packed = [PackedLinear(tensor_of(w, name)) for _ in range(5)]
        modes = ("int8", "exact") if name == FORMATS[0] else ("int8",)
        found |= {f"halfbyte {name} {mode}": [packed_run(p, mode) for p in packed] for mode in modes}
    wide, halves = [w.clone() for _ in range(2)], [narrow.clone() for _ in range(3)]
    found["halfbyte BF16"] = [packed_run(PackedDense(bf16_view(h)), "exact") for h in halves]
    found["torch BF16"] = [lambda x, h=h: torch_linear(x, h) for h in halves]
    found["torch FP32"] = [lambda x, v=v: torch_linear(x.float(), v) for v in wide]
    found["torch int4pack"] = [int4pack() for _ in range(5)]
    return found


def tensor_of(w: torch.Tensor, name: str) -> QuantizedTensor:
    """A weight rounded to a format."""
    return encode(np.ascontiguousarray(w.numpy()), name, "absmax")


def bf16_view(w: torch.Tensor) -> np.ndarray[Any, Any]:
    """A BF16 tensor's memory as an array."""
    return w.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def packed_run(packed: PackedLinear | PackedDense, mode: str) -> Run:
    """BF16 in, BF16 out, on the tensors' own memory."""

    def run(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(len(x), packed.n, dtype=torch.bfloat16)
        packed.run(product_of(x.data_ptr(), "bfloat16", len(x), y.data_ptr(), "bfloat16", packed.k, packed.n, mode))
        return y

    return run


def int4pack() -> Run:
    """Torch's product with INT4 weights in groups of 32."""
    codes = torch.randint(0, 16, (N, N), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.full((N // 32, N, 2), 0.01).bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales)


def mixtures() -> dict[str, list[Run]]:
    """By name, a mixture of experts with its routes."""
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(EXPERTS)[:SLOTS] for _ in range(TOKENS)])
    shares = np.full(chosen.shape, 1 / SLOTS, dtype=np.float32)
    up, down = (torch.randn(1, *shape) * 0.02 for shape in ((2 * WIDTH, COLUMNS), (COLUMNS, WIDTH)))
    packed = PackedExperts(*(tensor_of(w.expand(EXPERTS, -1, -1), FORMATS[0]) for w in (up, down)))
    dense = [w.bfloat16().repeat(EXPERTS, 1, 1) for w in (up, down)]

    def ours(mode: str) -> Run:
        return lambda x: packed(bf16_view(x), chosen, shares, mode, dtype=ml_dtypes.bfloat16)

    def grouped(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(TOKENS, COLUMNS, dtype=torch.bfloat16)
        for expert in np.unique(chosen):
            rows = torch.from_numpy(np.nonzero((chosen == expert).any(axis=1))[0])
            gate, linear_part = torch_linear(x[rows], dense[0][expert]).chunk(2, dim=-1)
            hidden = torch.nn.functional.silu(gate) * linear_part
            y.index_add_(0, rows, torch_linear(hidden, dense[1][expert]) / SLOTS)
        return y

    name = FORMATS[0]
    runs = {f"halfbyte {name} {mode}": [ours(mode)] for mode in ("int8", "exact")}
    return runs | {"torch BF16 by expert": [grouped]}


def sizes() -> dict[str, int]:
    """Bytes that a product with the matrix reads."""
    w = torch.zeros(N, N)
    found = {f"halfbyte {name} int8": PackedLinear(tensor_of(w, name)).nbytes for name in FORMATS}
    return found | {"halfbyte BF16": 2 * N * N}


def read_limit() -> float:
    """GB/s that one thread reads."""
    a, b = (np.ones(1 << 26, dtype=np.float32) for _ in range(2))
    times = []
    for _ in range(5):
        began = time.thread_time()
        np.dot(a, b)
        times.append(time.thread_time() - began)
    return 2 * a.nbytes / 1e9 / min(times)


if __name__ == "__main__":
    main()
