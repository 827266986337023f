"""Compile the GPU kernels ahead of time, without a GPU, and count what the machine code of their loops costs.

    python scripts/gpu_machine_code.py                 a table, as docs/gpu.md has it
    python scripts/gpu_machine_code.py --json FILE     the counts as JSON
    python scripts/gpu_machine_code.py --write         put table and roofline into docs/gpu.md

A loop's instructions are those between a backward branch and its target in what nvdisasm prints; weights are counted
from the matrix instructions in it, each of which multiplies 256 weights of a warp with eight tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# the compiler, not the interpreter
os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halfbyte.formats import get_format
from halfbyte.gpu.dense_kernel import dense_kernel
from halfbyte.gpu.device_encode import _LANES
from halfbyte.gpu.device_experts import _STRIPS
from halfbyte.gpu.device_linear import _STAGES, Bucket
from halfbyte.gpu.encode_kernel import encode_kernel
from halfbyte.gpu.expert_kernel import down_kernel, gate_up_kernel
from halfbyte.gpu.ptx_text import scale_text, word_text
from halfbyte.gpu.table_layout import Operand, describe_tables

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "gpu.md"
ARCHITECTURES = (80, 89, 90, 100, 120)
FORMATS = ("nvfp4", "mixfp4", "if4", "mxfp4", "int4_g128", "razer", "nf4")
TOKENS = (8, 16, 32)
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# of 8192 x 8192 weights and one token: memory GB/s and instructions of a lane per second, from the data sheets
GPUS = {
    "A100": (80, 2039, 108, 1.41),
    "H100": (90, 3350, 132, 1.755),
    "H200": (90, 4800, 132, 1.755),
    "B200": (100, 8000, 148, 1.85),
    "RTX 5090": (120, 1792, 170, 2.41),
}
# the arguments of each kernel: "x" for activations, a type of Triton, or a whole number that 16 divides or does not
_ABOUT = {"words": "*i32", "scales": "*i32"}
_LOOKED_UP = {"tables": "*fp32", "scale_values": "*fp32"}
_SORTED = {"places": "*i32", "tile_experts": "*i32", **_LOOKED_UP}
_ARGUMENTS: dict[str, dict[str, str]] = {
    "dense": {
        "x": "x", **_ABOUT, "factor": "*fp32", "bias": "x", "y": "x", "parts": "*fp32", "counters": "*i32",
        **_LOOKED_UP, "shape_m": "any", "shape_n": "16", "shape_k": "16", "x_stride": "16", "strips": "any",
        "tiles": "any",
    },
    "gate_up": {
        "x": "x", **_ABOUT, "factors": "*fp32", "bias": "x", "hidden": "x", **_SORTED, "slots": "any", "width": "16",
        "shape_k": "16", "strips": "any", "tiles": "any", "experts": "any", "limit": "fp32", "alpha": "fp32",
    },
    "down": {
        "hidden": "x", **_ABOUT, "factors": "*fp32", "bias": "x", "by_slot": "*fp32", **_SORTED, "shape_n": "16",
        "width": "16", "strips": "any", "tiles": "any", "experts": "any",
    },
}  # fmt: skip
_KERNELS = {"dense": dense_kernel, "gate_up": gate_up_kernel, "down": down_kernel}
_OWN: dict[str, dict[str, Any]] = {"dense": {"SPLITS": 8}, "gate_up": {"ACTIVATION": "silu"}, "down": {}}
EXPERTS = ("gate_up", "down")
SEARCHES = ("sweep", "four_over_six")


@dataclass(frozen=True)
class Count:
    """What the loop of a kernel costs: instructions per weight and lane, registers, bytes of spills."""

    kernel: str
    architecture: int
    format: str
    tokens: int
    instructions: int
    per_weight: float
    registers: int
    spills: int


def count(kernel: str, architecture: int, name: str, bucket: Bucket, operand: Operand = "bfloat16") -> Count:
    """Compile a kernel and count."""
    cubin = compile_kernel(kernel, architecture, name, bucket, operand)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        code = _run("nvdisasm", "-c", path)
        registers, spills = usage_of(path, code)
    loop = longest_loop(code)
    products = sum("HMMA" in line for line in loop)
    weights = products * 8 // max(bucket.tokens // 8, 1)
    return Count(kernel, architecture, name, bucket.tokens, len(loop), round(len(loop) / weights, 2), registers, spills)


def compile_kernel(kernel: str, architecture: int, name: str, bucket: Bucket, operand: Operand) -> bytes:
    """The machine code of a kernel for BF16 or FP16 activations; the dense one is split along K."""
    layout = describe_tables(get_format(name))
    constants: dict[str, Any] = {
        "SCALE_TEXT": scale_text(layout, operand),
        "WORD_TEXT": word_text(layout, operand),
        "KIND": layout.kind,
        "SCALE": {"bf16": "bfloat16", "fp16": "float16"}.get(layout.scale, "byte"),
        "CHOOSES": layout.chooses,
        "DECODE": "asm",
        "TYPE": getattr(tl, operand),
        "TOKENS": bucket.tokens,
        "STRIPS": bucket.strips,
        "BIAS": False,
        "WHOLE": True,
        "STAGES": _STAGES,
        **_OWN[kernel],
    }
    about, types = (
        _ARGUMENTS[kernel],
        {"x": {"bfloat16": "*bf16", "float16": "*fp16"}[operand], "any": "i32", "16": "i32"},
    )
    signature = {key: types.get(value, value) for key, value in about.items()} | dict.fromkeys(constants, "constexpr")
    aligned = [key for key, value in about.items() if value[0] == "*" or value in ("x", "16")]
    attributes = {(list(signature).index(key),): [["tt.divisibility", 16]] for key in aligned}
    source = ASTSource(_KERNELS[kernel], signature, constants, attributes)
    options = {"num_warps": bucket.warps, "num_stages": _STAGES, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return bytes(compiled.asm["cubin"])


@dataclass(frozen=True)
class Encoding:
    """What the kernel of an encoding costs; ``contracted``: FMAs of FP32 in its PTX, which would round otherwise."""

    architecture: int
    search: str
    registers: int
    spills: int
    contracted: int


def encoding(architecture: int, search: str) -> Encoding:
    """Compile the encoder of MixFP4 and look at its code."""
    constants = {
        "FIRST": "e2m1", "SECOND": "int_sign_magnitude", "FIRST_INDEX": 0, "SECOND_INDEX": 1, "FIRST_BASE": 6.0,
        "SECOND_BASE": 7.0, "SINGLE": False, "METRIC": "sse", "WEIGHTED": False, "WEIGHT_PER_MATRIX": False,
        "OVER": search == "four_over_six", "LANES": _LANES,
    }  # fmt: skip
    floats = dict.fromkeys(("importance", "inverses", "overs"), "*fp32")
    signature = {"x": "*bf16", **floats, "offsets": "*i32", "codes": "*u8", "scales": "*u8"}
    signature |= dict.fromkeys(("blocks", "per_matrix", "per_row", "counts_first", "counts_second"), "i32")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(7)}
    source = ASTSource(encode_kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        registers, spills = usage_of(path, _run("nvdisasm", "-c", path))
    return Encoding(architecture, search, registers, spills, compiled.asm["ptx"].count("fma.rn.f32"))


def usage_of(path: Path, code: str) -> tuple[int, int]:
    """Registers of a kernel, and its spills: instructions for local memory and bytes of it."""
    usage = _run("cuobjdump", "-res-usage", path)
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code)) + sum(int(n) for n in re.findall(r"LOCAL:(\d+)", usage))
    return max(int(n) for n in re.findall(r"REG:(\d+)", usage)), spills


def longest_loop(code: str) -> list[str]:
    """The instructions of the longest loop in disassembled code."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)
        if label:
            labels[label.group(1)] = len(lines)
        elif instruction:
            lines.append(instruction.group(1))
    loops = [
        (i + 1 - labels[target], labels[target], i + 1)
        for i, line in enumerate(lines)
        for target in re.findall(r"\bBRA\b.*?(\.L_x_\d+)", line)
        if labels.get(target, i) < i - 1
    ]
    if not loops:
        raise SystemExit("the machine code has no loop")
    _, first, stop = max(loops)
    return lines[first:stop]


