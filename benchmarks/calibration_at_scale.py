"""A calibration, and a conversion with its Hessians, of a few layers with the shapes of a large model.

What ``calibration_cost.py --shapes NAME`` measures: a checkpoint with real names and shapes and random weights is made
in a scratch folder, and each run is a process of its own. Memory is VmHWM, the peak that the system counted.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from common import REPOSITORY
from real_models import run

sys.path.insert(0, str(REPOSITORY / "scripts"))
from make_synthetic_checkpoint import write

SAMPLES, LENGTH = 16, 512  # two batches
DEFAULT_TOKENS = 128 * 512
TOKENIZER = "qwen35moe-tiny-wiki"
RECIPE = "nvfp4-gptq"
KINDS = {
    "importance": {"hessians": False, "dtype": "float32"},
    "hessians": {"hessians": True, "dtype": "float32"},
    "hessians, bfloat16": {"hessians": True, "dtype": "bfloat16"},
}


def peak() -> int:
    """The most memory that this process ever had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def worker(model: str, out: str, text: str, kind: str) -> None:
    """One calibration in this process; a line "layer N" when one begins, "filled" when it is, and JSON in the end."""
    import torch
    import transformers

    from halfbyte.calibrate.collect import CollectOptions, collect_statistics
    from halfbyte.calibrate.layerwise import LayerwiseModel

    assert torch and transformers
    imports = peak()
    times: list[tuple[float, float]] = []
    filling: list[float] = []
    filled = LayerwiseModel.filled

    @contextlib.contextmanager
    def timed(self: Any, module: Any) -> Iterator[None]:
        began = time.process_time()
        with filled(self, module):
            filling.append(time.process_time() - began)
            print("filled", flush=True)
            yield

    def progress(done: int, total: int) -> None:
        times.append((time.perf_counter(), time.process_time()))
        print(f"layer {done}", flush=True)

    LayerwiseModel.filled = timed  # type: ignore[method-assign]
    collect_statistics(model, out, [text], CollectOptions(SAMPLES, LENGTH, **KINDS[kind]), progress)
    layers = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(times[:-1])]
    found = {"bytes": peak() - imports, "imports_bytes": imports, "wall_seconds": [s for s, _ in layers]}
    # the last part that is filled is the final norm
    print(json.dumps({**found, "cpu_seconds": [s for _, s in layers], "filling_cpu_seconds": filling[: len(layers)]}))


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def calibrated(model: Path, out: Path, text: Path, kind: str) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    told, _ = (process := start(model, out, text, kind)).communicate()
    if process.returncode:
        raise SystemExit(f"the calibration {kind} failed")
    size = sum(path.stat().st_size for path in out.iterdir())
    return {"kind": kind, **json.loads(told.strip().splitlines()[-1]), "statistics_bytes": size}


def killed(model: Path, out: Path, text: Path, kind: str, layer: int) -> dict[str, Any]:
    """A calibration that is killed in the second batch of a layer, and run again; what both runs did."""
    shutil.rmtree(out, ignore_errors=True)
    process = start(model, out, text, kind)
    assert process.stdout is not None
    for awaited in (f"layer {layer}", "filled"):
        while (line := process.stdout.readline()) and line.strip() != awaited:
            pass
    states, filled = out / "work" / f"states-{(layer + 1) % 2}.f32", time.time()
    while process.poll() is None and states.stat().st_mtime < filled:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    code, done = process.wait(), json.loads((out / "statistics.json").read_text())["done"]
    told, _ = (process := start(model, out, text, kind)).communicate()
    again = [int(line.split()[1]) for line in told.splitlines() if line.startswith("layer ")]
    return {"exit_code": code, "layers_done": done, "resumed_with": again[0], "exit_code_resumed": process.returncode}


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, bit for bit."""
    names = [sorted(p.name for p in folder.iterdir()) for folder in (one, other)]
    return names[0] == names[1] and all(filecmp.cmp(one / n, other / n, shallow=False) for n in names[0])


def converted(model: Path, out: Path, statistics: Path, scratch: Path) -> dict[str, Any]:
    """``halfbyte quantize`` with Hessians, and ``halfbyte verify``."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    done = run(scratch, "quantize", str(model), str(out), "--recipe", RECIPE, "--calibration", str(statistics))
    seconds = time.perf_counter() - began
    if done["exit_code"]:
        raise SystemExit(f"the conversion failed: {done['error']}")
    verified = run(scratch, "verify", str(out), "--against", str(model))
    shutil.rmtree(out)
    return {
        "recipe": RECIPE,
        "bytes": done["peak_bytes"],
        "stated_bytes": done["document"]["memory_bytes"],
        "wall_seconds": seconds,
        "cpu_seconds": done["cpu_seconds"],
        "verify_exit_code": verified["exit_code"],
    }


