"""What the benchmarks share: the machine, results as JSON, tables between markers of a document."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, memory and system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cpu": cpu(), "cores": cores, "system": platform.platform()}
    if hasattr(os, "sysconf"):
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return found


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of packages, those that are not installed left out."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def head(*packages: str) -> dict[str, Any]:
    """What every result begins with."""
    loaded = [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None
    return {
        "machine": machine(),
        "versions": versions("halfbyte", "numpy", *packages),
        "date": datetime.date.today().isoformat(),
        "load_at_start": loaded,
    }


def write_results(path: Path, found: dict[str, Any], rows: str | None = None) -> None:
    """JSON, with the list ``rows`` one entry a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if rows is None:
        path.write_text(json.dumps(found, indent=1) + "\n")
        return
    lines = ",\n  ".join(json.dumps(entry) for entry in found[rows])
    rest = json.dumps({key: value for key, value in found.items() if key != rows}, indent=1)[:-2]
    path.write_text(f'{rest},\n "{rows}": [\n  {lines}\n ]\n}}\n')


def replace_part(document: Path, name: str, content: str) -> None:
    """Put ``content`` between the markers ``<!-- begin: name -->`` and ``<!-- end: name -->``."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = document.read_text().partition(begin)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise SystemExit(f"{document} lacks the markers of {name}")
    document.write_text(f"{before}{begin}\n{content}\n{end}{after}")
