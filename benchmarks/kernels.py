"""Speed of the kernels on one core: GB/s of BF16 weights, for every format and search on every instruction set.

    python benchmarks/kernels.py -o benchmarks/results/kernels.json

Matrices are 4096x4096 (``--rows`` for less), Gaussian and Student-t with 4 degrees of freedom. A figure is the median
over several runs of the CPU time of this process, the tensor's amax included. ``encode`` is BF16 to codes and scales,
``measured`` the same with the error statistics, ``weighted`` with importance weights; ``decode`` goes to BF16 and
``decode_fp32`` to FP32. The NumPy reference is timed on fewer rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import halfbyte
from halfbyte import kernels
from halfbyte.formats import get_format, list_formats
from halfbyte.kernels import ErrorStats
from halfbyte.search import SEARCHES, encode

K = 4096
REFERENCE_ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--rows", type=int, default=K)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--formats", nargs="*", default=list_formats())
    parser.add_argument("--isas", nargs="*", default=list(kernels.backends()))
    options = parser.parse_args()
    found = {
        "machine": {"cpu": cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"halfbyte": halfbyte.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
        "rows": options.rows,
        "unit": "GB/s of BF16 weights per core",
        "results": [],
    }
    print(f"{'format':23}{'search':21}{'matrix':10}{'isa':10}encode  measured  weighted  decode  decode_fp32")
    for isa in options.isas:
        for kind, x in matrices(options.rows if isa != "reference" else REFERENCE_ROWS).items():
            for name in options.formats:
                for search in searches(name, isa):
                    with kernels.use_backend(isa):
                        row = measure(x, name, search, options.runs)
                    result = {"isa": isa, "matrix": kind, "format": name, "search": search, **row}
                    found["results"].append(result)
                    figures = "  ".join(f"{row[c]:{len(c)}.3f}" for c in row)
                    print(f"{name:23}{search:21}{kind:10}{isa:10}{figures}", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n  ".join(json.dumps(result) for result in found.pop("results"))
        head = json.dumps(found, indent=1)[:-2]
        options.out.write_text(f'{head},\n "results": [\n  {lines}\n ]\n}}\n')


def searches(name: str, isa: str) -> list[str]:
    """The searches that apply to a format; the slow ones only where they end soon."""
    applicable = [s for s, search in SEARCHES.items() if search.problem(get_format(name)) is None]
    return [s for s in applicable if s != "exhaustive" or (isa == "avx512" and name in ("nvfp4", "mixfp4"))]


def matrices(rows: int) -> dict[str, NDArray[Any]]:
    """BF16 matrices of the size of real weights."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((rows, K), dtype=np.float32) * np.float32(0.02)
    heavy = (rng.standard_t(4, (rows, K)) * 0.02).astype(np.float32)
    return {"gaussian": normal.astype(ml_dtypes.bfloat16), "student_t": heavy.astype(ml_dtypes.bfloat16)}


def measure(x: NDArray[Any], name: str, search: str, runs: int) -> dict[str, float]:
    importance = np.random.default_rng(1).random(K).astype(np.float32)
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
    return {job: round(x.nbytes / 1e9 / seconds(run, runs), 4) for job, run in jobs.items()}


def seconds(run: Callable[[], Any], runs: int) -> float:
    """Median CPU time of this process."""
    run()
    times = []
    for _ in range(runs):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return statistics.median(times)


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