def at_scale(inventory: Path, layers: int, scratch: Path, data: Path, text: Path) -> dict[str, Any]:
    """All measurements with ``layers`` layers of a model; needs space for them, a copy in 4 bit and statistics."""
    scratch.mkdir(parents=True, exist_ok=True)
    model, one, other = scratch / "model", scratch / "statistics", scratch / "again"
    if not model.exists():
        write(inventory, model, layers)
    for path in (data / "models" / TOKENIZER).glob("*token*"):
        shutil.copy(path, model)
    config = json.loads(inventory.read_text())["config"]
    every = config.get("text_config", config)["num_hidden_layers"]
    found: dict[str, Any] = {"inventory": inventory.stem, "layers": layers, "all_layers": every}
    found |= {"samples": SAMPLES, "length": LENGTH}
    found["calibrations"] = []
    for kind in KINDS:
        found["calibrations"].append(calibrated(model, other if kind != "hessians" else one, text, kind))
        print(found["calibrations"][-1], flush=True)
    found["killed"] = killed(model, other, text, "hessians", 2)
    assert found["killed"]["exit_code"] == -signal.SIGKILL and found["killed"]["layers_done"] == 2
    found["killed"]["same_bytes"] = same(one, other)
    print(found["killed"], flush=True)
    shutil.rmtree(other)
    found["conversion"] = converted(model, scratch / "out", one, scratch)
    print(found["conversion"], flush=True)
    return found


def table(estimates: list[dict[str, Any]], measured: dict[str, Any]) -> list[str]:
    """Lines of the documentation: sizes that follow from shapes, and what was measured with these shapes."""
    lines = [
        "Shapes of large models. A formula gives, from their headers, the weights of the largest layer (FP32, experts "
        "as in the checkpoint), its Hessians, and the disk space. Peaks above that of the imports "
        f"({', '.join(sorted({_gib(c['imports_bytes']) for m in measured.values() for c in m['calibrations']}))} GiB) "
        "were measured with the stated number of layers of these shapes and random weights. All sizes are in GiB.",
        "",
        "| | weights | Hessians | measured with | importance | Hessians | Hessians, BF16 | states on disk, 128 × 512 "
        "tokens | statistics |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for e in estimates:
        found = measured.get(e["inventory"])
        cells = ["–"] * (1 + len(KINDS))
        if found:
            cells = [f"{found['layers']} layers, {found['samples']} × {found['length']} tokens"]
            cells += [_gib(c["bytes"]) for c in found["calibrations"]]
        sizes = [_gib(e[key]) for key in ("layer_weights", "hessians", "states_on_disk", "statistics_on_disk")]
        lines.append(f"| {e['inventory']} | " + " | ".join([*sizes[:2], *cells, *sizes[2:]]) + " |")
    largest = max(estimates, key=lambda e: e["layer_weights"])["inventory"]
    return [*lines, "", *_told(measured[largest])] if largest in measured else lines


def _told(found: dict[str, Any]) -> list[str]:
    """What was measured of one model, in words."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    told = [
        f"`{found['inventory']}`: {found['date']}, {found['machine']['cpu']}, {found['machine']['cores']} cores with "
        f"other work running (load {found['load_at_start'][0]}), {versions}. Processor time includes threads that wait "
        "for each other while other work keeps the cores busy, so it is an upper bound.",
        "",
    ]
    passes = DEFAULT_TOKENS / (found["samples"] * found["length"])
    for c in found["calibrations"]:
        each, fill = (median(c[key]) for key in ("cpu_seconds", "filling_cpu_seconds"))
        whole = fill + passes * (each - fill)
        told.append(
            f"- {c['kind']}: {each:.0f} s per layer (median), of which {fill:.1f} s fill it. This gives "
            f"{whole / 60:.0f} minutes per layer and {whole * found['all_layers'] / 3600:.1f} hours for all "
            f"{found['all_layers']} with the default 128 × 512 tokens."
        )
    k, q = found["killed"], found["conversion"]
    told.append(
        "- Killed (`kill -9`) in the second batch of the third layer, the run continued with layer "
        f"{k['resumed_with'] + 1} and gave {'the same' if k['same_bytes'] else 'NOT the same'} bytes as without "
        "interruption."
    )
    layer = q["cpu_seconds"] / found["layers"]
    told.append(
        f"- `halfbyte quantize --recipe {q['recipe']}` with these statistics: {_gib(q['bytes'])} GiB at the peak, "
        f"{_gib(q['stated_bytes'])} GiB stated by the plan; {q['cpu_seconds'] / 60:.0f} minutes, {layer:.0f} s per "
        f"layer (including weights outside of layers), so about {layer * found['all_layers'] / 3600:.1f} hours for "
        f"{found['all_layers']}. `halfbyte verify` "
        f"{'reported no problem' if q['verify_exit_code'] == 0 else 'FAILED'}."
    )
    return told


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


if __name__ == "__main__":
    worker(*sys.argv[1:])
