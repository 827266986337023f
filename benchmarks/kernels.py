"""Speed of the kernels on one core: GB/s of BF16 weights, for every format and search.

    python benchmarks/kernels.py [--rows N] [--runs N] [-o benchmarks/results/kernels.json]

Matrices are 4096x4096, Gaussian and Student-t with 4 degrees of freedom, and a stack of 16 experts of 1024x2048. The
formats of the table in docs/kernels.md are measured on all of them and on every instruction set, the others on the
Gaussian matrix with the fastest one. A figure is the median over several runs of the CPU time of this process, the
tensor's amax included. ``encode`` is BF16 to codes and scales, ``measured`` the same with the error statistics,
``weighted`` with importance weights; ``decode`` goes to BF16 and ``decode_fp32`` to FP32. The NumPy reference is
timed on fewer rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from common import RESULTS, head, write_results
from halfbyte import kernels
from halfbyte.formats import get_format, list_formats
from halfbyte.kernels import ErrorStats
from halfbyte.search import SEARCHES, encode, get_search

K = 4096
REFERENCE_ROWS = 64


# the rows of the table in docs/kernels.md
TABLE = {
    "nvfp4": ("absmax", "four_over_six", "sweep"),
    "mxfp4": ("absmax", "sweep"),
    "mxfp4_hadamard": ("sweep",),
    "mixfp4": ("absmax", "four_over_six", "sweep", "exhaustive"),
    "if4": ("sweep",),
    "razer": ("sweep",),
    "iq4_nl": ("sweep",),
    "int4_g128": ("absmax", "sweep"),
    "int4_asym_g128": ("sweep",),
    "affine4_g64": ("sweep",),
    "hif4": ("sweep",),
    "fp8_channel": ("absmax", "sweep"),
    "fp8_block128": ("sweep",),
    "mxfp8": ("sweep",),
}
# seconds that the runs of one figure take together, about
ENOUGH = 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--rows", type=int, default=K)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    write_results(options.output, run_all(options.rows, options.runs), "results")


def run_all(rows: int, runs: int) -> dict[str, Any]:
    """All figures, with the machine."""
    found = head("ml_dtypes") | {"rows": rows, "unit": "GB/s of BF16 weights per core"}
    results = []
    for isa in kernels.backends():
        for kind, x in matrices(rows if isa != "reference" else REFERENCE_ROWS).items():
            first = isa == kernels.backends()[0] and kind == "gaussian"
            for name in list_formats() if first else TABLE:
                for search in searches(name, isa):
                    if not first and search not in TABLE[name]:
                        continue
                    with kernels.use_backend(isa):
                        if isa != "reference" and not kernels.supports(get_format(name), get_search(search)):
                            continue  # NumPy's work, which the reference's own rows show
                        row = measure(x, name, search, runs)
                    results.append({"isa": isa, "matrix": kind, "format": name, "search": search, **row})
    return found | {"results": results}


def searches(name: str, isa: str) -> list[str]:
    """The searches that apply to a format; the slow ones only where they end soon."""
    applicable = [s for s, search in SEARCHES.items() if search.problem(get_format(name)) is None]
    return [s for s in applicable if s != "exhaustive" or (isa == "avx512" and name in ("nvfp4", "mixfp4"))]


def matrices(rows: int) -> dict[str, NDArray[Any]]:
    """BF16 matrices of the size of real weights."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((rows, K), dtype=np.float32) * np.float32(0.02)
    heavy = (rng.standard_t(4, (rows, K)) * 0.02).astype(np.float32)
    experts = max(1, rows * K // (1024 * 2048) * 2)
    stack = np.resize(heavy.astype(ml_dtypes.bfloat16), (experts, 1024, 2048))
    found = {"gaussian": normal.astype(ml_dtypes.bfloat16), "student_t": heavy.astype(ml_dtypes.bfloat16)}
    return found | ({"experts": stack} if rows > REFERENCE_ROWS else {})


def measure(x: NDArray[Any], name: str, search: str, runs: int) -> dict[str, float]:
    importance = np.random.default_rng(1).random(x.shape[-1]).astype(np.float32)
    tensor = encode(x, name, search)
    narrow, wide = np.empty(x.shape, dtype=ml_dtypes.bfloat16), np.empty(x.shape, dtype=np.float32)

    def decode(out: NDArray[Any]) -> None:
        if not kernels.decode_into(tensor, out):
            out[...] = tensor.format.decode(tensor)

    jobs: dict[str, Callable[[], Any]] = {
        "encode": lambda: encode(x, name, search),
        "measured": lambda: encode(x, name, search, stats=ErrorStats()),
        "weighted": lambda: encode(x, name, search, importance),
        "decode": lambda: decode(narrow),
        "decode_fp32": lambda: decode(wide),
    }
    if getattr(get_format(name), "rotation", None):
        del jobs["weighted"]  # columns are mixed
    return {job: round(x.nbytes / 1e9 / seconds(run, runs), 4) for job, run in jobs.items()}


def seconds(run: Callable[[], Any], runs: int) -> float:
    """Median CPU time of this process."""
    run()
    times = []
    for _ in range(runs):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
        if sum(times) > ENOUGH:
            break
    return statistics.median(times)


if __name__ == "__main__":
    main()
