"""The tables and plots of docs/benchmarks.md and docs/kernels.md from the results of the benchmarks.

Used by ``benchmarks/run.py --tables``; needs matplotlib (``pip install halfbyte[bench]``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import REPOSITORY, RESULTS, replace_part
from kernels import TABLE

BENCHMARKS = REPOSITORY / "docs" / "benchmarks.md"
KERNELS = REPOSITORY / "docs" / "kernels.md"
IMAGES = REPOSITORY / "docs" / "images"
ISAS = ("avx512", "avx2", "baseline")
# which of halfbyte's rows a peer's row is compared with
SAME = {
    "nvfp4": "halfbyte nvfp4 absmax",
    "mxfp4": "halfbyte mxfp4 absmax",
    "four_over_six": "halfbyte nvfp4 four_over_six",
    "if4": "halfbyte if4 absmax",
    "int4_g128": "halfbyte int4_g128 absmax",
    "affine": "halfbyte affine4_g64 absmax",
}


def write_all(results: Path = RESULTS) -> None:
    """Every table whose results are there."""
    parts: dict[str, Callable[[dict[str, Any]], None]] = {
        "kernels": _kernels,
        "linear": _linear,
        "peers": _peers,
        "pipeline": _pipeline,
    }
    for name, part in parts.items():
        path = results / f"{name}.json"
        if path.exists():
            part(json.loads(path.read_text()))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _where(found: dict[str, Any], loads: bool = True) -> str:
    machine, versions = found["machine"], found["versions"]
    text = f"{machine['cpu']}, {machine['cores']} cores"
    text += f", {machine['memory_gib']} GiB" if "memory_gib" in machine else ""
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    text = f"{text}, {machine['system']}; {packages}; {found['date']}"
    load = (found.get("load_at_start") or [0])[0]
    if loads and load > 1:
        text += f", machine load in the minute before: {load:.1f}"
    return text


def _kernels(found: dict[str, Any]) -> None:
    cells = {(r["isa"], r["matrix"], r["format"], r["search"]): r for r in found["results"]}
    rows = []
    for name, searches in TABLE.items():
        for search in searches:
            of = {isa: cells.get((isa, "gaussian", name, search)) for isa in (*ISAS, "reference")}
            if of["avx512"] is None and of["avx2"] is None and of["baseline"] is None:
                continue
            decode = ", ".join(_figure(of[isa], "decode") for isa in ISAS)
            fast = next(r for isa in ISAS if (r := of[isa]))
            speeds = [_figure(of[isa], "encode") for isa in (*ISAS[1:], "reference")]
            kinds = [
                _figure(cells.get((fast["isa"], kind, name, search)), "encode") for kind in ("student_t", "experts")
            ]
            first = [_figure(of["avx512"], "encode"), *kinds, _figure(fast, "measured"), _figure(fast, "weighted")]
            rows.append((f"`{name}`, {search}", *first, *speeds, decode))
    head = (
        "format, search",
        "AVX-512",
        "Student-t",
        "experts",
        "with statistics",
        "with importance",
        "AVX2",
        "baseline",
        "NumPy",
        "decode to BF16: AVX-512, AVX2, baseline",
    )
    replace_part(KERNELS, "speed", f"{_table(head, rows)}\n\nMeasured on {_where(found)}.")


def _figure(row: dict[str, Any] | None, key: str) -> str:
    if row is None or key not in row:
        return "–"
    value = row[key]
    return f"{value:.2f}" if value >= 0.095 else f"{value:.3f}"


def _linear(found: dict[str, Any]) -> None:
    """Milliseconds by contender and batch, and how much of the read limit a product with one row reaches."""
    columns = [(case, batch) for case, batch in dict.fromkeys((r["case"], r["batch"]) for r in found["results"])]
    parts = []
    for threads in dict.fromkeys(r["threads"] for r in found["results"]):
        cells = {(r["who"], r["case"], r["batch"]): r["ms"] for r in found["results"] if r["threads"] == threads}
        rows = []
        for who in dict.fromkeys(who for who, _, _ in cells):
            times = [cells.get((who, *column)) for column in columns]
            cold = f"{found['bytes'][who] / 1e6 / times[0]:.1f}" if who in found["bytes"] and times[0] else "–"
            rows.append((who, *("–" if t is None else f"{t:.2f}" for t in times), cold))
        names = [f"{batch} row{'s' * (batch > 1)}" if case == "matrix" else "experts" for case, batch in columns]
        clock = "one thread, CPU time" if threads == 1 else f"{threads} threads, time on the clock"
        parts.append(f"{_table((f'ms, {clock}', *names, 'GB/s at 1 row'), rows)}")
    limit = f"One thread reads memory with {found['limit_gb_per_s']:.1f} GB/s here."
    text = "\n\n".join(parts)
    replace_part(BENCHMARKS, "linear", f"{text}\n\n{limit} Measured on {_where(found)}, with `{found['isa']}`.")


def _peers(found: dict[str, Any]) -> None:
    by_matrix = found["matrices"]
    ours = {kind: by_matrix[kind]["halfbyte"]["rows"] for kind in by_matrix}
    packages: dict[str, str] = {}
    rows = []
    for engine, result in by_matrix["gaussian"].items():
        packages |= result["versions"]
        for name, row in result["rows"].items():
            if "error" in row:
                rows.append((name, "failed", "", row["error"].replace("|", "/")[:80]))
                continue
            other = by_matrix["student_t"].get(engine, {}).get("rows", {}).get(name, {})
            same = SAME.get(name.split()[-1]) if engine != "halfbyte" else None
            ratio = f"{ours['gaussian'][same]['gb_per_s'] / row['gb_per_s']:.0f}x" if same in ours["gaussian"] else ""
            rows.append((name, f"{row['gb_per_s']:.3f}", f"{other.get('gb_per_s', 0):.3f}", ratio))
    head = ("quantizer", "Gaussian, GB/s", "Student-t, GB/s", "speedup of halfbyte")
    told = ", ".join(f"{name} {number}" for name, number in packages.items() if name not in found["versions"])
    replace_part(BENCHMARKS, "peers", f"{_table(head, rows)}\n\nMeasured on {_where(found)}; {told}.")


def _pipeline(found: dict[str, Any]) -> None:
    rows = []
    for r in found["sizes"]:
        size = r["bytes"] / 1e9
        rows.append(
            (
                f"{size:.1f} GB",
                f"`{r['recipe']}`",
                f"{r['seconds']:.1f} s",
                f"{r['convert_seconds']:.1f} s",
                f"{size / r['convert_seconds']:.2f}",
                f"{size / r['copy_seconds']:.2f}",
                f"{size / r['encode_seconds']:.2f}",
                f"{100 * r['of_limit']:.0f} %",
                f"{r['peak_bytes'] / 1e6:.0f} MB",
                f"{r['stated_bytes'] / 1e6:.0f} MB",
            )
        )
    head = (
        "source",
        "recipe",
        "command",
        "conversion",
        "conversion, GB/s",
        "plain copy, GB/s",
        "encoder, GB/s",
        "share of the slower limit",
        "peak memory",
        "stated by the plan",
    )
    largest = max(r["bytes"] for r in found["sizes"])
    said = [
        f"`{r['recipe']}` {found['whole_bytes'] / r['bytes'] * r['convert_seconds']:.0f} s"
        for r in found["sizes"]
        if r["bytes"] == largest
    ]
    whole = (
        f"Extrapolated linearly from {largest / 1e9:.1f} GB to the {found['whole_bytes'] / 1e9:.1f} GB of "
        f"Qwen3.6-35B-A3B, which was not converted: {', '.join(said)}."
    )
    told = f"Measured on {_where(found)}, {found['threads']} threads, medians of {found['sizes'][0]['runs']} runs."
    replace_part(BENCHMARKS, "sizes", f"{_table(head, rows)}\n\n{whole}\n\n{told}")
    rows = [
        (
            f"{r['tensors']:,}",
            r["kind"],
            f"{r['seconds']:.2f} s",
            f"{r['convert_seconds']:.2f} s",
            f"{_per_tensor(r, found['counts']):.3f} ms",
            f"{r['cpu_seconds']:.2f} s",
            f"{r['peak_bytes'] / 1e6:.0f} MB",
            f"{r['stated_bytes'] / 1e6:.0f} MB",
        )
        for r in found["counts"]
    ]
    head = (
        "tensors",
        "of",
        "command",
        "conversion",
        "command, per additional tensor",
        "CPU",
        "peak memory",
        "stated by the plan",
    )
    replace_part(BENCHMARKS, "counts", _table(head, rows))
    _plots(found)


def _per_tensor(row: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """Milliseconds of the command per tensor beyond those of the smallest checkpoint of this kind."""
    first = next(r for r in rows if r["kind"] == row["kind"])
    if first is row:
        return 1000 * row["convert_seconds"] / row["tensors"]
    return 1000 * (row["seconds"] - first["seconds"]) / (row["tensors"] - first["tensors"])


def _plots(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("svg")
    # the same results give the same file
    matplotlib.rcParams["svg.hashsalt"] = "halfbyte"
    from matplotlib import pyplot

    IMAGES.mkdir(parents=True, exist_ok=True)
    series = [
        ("growth-size", "sizes", "recipe", "bytes", 1e9, "GB of source"),
        ("growth-count", "counts", "kind", "tensors", 1, "tensors"),
    ]
    for name, part, kind, along, unit, label in series:
        figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for which in dict.fromkeys(r[kind] for r in found[part]):
            rows = [r for r in found[part] if r[kind] == which]
            x = [r[along] / unit for r in rows]
            time.plot(x, [r["seconds"] for r in rows], marker="o", label=which)
            memory.plot(x, [r["peak_bytes"] / 1e6 for r in rows], marker="o", label=which)
        for axes, what in ((time, "seconds"), (memory, "peak memory, MB")):
            axes.set(xlabel=label, ylabel=what, xscale="log")
            axes.set_ylim(bottom=0) if axes is memory else axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)
