"""Every built-in recipe on a checkpoint with the shapes of Qwen3.6-35B-A3B: memory, sizes, what has to stay the same.

    python benchmarks/real_models.py ../shared/inventories --scratch DIR [--layers 4] [--source DIR] [--only RECIPE]

Makes the checkpoint (4 of 40 layers, embeddings, vision, MTP; 12 GB, random heavy-tailed values; ``--source`` takes one
that is there) with scripts/make_synthetic_checkpoint.py. Each recipe is planned, written by ``halfbyte quantize`` and
checked by ``halfbyte verify``, in a process of its own whose peak memory is measured, and each output is deleted before
the next. Independently of halfbyte, the safetensors library compares MTP and vision of output and source bit by bit.
Planning from the headers of Kimi-K2-Thinking (208,215 tensors) is measured beside it. The process fails if a limit or
a check does. Results are written after each recipe, so that an interrupted run goes on where it stopped.
Needs ``halfbyte[transformers]`` (for safetensors with torch) and 25 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import halfbyte
from common import head, replace_part, write_results
from halfbyte.recipes import list_recipes, load_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
QWEN, KIMI = "qwen36_35b_a3b.json", "kimi_k2_thinking.patterns.json"
MEMORY_LIMIT, PLAN_LIMIT = 4 * 10**9, 5.0
PART = "benchmarks/real_models.py"
# the kernel's maximum of a child survives exec and would be this process's, so it reports its own
MEASURED = """
import sys, time
from halfbyte.cli import main
code = main(sys.argv[2:])
open(sys.argv[1], "w").write(open("/proc/self/status").read() + f"CPU: {time.process_time()}")
sys.exit(code)
"""


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """One command of halfbyte in a process of its own; its JSON document, exit code, peak memory and CPU time."""
    status = folder / "status"
    status.unlink(missing_ok=True)
    command = [sys.executable, "-c", MEASURED, str(status), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = status.read_text().splitlines() if status.exists() else []
    found = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    return {
        "exit_code": done.returncode,
        "peak_bytes": int(found["VmHWM"][0]) * 1024 if "VmHWM" in found else None,
        "cpu_seconds": float(found["CPU"][0]) if "CPU" in found else None,
        "document": json.loads(done.stdout) if done.returncode == 0 else None,
        "error": done.stderr.strip()[-2000:],
    }


def apart(folder: Path) -> Iterator[tuple[str, Path]]:
    """All MTP and vision tensors of a checkpoint, and their files."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        yield from ((name, path) for name in names if name.startswith(("mtp.", "model.visual.")))


def identical(source: Path, out: Path) -> tuple[int, list[str]]:
    """How many MTP and vision tensors the output has to the bit as in the source, and which it has not."""
    import torch
    from safetensors import safe_open

    found, changed, same = dict(apart(out)), [], 0
    for name, path in apart(source):
        if name not in found:
            changed.append(name)
            continue
        with safe_open(path, framework="pt") as before, safe_open(found[name], framework="pt") as after:
            parts = [file.get_slice(name) for file in (before, after)]
            shapes = [(part.get_shape(), part.get_dtype()) for part in parts]
            right = shapes[0] == shapes[1]
            for first in range(0, shapes[0][0][0] if right else 0, 32):
                rows = [part[first : first + 32].contiguous().view(torch.uint8) for part in parts]
                right = right and torch.equal(*rows)
        same += right
        changed += [] if right else [name]
    return same, changed


