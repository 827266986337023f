"""How the kernels see a format: its codebooks as tables of 16 values, and what its scale bytes mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import BlockFormat, Format
from halfbyte.kernels.linear import NoKernelError
from halfbyte.kernels.linear_layout import NativeWeight, describe_weight

Kind = Literal["mirrored", "table", "linear"]
Operand = Literal["bfloat16", "float16"]

_TABLE, _FLOAT = 0, 5  # the products' own numbers for codes of integers and of other values
_NARROW = {"e4m3": True, "e8m0": True, "bf16": False, "fp16": False}
TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclass(frozen=True)
class TableLayout:
    """One or two tables of 16 values, and scales.

    ``kind``: "mirrored" where entry 8 + i is minus entry i, "linear" where entry i is i - 8, else "table". ``tables``
    are indexed by ``recode[selector][code]``, the index that is kept in place of the file's code. A weight is table
    value * factor of its table * scale * global scale. ``negates``: bit 7 of a scale byte negates the block instead
    of choosing a table (so does the sign of a scale in a format of one codebook). ``columns`` is the format's block.
    """

    kind: Kind
    tables: tuple[tuple[float, ...], ...]
    factors: tuple[float, ...]
    recode: tuple[tuple[int, ...], ...]
    scale: str
    negates: bool
    columns: int

    @property
    def narrow(self) -> bool:
        """Whether a scale is a byte."""
        return _NARROW[self.scale]

    @property
    def chooses(self) -> bool:
        """Whether bit 7 of a scale byte chooses between two tables."""
        return len(self.tables) > 1

    def values(self) -> NDArray[np.float32]:
        """The tables times their factors, FP32 [tables, 16]."""
        tables = np.array(self.tables, dtype=np.float64) * np.array(self.factors)[:, None]
        return tables.astype(np.float32)

    def scale_values(self, fmt: Format) -> NDArray[np.float32]:
        """What each scale byte multiplies by, FP32 [256]; ones where scales are no bytes."""
        if not self.narrow:
            return np.ones(256, dtype=np.float32)
        stored = np.arange(256, dtype=np.uint8)
        magnitudes, _ = fmt.split_scales(stored)
        return np.asarray(np.where(self.negates & (stored > 127), -1, 1) * np.abs(magnitudes), dtype=np.float32)


def describe_tables(fmt: Format) -> TableLayout:
    """Describe a format's codebooks for the kernels; NoKernelError where they have no product for it."""
    native = None if fmt.rotation else describe_weight(fmt)
    usable = (
        isinstance(fmt, BlockFormat)
        and native is not None
        and native.code_kind in (_TABLE, _FLOAT)
        and native.table_count <= 2
        and native.block_rows == 1
        and fmt.bits == 4
        and fmt.scale.name in _NARROW
    )
    if not usable:
        raise NoKernelError(f"there is no product on GPUs for weights of format {fmt.name}; decode them instead")
    assert isinstance(fmt, BlockFormat) and native is not None
    pairs = [_whole(native, t) for t in range(native.table_count)]
    tables = [table for table, _ in pairs]
    recodes = [_mirror(table, fmt.codebooks[t].unused) for t, table in enumerate(tables)]
    kind: Kind = "table"
    mirrored = all(recode is not None for recode in recodes)
    if mirrored:
        kind = "mirrored"
        tables = [_reordered(table, recode) for table, recode in zip(tables, recodes, strict=True) if recode]
    elif all(table == tuple(range(-8, 8)) for table in tables):
        kind = "linear"
    same = tuple(range(16))
    return TableLayout(
        kind,
        tuple(tables),
        tuple(factor for _, factor in pairs),
        tuple(recode if mirrored and recode else same for recode in recodes),
        fmt.scale.name,
        bool(native.negate),
        native.block,
    )


def _whole(native: NativeWeight, index: int) -> tuple[tuple[float, ...], float]:
    """A table and its factor, as whole numbers without a common divisor where the values are whole multiples."""
    if native.code_kind == _FLOAT:
        return tuple(float(v) for v in native.values), 1.0
    table = [int(v) for v in native.tables[index]]
    divisor = math.gcd(*table)
    return tuple(float(v // divisor) for v in table), float(native.steps[index]) * divisor


def _mirror(table: tuple[float, ...], unused: tuple[int, ...]) -> tuple[int, ...] | None:
    """The index of each code where magnitudes are counted by three bits below a sign; None where that cannot be.

    An unused code takes the index of minus zero, which stands for another value: ``word_packing`` refuses it.
    """
    if all(table[8 + i] == -table[i] for i in range(8)):
        return tuple(range(16))
    magnitudes = sorted({abs(v) for i, v in enumerate(table) if i not in unused})
    if len(magnitudes) != 8 or magnitudes[0] != 0 or len(unused) != 1:
        return None
    recode = [8 if i in unused else magnitudes.index(abs(v)) + 8 * (v < 0) for i, v in enumerate(table)]
    return tuple(recode) if len(set(recode)) == 16 else None


def _reordered(table: tuple[float, ...], recode: tuple[int, ...]) -> tuple[float, ...]:
    """The values by their new indices, minus zero among them."""
    values = [0.0] * 16
    for code, index in enumerate(recode):
        values[index] = table[code]
    return tuple(values[:8]) + tuple(-v for v in values[:8])