def _run(tool: str, option: str, path: Path) -> str:
    return subprocess.run([BINARIES / tool, option, path], capture_output=True, text=True, check=True).stdout


def counts(architectures: Sequence[int], formats: Sequence[str], tokens: Sequence[int]) -> Iterator[Count]:
    """Counts of the dense kernel for all combinations, and of the kernels of experts for MixFP4."""
    for architecture in architectures:
        for name in formats:
            for number in tokens:
                yield count("dense", architecture, name, Bucket(number))
        for kernel in EXPERTS:
            yield count(kernel, architecture, "mixfp4", Bucket(8, _STRIPS))


def table(measured: Sequence[Count]) -> str:
    """Instructions per weight and registers as a Markdown table: a row per format and tokens."""
    shown = sorted({c.architecture for c in measured})
    lines = ["| format, tokens | " + " | ".join(f"sm_{a}" for a in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for kernel, name, tokens in dict.fromkeys((c.kernel, c.format, c.tokens) for c in measured):
        row = {c.architecture: c for c in measured if (c.kernel, c.format, c.tokens) == (kernel, name, tokens)}
        cells = [f"{row[a].per_weight:.2f} ({row[a].registers})" for a in shown]
        of_experts = f", experts: {kernel.replace('_', ' and ')}" if kernel in EXPERTS else ""
        lines.append(f"| `{name}`, {tokens}{of_experts} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def roofline(measured: Sequence[Count], name: str = "mixfp4") -> str:
    """Microseconds of 8192 x 8192 weights and eight tokens: memory, issue, and their larger one against BF16."""
    lines = [
        "| GPU | BF16 memory µs | 4-bit memory µs | instructions per weight | issue µs | bound | speed-up at most |",
        "|---|---|---|---|---|---|---|",
    ]
    weights = 8192 * 8192
    for gpu, (architecture, bandwidth, units, clock) in GPUS.items():
        rows = [c for c in measured if (c.kernel, c.architecture, c.format) == ("dense", architecture, name)]
        cost = next(c.per_weight for c in rows if c.tokens == 8)
        dense, packed = weights * 2 / bandwidth / 1e3, weights * 4.5 / 8 / bandwidth / 1e3
        issue = weights * cost / (units * 128 * clock * 1e9) * 1e6
        bound, slower = ("memory", packed) if packed > issue else ("issue", issue)
        lines.append(
            f"| {gpu} | {dense:.1f} | {packed:.1f} | {cost:.2f} | {issue:.1f} | {bound} | {dense / slower:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the arguments, compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--architectures", nargs="+", type=int, default=ARCHITECTURES)
    arguments = parser.parse_args()
    measured = list(counts(arguments.architectures, arguments.formats, arguments.tokens))
    if arguments.json:
        document = {"triton": triton.__version__, "counts": [asdict(c) for c in measured]}
        document["encodings"] = [asdict(encoding(a, s)) for a in arguments.architectures for s in SEARCHES]
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.write:
        write_page(measured)
    if not arguments.json and not arguments.write:
        print(table(measured))


def write_page(measured: Sequence[Count]) -> None:
    """Put table and roofline between their marks in docs/gpu.md."""
    text = PAGE.read_text(encoding="utf-8")
    parts = {"counts": f"Triton {triton.__version__}:\n\n{table(measured)}", "roofline": roofline(measured)}
    for mark, content in parts.items():
        begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