def measure(source: Path, scratch: Path, recipe: str) -> dict[str, Any]:
    """Plan, convert, verify and compare one recipe, in the dialect that the recipe asks for."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    plan = halfbyte.plan(source, recipe)
    quantized = run(scratch, "quantize", str(source), str(out), "--recipe", recipe, "--dialect", plan.dialect.name)
    row: dict[str, Any] = {"recipe": recipe, "dialect": plan.dialect.name, "bits_per_weight": plan.bits_per_weight}
    row |= {"planned_bytes": plan.repository_bytes, "quantize": _numbers(quantized)}
    problems = [f"quantize: {quantized['error']}"] if quantized["exit_code"] else []
    if not problems:
        verified = run(scratch, "verify", str(out), "--against", str(source))
        row["verify"] = _numbers(verified)
        row["relmse"] = quantized["document"].get("relmse")
        row["bytes"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        row["identical_tensors"], changed = identical(source, out)
        dropped = {item.weight.role.split(".")[0] for item in plan.items if item.action == "drop"}
        row["dropped_as_the_recipe_says"] = sorted(dropped)
        lost = [n for n in changed if ("mtp" if n.startswith("mtp.") else "vision") not in dropped]
        problems += [f"verify: {verified['error']}"] if verified["exit_code"] else []
        problems += [f"{len(lost)} tensors changed, e.g. {lost[0]}"] if lost else []
        if row["bytes"] != row["planned_bytes"]:
            problems.append(f"{row['bytes']} bytes were written, {row['planned_bytes']} planned")
        for step in ("quantize", "verify"):
            if (peak := row[step]["peak_bytes"]) > MEMORY_LIMIT:
                problems.append(f"{step} took {peak} bytes of memory, more than {MEMORY_LIMIT}")
    shutil.rmtree(out, ignore_errors=True)
    return {**row, "problems": problems}


def _numbers(done: dict[str, Any]) -> dict[str, Any]:
    return {key: done[key] for key in ("exit_code", "peak_bytes", "cpu_seconds")}


def kimi(inventories: Path, scratch: Path) -> dict[str, Any]:
    """CPU seconds and memory of planning from headers alone; the best of three."""
    arguments = ("plan", "--inventory", str(inventories / KIMI), "--recipe", "nvfp4-fp8")
    runs = [run(scratch, *arguments) for _ in range(3)]
    best = min(runs, key=lambda found: found["cpu_seconds"] or 1e9)
    tensors = sum(found["tensors"] for found in best["document"]["classes"]) if best["document"] else 0
    problems = [best["error"]] if best["exit_code"] else []
    if not problems and best["cpu_seconds"] > PLAN_LIMIT:
        problems.append(f"planning took {best['cpu_seconds']:.1f} s of CPU time, more than {PLAN_LIMIT}")
    return {"source_tensors": tensors, **_numbers(best), "problems": problems}


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    source, plan = results["source"], results["kimi_k2_plan"]
    lines = [
        f"{results['date']}, {results['machine']['cpu']} ({results['machine']['cores']} cores), {versions}.",
        f"Source: {source['tensors']:,} tensors, {source['bytes'] / 1e9:.2f} GB in BF16; random heavy-tailed values "
        f"with the names and shapes of Qwen3.6-35B-A3B: {source['layers']} of its 40 layers, embeddings, vision, MTP.",
        "",
        "| recipe | dialect | bits | GB | quantize, peak GB | verify, peak GB | MTP and vision |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in results["recipes"]:
        if row["problems"]:
            lines.append(f"| {row['recipe']} | {row['dialect']} | FAILED: {row['problems'][0][:200]} ||||")
            continue
        kept = f"{row['identical_tensors']} tensors, identical"
        if row["dropped_as_the_recipe_says"]:
            kept = "left out, as published"
        peaks = (f"{row[step]['peak_bytes'] / 1e9:.2f}" for step in ("quantize", "verify"))
        lines.append(
            f"| {row['recipe']} | {row['dialect']} | {row['bits_per_weight']:.2f} | {row['bytes'] / 1e9:.2f} "
            f"| {' | '.join(peaks)} | {kept} |"
        )
    lines += [
        "",
        f"Planning Kimi-K2-Thinking ({plan['source_tensors']:,} tensors) from its headers: "
        f"{plan['cpu_seconds']:.1f} s of CPU time, {plan['peak_bytes'] / 1e6:.0f} MB."
        if not plan["problems"]
        else f"Planning Kimi-K2-Thinking FAILED: {plan['problems'][0]}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inventories", type=Path)
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (default: a temporary one)")
    parser.add_argument("--source", type=Path, help="a checkpoint that make_synthetic_checkpoint.py has written")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", nargs="*", metavar="RECIPE")
    parser.add_argument("-o", "--output", type=Path, default=REPOSITORY / "benchmarks/results/real_models.json")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs/results.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="halfbyte-real-") as folder:
        scratch, source = Path(folder), args.source
        if source is None:
            source = scratch / "source"
            script = REPOSITORY / "scripts" / "make_synthetic_checkpoint.py"
            command = [sys.executable, script, args.inventories / QWEN, source, "--layers", str(args.layers)]
            subprocess.run([str(word) for word in command], check=True)
        results = measure_all(args, source, scratch)
    replace_part(args.docs, PART, table(results))
    failed = [row for row in (*results["recipes"], results["kimi_k2_plan"]) if row["problems"]]
    sys.exit(f"{len(failed)} failed" if failed else 0)


def measure_all(args: argparse.Namespace, source: Path, scratch: Path) -> dict[str, Any]:
    """All recipes that have no result of this source yet."""
    found = halfbyte.inspect(source)
    about = {"tensors": found.tensors, "bytes": found.data_bytes, "layers": args.layers}
    results: dict[str, Any] = {
        **head("safetensors", "torch"),
        "source": {**about, "fingerprint": found.fingerprint},
        "recipes": [],
    }
    if args.output.exists():
        before = json.loads(args.output.read_text())
        if before["source"]["fingerprint"] == found.fingerprint:
            results["recipes"] = [row for row in before["recipes"] if not row["problems"]]
    results["kimi_k2_plan"] = kimi(args.inventories, scratch)
    done = {row["recipe"] for row in results["recipes"]}
    data_free = [name for name in list_recipes() if not load_recipe(name).needs_calibration]
    for recipe in args.only or data_free:
        if recipe not in done:
            results["recipes"].append(row := measure(source, scratch, recipe))
            print(json.dumps(row), flush=True)
        results["recipes"].sort(key=lambda row: row["recipe"])
        write_results(args.output, results, "recipes")
    return results


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
