"""The machine instructions (PTX) that turn a word of eight indices into eight weights.

``scale_text`` decodes the scale word of a lane once for its four blocks: each block's scale as a pair of BF16 or FP16
numbers and, where blocks choose a table, the two table registers that differ. ``word_text`` decodes a word with it:
PRMT looks four indices up at once, in a table of high bytes and one of low bytes, and interleaves them into pairs.
tests/gpu/ptx_machine.py runs these very texts for all scale bytes and selectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from halfbyte.gpu.table_layout import TYPES, Operand, TableLayout
from halfbyte.kernels.linear import NoKernelError

OUTPUTS_OF_BLOCK = 3
_SUFFIX = {"bfloat16": "bf16x2", "float16": "f16x2"}
_MINUS_ZERO = "0x80008000"
# of 128 + i in BF16 and 1024 + i in FP16 the lowest bits are those of i
_INTEGER = {"bfloat16": (0x4300, 128), "float16": (0x6400, 1024)}
# E4M3 bits as those of BF16 and FP16 stand for 2^-120 and 2^-8 of the value
_E4M3_LIFT = {"bfloat16": 2.0**120, "float16": 2.0**8}


def table_registers(layout: TableLayout, operand: Operand) -> list[list[int]]:
    """The registers of each table: four bytes of high or low bytes of values, eight or (mirrored) four of them.

    Their order: high bytes of entries 0-3, 4-7 (8-11, 12-15), then low bytes.
    """
    count = 8 if layout.kind == "mirrored" else 16
    registers = []
    for table in layout.tables:
        values = np.array(table[:count], dtype=np.float32).astype(TYPES[operand]).view(np.uint16)
        parts = [*(values >> 8).reshape(-1, 4).tolist(), *(values & 255).reshape(-1, 4).tolist()]
        registers.append([sum(byte << (8 * i) for i, byte in enumerate(part)) for part in parts])
    return registers


def chosen_registers(layout: TableLayout, operand: Operand) -> list[int]:
    """Numbers of the table registers in which two tables differ; NoKernelError for more than two."""
    if not layout.chooses:
        return []
    first, second = table_registers(layout, operand)
    differing = [i for i, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]]
    if len(differing) > 2:
        raise NoKernelError(f"two codebooks that differ in {len(differing)} groups of four entries have no product")
    return differing


def scale_text(layout: TableLayout, operand: Operand) -> str:
    """The instructions of a scale word: inputs one word (two where scales have 16 bits), outputs 4 or 12 registers.

    Outputs are the scale pairs of the blocks (r, c) = (0, 0), (1, 0), (0, 1), (1, 1), then their first and second
    chosen table registers. NoKernelError for scales that the operand type cannot hold.
    """
    if operand == "float16" and layout.scale not in ("e4m3", "fp16"):
        raise NoKernelError(f"{layout.scale} scales do not fit into FP16 activations; use BF16 activations")
    body = _narrow_scales(layout, operand) if layout.narrow else _wide_scales(layout, operand)
    return "{\n.reg .b32 t, u, f, c, z, a;\n.reg .pred p;\n.reg .b16 lo, hi;\n.reg .f32 w;\n" + "\n".join(body) + "\n}"


def _narrow_scales(layout: TableLayout, operand: Operand) -> list[str]:
    chosen, source = chosen_registers(layout, operand), f"${4 + 8 * bool(layout.chooses)}"
    tables = table_registers(layout, operand)
    shifts = {("e4m3", "bfloat16"): (4, 0x07F0), ("e4m3", "float16"): (7, 0x3F80), ("e8m0", "bfloat16"): (7, 0x7F80)}
    up, mask = shifts[layout.scale, operand]
    flag = 7 + up  # where bit 7 of a byte is then
    lines = [f"mov.b32 z, {_MINUS_ZERO};"]
    bits = [_bits(factor * _lift(layout, operand), operand) for factor in layout.factors]
    for r in (0, 1):  # bytes r and r + 2 in the halves of a register
        shift = up - 8 * r
        lines.append(f"shl.b32 t, {source}, {shift};" if shift > 0 else f"shr.u32 t, {source}, {-shift};")
        lines.append(f"and.b32 u, t, {_pair(mask)};")
        if layout.chooses:
            lines += [f"and.b32 c, t, {_pair(1 << flag)};", *_factor_of_flag(bits, flag)]
        else:
            lines.append(f"mov.b32 f, {_pair(bits[0])};")
        lines.append(_product("u", "u", "f", "z", operand))
        if layout.negates:
            lines += [f"and.b32 c, t, {_pair(1 << flag)};", f"shl.b32 c, c, {15 - flag};", "xor.b32 u, u, c;"]
        for c in (0, 1):
            lines.append(f"prmt.b32 ${r + 2 * c}, u, u, {0x3232 if c else 0x1010:#x};")
    for block in range(4) if layout.chooses else ():
        lines += [f"and.b32 a, {source}, {0x80 << (8 * block):#x};", "setp.ne.u32 p, a, 0;"]
        for place, register in enumerate((*chosen, *chosen)[:2]):
            first, second = tables[0][register], tables[1][register]
            lines.append(f"selp.b32 ${4 + 4 * place + block}, {second:#x}, {first:#x}, p;")
    return lines


def _factor_of_flag(bits: Sequence[int], flag: int) -> list[str]:
    """Register f from the flags in c: the bits of one factor or the other in each half, by one multiplication."""
    return [
        f"shr.u32 c, c, {flag};",
        f"mul.lo.u32 c, c, {(bits[0] ^ bits[1]):#x};",
        f"xor.b32 f, c, {_pair(bits[0])};",
    ]


def _wide_scales(layout: TableLayout, operand: Operand) -> list[str]:
    lines = [f"mov.b32 z, {_MINUS_ZERO};", f"mov.b32 f, {_pair(_bits(layout.factors[0], operand))};"]
    for c in (0, 1):
        lines.append(f"mov.b32 {{lo, hi}}, ${4 + c};")
        for r, half in ((0, "lo"), (1, "hi")):
            if layout.scale == "fp16" and operand == "bfloat16":
                lines += [f"cvt.f32.f16 w, {half};", "cvt.rn.bf16x2.f32 u, w, w;"]
            else:
                lines.append(f"mov.b32 u, {{{half}, {half}}};")
            lines.append(_product(f"${r + 2 * c}", "u", "f", "z", operand))
    return lines


def word_text(layout: TableLayout, operand: Operand) -> str:
    """The instructions of a word: outputs elements 0..7.

    Inputs are the word, the scale pair and, where blocks choose a table, two chosen table registers.
    """
    body = _linear_word(operand) if layout.kind == "linear" else _looked_up_word(layout, operand)
    lines = [f"mov.b32 z, {_MINUS_ZERO};", *body]
    for pair in range(4):
        lines.append(_product(f"p{pair}", f"p{pair}", "$9", "z", operand))
        lines.append(f"mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, p{pair};")
    registers = ".reg .b32 i, k, s, q, z, ha, hb, la, lb, x, y, p0, p1, p2, p3;"
    return "{\n" + registers + "\n" + "\n".join(lines) + "\n}"


def _looked_up_word(layout: TableLayout, operand: Operand) -> list[str]:
    chosen = chosen_registers(layout, operand)
    names = [f"{register:#x}" for register in table_registers(layout, operand)[0]]
    for place, register in enumerate(chosen):
        names[register] = f"${10 + place}"
    half = len(names) // 2
    lines = ["and.b32 i, $8, 0x77777777;", "shr.u32 k, i, 16;"]
    if layout.kind == "table":
        lines += ["shr.u32 s, $8, 1;", "and.b32 s, s, 0x44444444;", "or.b32 s, s, 0x32103210;", "shr.u32 q, s, 16;"]
    for group, index, select in (("a", "i", "s"), ("b", "k", "q")):
        for byte, table in (("h", names[:half]), ("l", names[half:])):
            lines.append(f"prmt.b32 {byte}{group}, {table[1]}, {table[0]}, {index};")
            if layout.kind == "table":
                lines.append(f"prmt.b32 x, {table[3]}, {table[2]}, {index};")
                lines.append(f"prmt.b32 {byte}{group}, {byte}{group}, x, {select};")
    if layout.kind == "mirrored":
        lines += ["shl.b32 s, $8, 4;", *(f"lop3.b32 h{g}, {w}, 0x80808080, h{g}, 0xEA;" for g, w in ("a$", "bs"))]
        lines = [line.replace(" $, ", " $8, ") for line in lines]
    for pair, (group, order) in enumerate((("a", 0x5140), ("a", 0x7362), ("b", 0x5140), ("b", 0x7362))):
        lines.append(f"prmt.b32 p{pair}, l{group}, h{group}, {order:#x};")
    return lines


def _linear_word(operand: Operand) -> list[str]:
    bits, base = _INTEGER[operand]
    lines = [f"mov.b32 x, {_pair(bits)};", f"mov.b32 y, {_pair(_bits(-float(base + 8), operand))};"]
    lines.append(f"mov.b32 q, {_pair(_bits(1.0, operand))};")
    for pair in range(4):
        lines.append(f"shr.u32 i, $8, {4 * pair};")
        lines.append(f"lop3.b32 p{pair}, i, 0x000F000F, x, 0xEA;")
        lines.append(f"fma.rn.{_SUFFIX[operand]} p{pair}, p{pair}, q, y;")
    return lines


def _product(out: str, a: str, b: str, minus_zero: str, operand: Operand) -> str:
    """A product of pairs; sm_80 multiplies BF16 only within an FMA."""
    return f"fma.rn.{_SUFFIX[operand]} {out}, {a}, {b}, {minus_zero};"


def _lift(layout: TableLayout, operand: Operand) -> float:
    return _E4M3_LIFT[operand] if layout.scale == "e4m3" else 1.0


def _bits(value: float, operand: Operand) -> int:
    return int(np.array(value, dtype=np.float32).astype(TYPES[operand]).view(np.uint16))


def _pair(half: int) -> str:
    return f"{half | half << 16:#010x}"
