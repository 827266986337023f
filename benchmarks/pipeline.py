"""Time and memory of whole conversions: against the disk and the encoder, against size, against tensor count.

    python benchmarks/pipeline.py [--big GB] [--scratch DIR] -o benchmarks/results/pipeline.json

Makes mixture-of-experts checkpoints with the shapes of Qwen3.6-35B-A3B (BF16, Student-t values from a repeated
tile), converts each with ``halfbyte quantize`` in a process of its own, and measures wall time, CPU time and peak
memory. Beside each stands a plain copy: the source read in order and as many bytes as the output has written and
flushed. Source pages are dropped from the cache before each run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.checkpoint import ShardWriter, build_header, numpy_dtype

CHUNK = 32 << 20
HIDDEN, INTERMEDIATE = 2048, 512
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
    per_expert = 3 * HIDDEN * INTERMEDIATE * 2
    count = max(8, round(gigabytes * 1e9 / per_expert))
    layers = max(1, -(-count // 256))
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
    experts = min(256, max(2, count // 12))
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
    buffer = bytearray(CHUNK)
    written = done = 0
    target = scratch / "copy.bin"
    began = time.perf_counter()
    with target.open("wb", buffering=0) as out:
        for path in sorted(source.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while n := file.readinto(buffer):
                    done += n
                    due = min(out_bytes, done * out_bytes // total) - written
                    while due > 0:
                        step = min(due, CHUNK)
                        out.write(memoryview(buffer)[:step])
                        written, due = written + step, due - step
        os.fsync(out.fileno())
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def convert(source: Path, scratch: Path, recipe: str, dialect: str, workers: int | None = None) -> dict[str, Any]:
    """One ``halfbyte quantize``: wall and CPU seconds, peak memory in bytes, output bytes."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    forget(source)
    # the kernel's maximum survives exec and would be this process's, so the child reports its own
    status_file = scratch / "status"
    command = [sys.executable, "-c", MEASURED, str(status_file), "quantize", str(source), str(out)]
    command += ["--recipe", recipe, "--dialect", dialect, "--json", *(["--workers", str(workers)] if workers else [])]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    peak = next(line for line in status_file.read_text().splitlines() if line.startswith("VmHWM"))
    found = {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": int(peak.split()[1]) * 1024,
        "out_bytes": sum(p.stat().st_size for p in out.glob("*.safetensors")),
    }
    shutil.rmtree(out)
    return found


def sizes(scratch: Path, gigabytes: list[float], recipes: list[str]) -> list[dict[str, Any]]:
    """Conversions of growing size, each with its plain copy."""
    rows = []
    for size in gigabytes:
        source = scratch / "source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        total = experts_model(source, size)
        for recipe in recipes:
            row: dict[str, Any] = {"bytes": total, "recipe": recipe, **convert(source, scratch, recipe, "halfbyte")}
            row["copy_seconds"] = plain_copy(source, row["out_bytes"], scratch)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
        shutil.rmtree(source)
    return rows


def counts(scratch: Path, numbers: list[int]) -> list[dict[str, Any]]:
    """Conversions of many small tensors."""
    rows = []
    for number in numbers:
        source = scratch / "source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        tensors = many_tensors(source, number)
        row = {"tensors": tensors, **convert(source, scratch, "nvfp4-absmax", "compressed-tensors")}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
        shutil.rmtree(source)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--big", type=float, default=10, help="largest size in GB (default 10)")
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (default: a temporary one)")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        scratch = Path(folder)
        found = {
            "size": sizes(scratch, [s for s in (0.1, 0.3, 1, 3, 10) if s <= args.big], ["nvfp4-absmax"]),
            "recipes": sizes(
                scratch, [min(2.0, args.big)], ["nvfp4-four-over-six", "mixfp4-absmax", "mixfp4", "mxfp4"]
            ),
            "tensors": counts(scratch, [100, 1_000, 10_000, 100_000]),
        }
    text = json.dumps(found, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
