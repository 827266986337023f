"""All measurements of speed and growth, and the tables of docs/benchmarks.md and docs/kernels.md that come from them.

    python benchmarks/run.py --engines DIR [--scratch DIR] [--big GB] [--parts kernels peers pipeline]
    python benchmarks/run.py --tables

The first form measures (kernels, other quantizers, whole conversions), writes benchmarks/results/*.json with machine,
versions and date, and then the tables; the second only writes the tables and plots from what the files hold. DIR
holds the virtual environments of the other quantizers (see peers.py). The scratch folder needs 1.6 times ``--big``
of room. Measure on a machine that does nothing else: the load at the start is noted in the results.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import kernels
import peers
import pipeline
import tables
from common import RESULTS, head, write_results

PARTS = ("kernels", "peers", "pipeline")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--engines", type=Path, help="folder of virtual environments with the other quantizers")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints (default: the system's temporary one)")
    parser.add_argument("--big", type=float, default=pipeline.SIZES[-1], help="largest checkpoint in GB (default 10)")
    parser.add_argument("--most", type=int, default=pipeline.COUNTS[-1], help="most tensors (default 100000)")
    parser.add_argument("--rows", type=int, default=kernels.K, help="rows of the kernels' matrices (default 4096)")
    parser.add_argument("--runs", type=int, default=3, help="runs of which the median is taken (default 3)")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write tables and plots")
    args = parser.parse_args()
    if not args.tables:
        if "peers" in args.parts and args.engines is None:
            parser.error("the part peers needs --engines DIR; or name the other parts with --parts")
        for part in args.parts:
            _measure(part, args)
    tables.write_all()


def _measure(part: str, args: argparse.Namespace) -> None:
    began = time.perf_counter()
    if part == "kernels":
        write_results(RESULTS / "kernels.json", kernels.run_all(args.rows, args.runs), "results")
    elif part == "peers":
        found = head() | {"matrices": peers.run_all(args.engines, args.runs)}
        write_results(RESULTS / "peers.json", found)
    else:
        found = pipeline.measure(args.scratch, args.big, args.runs, args.most)
        write_results(RESULTS / "pipeline.json", found)
    print(f"{part}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
