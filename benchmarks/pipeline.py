"""Time and memory of whole conversions: against disk and encoder, against size, against the number of tensors.

    python benchmarks/pipeline.py [--big GB] [--runs N] [--scratch DIR] [-o benchmarks/results/pipeline.json]

Converts mixture-of-experts checkpoints with the shape of a part of Qwen3.6-35B-A3B (fused stacks of 256 experts of
2048x512; BF16, Student-t values from a repeated tile) with ``halfbyte quantize`` in a process of its own. Beside each
conversion, in the same run and alternating with it, stands a plain copy: the source read in order, as many bytes as
the output has written, then flushed. What is read is dropped from the page cache before each run, and by both sides
on the way. ``encode`` is the speed of the encoder on slices in memory, on as many threads as there are cores.
A file of the output's size and the output need room beside the source: 1.6 times ``--big``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from common import RESULTS, head, write_results
from halfbyte.checkpoint import ShardWriter, build_header, numpy_dtype
from halfbyte.kernels import ErrorStats
from halfbyte.plan.build import make_plan
from halfbyte.plan.resources import SLICE_BYTES, Limits, cores
from halfbyte.search import encode
from halfbyte.source.checkpoint import Checkpoint

HIDDEN, INTERMEDIATE, EXPERTS = 2048, 512, 256
RECIPES = ("nvfp4-absmax", "nvfp4", "mixfp4")
SIZES = (0.1, 0.3, 1, 3, 10)
COUNTS = (100, 1_000, 10_000, 100_000)
# bytes of the tensors of Qwen3.6-35B-A3B, for the extrapolation
WHOLE = 71_903_645_408
MEASURED = """
import sys
from halfbyte.cli import main
code = main(sys.argv[2:])
open(sys.argv[1], "w").write(open("/proc/self/status").read())
sys.exit(code)
"""


def tile(nbytes: int = 1 << 26) -> np.ndarray[Any, Any]:
    """BF16 bits of heavy-tailed values."""
    values = np.random.default_rng(1).standard_t(4, nbytes // 2).astype(np.float32) * np.float32(0.02)
    return np.ascontiguousarray(values.astype(numpy_dtype("BF16")).view(np.uint16))


def write(folder: Path, tensors: dict[str, list[int]], config: dict[str, Any], shard: int = 4 << 30) -> int:
    """A checkpoint of BF16 tensors cut from the tile; returns its bytes."""
    source = tile()
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in tensors.items():
        nbytes = 2 * int(np.prod(shape))
        if shards[-1] and size + nbytes > shard:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    index, total = {}, 0
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        layout = build_header([(n, "BF16", tensors[n]) for n in names])
        with ShardWriter(folder / file, layout) as writer:
            for name, offset in zip(names, layout.offsets, strict=True):
                left, start = 2 * int(np.prod(tensors[name])), (7919 * total) % (source.size // 2)
                while left:
                    part = source[start : start + left // 2]
                    writer.write_at(offset, part)
                    offset, left, start = offset + part.nbytes, left - part.nbytes, 0
                index[name] = file
                total += 2 * int(np.prod(tensors[name]))
            writer.commit()
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(config))
    return total


def experts_model(folder: Path, gigabytes: float) -> int:
    """Fused expert layers of about this many GB."""
    count = max(8, round(gigabytes * 1e9 / (3 * HIDDEN * INTERMEDIATE * 2)))
    layers = max(1, -(-count // EXPERTS))
    experts = -(-count // layers)
    config = {
        "model_type": "qwen3_5_moe_text",
        "num_experts": experts,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
    }
    tensors = {}
    for layer in range(layers):
        base = f"model.layers.{layer}.mlp"
        tensors[f"{base}.experts.gate_up_proj"] = [experts, 2 * INTERMEDIATE, HIDDEN]
        tensors[f"{base}.experts.down_proj"] = [experts, HIDDEN, INTERMEDIATE]
        tensors[f"{base}.gate.weight"] = [experts, HIDDEN]
    return write(folder, tensors, config)


def many_tensors(folder: Path, count: int) -> int:
    """Small experts, one tensor per projection, ``count`` tensors in all."""
    experts = min(EXPERTS, max(2, count // 12))
    layers = max(1, count // (3 * experts))
    config = {"model_type": "qwen3_moe", "num_experts": experts, "hidden_size": 64, "num_hidden_layers": layers}
    tensors = {}
    for layer in range(layers):
        for expert in range(experts):
            base = f"model.layers.{layer}.mlp.experts.{expert}"
            tensors[f"{base}.gate_proj.weight"] = [32, 64]
            tensors[f"{base}.up_proj.weight"] = [32, 64]
            tensors[f"{base}.down_proj.weight"] = [64, 32]
    write(folder, tensors, config)
    return len(tensors)


def many_matrices(folder: Path, count: int) -> int:
    """Small dense layers, seven matrices each, ``count`` tensors in all: every one is a weight of its own."""
    shapes = {
        **{f"self_attn.{name}_proj": [64, 64] for name in "qkvo"},
        **{f"mlp.{name}_proj": [64, 64] for name in ("gate", "up", "down")},
    }
    layers = max(1, count // len(shapes))
    config = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": layers}
    tensors = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in shapes.items()}
    write(folder, tensors, config)
    return len(tensors)


def forget(folder: Path) -> None:
    """Drop the folder's pages from the cache, so that reading means the disk."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def plain_copy(source: Path, out_bytes: int, scratch: Path) -> float:
    """Seconds to read the source in order and write and flush ``out_bytes`` bytes, one after the other."""
    forget(source)
    total = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    buffer = bytearray(SLICE_BYTES)
    written = done = 0
    target = scratch / "copy.bin"
    began = time.perf_counter()
    with target.open("wb", buffering=0) as out:
        for path in sorted(source.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                place = 0
                while n := file.readinto(buffer):
                    os.posix_fadvise(file.fileno(), place, n, os.POSIX_FADV_DONTNEED)
                    place, done = place + n, done + n
                    due = min(out_bytes, done * out_bytes // total) - written
                    written += out.write(memoryview(buffer)[:due])
                    os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.fsync(out.fileno())
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def convert(source: Path, scratch: Path, recipe: str, dialect: str) -> dict[str, Any]:
    """One ``halfbyte quantize``: seconds of the command and of the conversion, CPU, memory, output bytes."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    forget(source)
    # the kernel's maximum survives exec and would be this process's, so the child reports its own
    status_file = scratch / "status"
    command = [sys.executable, "-c", MEASURED, str(status_file), "quantize", str(source), str(out)]
    command += ["--recipe", recipe, "--dialect", dialect, "--json"]
    began = time.perf_counter()
    with (scratch / "told.json").open("w") as told:
        process = subprocess.Popen(command, stdout=told)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    document = json.loads((scratch / "told.json").read_text())
    peak = next(line for line in status_file.read_text().splitlines() if line.startswith("VmHWM"))
    shutil.rmtree(out)
    return {
        "seconds": seconds,
        "convert_seconds": document["seconds"],
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": int(peak.split()[1]) * 1024,
        "stated_bytes": document["memory_bytes"],
        "out_bytes": sum(shard["bytes"] for shard in document["shards"]),
    }


def encode_speed(recipe: str, source: Path, seconds: float = 1.0) -> float:
    """Bytes of BF16 per second that all cores together encode, errors measured, from slices in memory."""
    item = next(i for i in make_plan(Checkpoint.open(source), recipe).items if i.format)
    assert item.format is not None
    fmt, threads = item.format, Limits().threads
    x = tile(SLICE_BYTES).view(numpy_dtype("BF16")).reshape(-1, 2 * INTERMEDIATE, HIDDEN)
    done = [0] * threads
    until = time.perf_counter() + seconds

    def work(k: int) -> None:
        while time.perf_counter() < until:
            encode(x, fmt, item.search, stats=ErrorStats())
            done[k] += x.nbytes

    workers = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - began)


def sizes(scratch: Path, big: float, runs: int) -> list[dict[str, Any]]:
    """Conversions of growing size, each with its plain copy; medians."""
    rows = []
    for size in (s for s in SIZES if s <= big):
        source = scratch / "source"
        source.mkdir()
        total = experts_model(source, size)
        for recipe in RECIPES:
            speeds, copies, found = [], [], []
            for _ in range(runs):
                speeds.append(encode_speed(recipe, source))
                found.append(convert(source, scratch, recipe, "halfbyte"))
                copies.append(plain_copy(source, found[-1]["out_bytes"], scratch))
            row: dict[str, Any] = {"bytes": total, "recipe": recipe, "runs": runs}
            row |= {key: statistics.median(f[key] for f in found) for key in found[0]}
            row["peak_bytes"] = max(f["peak_bytes"] for f in found)
            row["copy_seconds"] = statistics.median(copies)
            row["encode_seconds"] = total / statistics.median(speeds)
            row["of_limit"] = max(row["copy_seconds"], row["encode_seconds"]) / row["convert_seconds"]
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
        shutil.rmtree(source)
    return rows


def counts(scratch: Path, numbers: list[int], runs: int) -> list[dict[str, Any]]:
    """Conversions of many small tensors; medians."""
    rows = []
    for kind, make in (("experts", many_tensors), ("matrices", many_matrices)):
        for number in numbers:
            source = scratch / "source"
            source.mkdir()
            tensors = make(source, number)
            found = [convert(source, scratch, "nvfp4-absmax", "compressed-tensors") for _ in range(runs)]
            row: dict[str, Any] = {"kind": kind, "tensors": tensors, "runs": runs}
            row |= {key: statistics.median(f[key] for f in found) for key in found[0]}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            shutil.rmtree(source)
    return rows


def measure(scratch: Path | None, big: float, runs: int, most: int = COUNTS[-1]) -> dict[str, Any]:
    """All of the benchmark in a temporary folder of ``scratch``."""
    found = head() | {"threads": cores(), "whole_bytes": WHOLE}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        found["sizes"] = sizes(Path(folder), big, runs)
        found["counts"] = counts(Path(folder), [n for n in COUNTS if n <= most], runs)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--big", type=float, default=SIZES[-1], help="largest size in GB (default 10)")
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="largest number of tensors (default 100000)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (default: a temporary one)")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "pipeline.json")
    args = parser.parse_args()
    write_results(args.output, measure(args.scratch, args.big, args.runs, args.most))


if __name__ == "__main__":
    main()
