"""Relative squared error of every format and search on two frozen streams, for docs/formats.md.

    python benchmarks/formats.py [-o benchmarks/results/formats.json] [--docs docs/formats.md]

The streams are ``numpy.random.RandomState(0)``: ``.standard_normal((1024, 512))`` and ``.laplace`` of that size, as
FP32. The table between the markers in the document is written anew. Takes a minute on one core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte import __version__
from halfbyte.formats import get_format, list_formats
from halfbyte.search import SEARCHES, encode

REPOSITORY = Path(__file__).resolve().parent.parent
BETWEEN = {"four_over_six": "4/6", "mx_even": "even", "mx_rceil": "rceil"}
# 251 scales a block take long; these show how near the sweep comes
EXHAUSTIVE = ("nvfp4", "mixfp4", "razer")
START, END = "<!-- table of benchmarks/formats.py -->", "<!-- end of table -->"


def streams() -> dict[str, Any]:
    return {
        "gaussian": np.random.RandomState(0).standard_normal((1024, 512)).astype(np.float32),
        "laplace": np.random.RandomState(0).laplace(size=(1024, 512)).astype(np.float32),
    }


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.+)", info.read_text())):
        cpu = found.group(1)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "system": platform.platform(terse=True),
        "versions": {
            "halfbyte": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "ml_dtypes": version("ml_dtypes"),
        },
    }


def measure() -> list[dict[str, Any]]:
    """One entry per format and search: bits per weight, error and share of each table on each stream."""
    inputs, found = streams(), []
    for name in list_formats():
        fmt = get_format(name)
        for search in SEARCHES:
            if SEARCHES[search].problem(fmt) or (search == "exhaustive" and name not in EXHAUSTIVE):
                continue
            entry: dict[str, Any] = {"format": name, "search": search}
            for stream, x in inputs.items():
                q = encode(x, fmt, search)
                wide = x.astype(np.float64)
                entry[stream] = float(f"{((q.decode() - wide) ** 2).mean() / (wide**2).mean():.4g}")
                entry[f"{stream}_tables"] = [
                    round(float(share), 4) for share in np.bincount(q.tables.reshape(-1)) / q.tables.size
                ]
            entry["bits_per_weight"] = round(8 * fmt.nbytes((4096, 4096)) / 4096**2, 4)
            found.append(entry)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: Gaussian / Laplace errors in thousandths, by bits and then error; equal rows are joined."""
    cells = {(e["format"], e["search"]): e for e in results}
    names = dict.fromkeys(e["format"] for e in results)
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(names, key=lambda n: (cells[n, "absmax"]["bits_per_weight"], -cells[n, "sweep"]["gaussian"])):
        others = [f"{label} {_pair(cells[name, s])}" for s, label in BETWEEN.items() if (name, s) in cells]
        values = [_pair(cells[name, "absmax"]), "; ".join(others), _pair(cells[name, "sweep"])]
        rows.setdefault((f"{cells[name, 'absmax']['bits_per_weight']:.4g}", *values), []).append(f"`{name}`")
    lines = ["| bits | format | absmax | other rules | sweep |", "|---|---|---|---|---|"]
    lines += [f"| {key[0]} | {', '.join(found)} | {' | '.join(key[1:])} |" for key, found in rows.items()]
    return "\n".join(lines)


def _pair(entry: dict[str, Any]) -> str:
    return f"{1000 * entry['gaussian']:#.4g} / {1000 * entry['laplace']:#.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "formats.json")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs" / "formats.md")
    arguments = parser.parse_args()
    results = measure()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({**machine(), "results": results}, indent=1) + "\n")
    text = arguments.docs.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    arguments.docs.write_text(f"{before}{START}\n{table(results)}\n{END}{after}")
    print(table(results))


if __name__ == "__main__":
    main()
