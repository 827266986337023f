"""Runs the inline PTX of ``halfbyte.gpu.ptx_text`` on NumPy arrays: one lane per element, as the ISA defines it."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
_LUT = {"0xEA": lambda a, b, c: (a & b) | c}
_PAIRS = {"bf16x2": ml_dtypes.bfloat16, "f16x2": np.float16}


def run_ptx(text: str, outputs: int, inputs: list[Words]) -> list[Words]:
    """Run a text whose operands $0..$(outputs - 1) are results and the next ones ``inputs``."""
    held: dict[str, Any] = {f"${outputs + i}": np.asarray(word, dtype=np.uint32) for i, word in enumerate(inputs)}
    for line in (part.strip() for part in text.strip("{} \n").split(";")):
        if line and not line.startswith(".reg"):
            _step(line, held)
    return [held[f"${i}"] for i in range(outputs)]


def _step(line: str, held: dict[str, Any]) -> None:
    name, rest = line.split(None, 1)
    groups = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
    out, operands = groups[0], groups[1:]
    result = _run(name, [_value(o, held) for o in operands], operands)
    if out.startswith("{"):  # a register into two halves
        low, high = out.strip("{} ").split(", ")
        held[low], held[high] = result & np.uint32(0xFFFF), result >> np.uint32(16)
    else:
        held[out] = result


def _value(operand: str, held: dict[str, Any]) -> Any:
    if operand.startswith("{"):
        low, high = (held[half] for half in operand.strip("{} ").split(", "))
        return low | high << np.uint32(16)
    return held[operand] if operand in held else np.uint32(int(operand, 0))


def _run(name: str, values: list[Any], operands: list[str]) -> Any:
    kind = name.split(".")[0]
    if kind == "fma":
        return _fma(_PAIRS[name.split(".")[-1]], *values)
    if name == "lop3.b32":
        return _LUT[operands[3]](*values[:3])
    if name == "cvt.f32.f16":
        return np.asarray(values[0], dtype=np.uint16).view(np.float16).astype(np.float32)
    if name == "cvt.rn.bf16x2.f32":
        high, low = (v.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) for v in values)
        return low | high << np.uint32(16)
    return _PLAIN[name](*values)


def _fma(dtype: Any, a: Words, b: Words, c: Words) -> Words:
    """Each half a * b + c, rounded once: products of such numbers are exact in FP64."""
    out = np.uint32(0)
    for shift in (np.uint32(0), np.uint32(16)):
        x, y, z = (
            np.asarray(v >> shift & np.uint32(0xFFFF)).astype(np.uint16).view(dtype).astype(np.float64)
            for v in (a, b, c)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            result = (x * y + z).astype(np.float32).astype(dtype).view(np.uint16)
        out = out | result.astype(np.uint32) << shift
    return np.asarray(out, dtype=np.uint32)


def _prmt(a: Words, b: Words, select: Words) -> Words:
    """Four bytes of the eight in b:a; the highest bit of a selector repeats its byte's sign."""
    both = np.asarray(a).astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32)
    out = np.uint32(0)
    for i in range(4):
        nibble = np.asarray(select >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64)
        byte = both >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        byte = np.where(nibble >> np.uint64(3) == 1, np.where(byte > 127, 255, 0), byte)
        out = out | byte.astype(np.uint32) << np.uint32(8 * i)
    return np.asarray(out, dtype=np.uint32)


_PLAIN: dict[str, Any] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "mul.lo.u32": lambda a, b: (np.asarray(a).astype(np.uint64) * np.uint64(b)).astype(np.uint32),
    "prmt.b32": _prmt,
    "setp.ne.u32": lambda a, b: a != b,
    "selp.b32": lambda a, b, p: np.where(p, a, b),
}
