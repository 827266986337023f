"""Codebooks: the values that the codes of a format stand for, and how a real number finds its code."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import ml_dtypes
import numpy as np

from halfbyte.formats.arrays import Codes, Floats

Rounding = Callable[["Codebook", Floats], Codes]


@dataclass(frozen=True)
class Codebook:
    """A grid of 16 (or 256) values indexed by code.

    ``values[c]`` is the FP32 value of code ``c``; ``top`` is the magnitude that absmax scaling maps the
    largest element of a block to. ``rounding`` turns scaled elements into codes; by default the nearest
    value wins, ties going to the value of smaller magnitude. ``unused`` codes are decoded but never written.
    ``exponent`` and ``mantissa_bits`` describe float grids for the power-of-two scale rules.
    """

    name: str
    values: tuple[float, ...]
    top: float
    rounding: Rounding | None = None
    unused: tuple[int, ...] = ()
    exponent: int = 2
    mantissa_bits: int = 1
    kind: str = field(default="nearest")

    @cached_property
    def array(self) -> Floats:
        """The values as a FP32 array indexed by code."""
        return np.array(self.values, dtype=np.float32)

    @property
    def bits(self) -> int:
        """Bits of a code: 4 or 8."""
        return 4 if len(self.values) == 16 else 8

    @cached_property
    def ladder(self) -> tuple[Floats, Codes]:
        """Thresholds t[k] and codes c[k] in ascending order of value: z gets c[#(t <= z)]."""
        used = [c for c in range(len(self.values)) if c not in self.unused]
        # one code per value; of +0 and -0 the positive one stands for both
        by_value: dict[float, int] = {}
        for code in used:
            by_value.setdefault(self.values[code] + 0.0, code)
        ordered = sorted(by_value)
        thresholds = []
        for low, high in itertools.pairwise(ordered):
            middle = np.float32((low + high) / 2)
            # a tie goes to the smaller magnitude: upwards only when the upper neighbour is nearer to zero
            thresholds.append(middle if abs(high) < abs(low) else np.nextafter(middle, np.float32(np.inf)))
        codes = np.array([by_value[v] for v in ordered], dtype=np.uint8)
        return np.array(thresholds, dtype=np.float32), codes

    def encode(self, z: Floats) -> Codes:
        """Codes of the elements ``z`` (any shape, already divided by their scales)."""
        if self.rounding is not None:
            return self.rounding(self, z)
        thresholds, codes = self.ladder
        return codes[np.searchsorted(thresholds, z, side="right")]

    def mirrored(self) -> Codebook:
        """The same codebook with every value negated: what a negative scale makes of it."""
        negated = tuple(-v for v in self.values)
        return Codebook(f"-{self.name}", negated, self.top, None, self.unused, self.exponent, self.mantissa_bits)


def _round_e2m1(codebook: Codebook, z: Floats) -> Codes:
    # ml_dtypes rounds half to even and saturates at 6; the sign of a zero is kept
    return np.asarray(z.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15, dtype=np.uint8)


def _round_sign_magnitude(codebook: Codebook, z: Floats) -> Codes:
    magnitude = np.rint(np.minimum(np.abs(z), np.float32(7))).astype(np.uint8)
    return magnitude | (np.signbit(z).astype(np.uint8) << 3)


def _round_twos_complement(codebook: Codebook, z: Floats) -> Codes:
    clipped = np.rint(np.clip(z, np.float32(-7), np.float32(7))).astype(np.int8)
    return np.asarray(clipped.view(np.uint8) & 15, dtype=np.uint8)


def _round_if4_int(codebook: Codebook, z: Floats) -> Codes:
    # the factor is the reference implementation's own truncated 7/6
    return _round_twos_complement(codebook, z * np.float32(1.16666666))


def _round_offset(codebook: Codebook, z: Floats) -> Codes:
    return (np.rint(np.clip(z, np.float32(-8), np.float32(7))) + np.float32(8)).astype(np.uint8)


def _round_e4m3(codebook: Codebook, z: Floats) -> Codes:
    clipped = np.clip(z, np.float32(-448), np.float32(448))
    return np.asarray(clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E4M3_BYTES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)

E2M1 = Codebook("e2m1", _HALF + tuple(-v for v in _HALF), 6.0, _round_e2m1, kind="e2m1")
"""FP4 of the OCP microscaling specification: sign, 2 exponent bits, 1 mantissa bit."""

INT7_SIGN_MAGNITUDE = Codebook(
    "int7_sign_magnitude",
    tuple(float(v) for v in range(8)) + tuple(-float(v) for v in range(8)),
    7.0,
    _round_sign_magnitude,
    kind="int_sign_magnitude",
)
"""E1M2 read as integers -7..7, bit 3 the sign (arXiv 2605.31035)."""

INT7_TWOS_COMPLEMENT = Codebook(
    "int7_twos_complement",
    tuple(float(v) for v in (*range(8), *range(-8, 0))),
    7.0,
    _round_twos_complement,
    unused=(8,),
    kind="int_twos_complement",
)

IF4_INT = Codebook(
    "if4_int",
    tuple(float(np.float32(v) * np.float32(0.8571428571)) for v in (*range(8), *range(-8, 0))),
    6.0,
    _round_if4_int,
    unused=(8,),
    kind="if4_int",
)
"""IF4's integers share the FP4 scale: q * 6/7, two's complement (arXiv 2603.28765)."""

INT8_OFFSET = Codebook("int4_offset", tuple(float(v) for v in range(-8, 8)), 7.5, _round_offset, kind="int_offset")
"""INT4 as compressed-tensors packs it: code = q + 8, q in -8..7, absmax scale amax / 7.5."""

E4M3 = Codebook(
    "e4m3",
    tuple(float(v) for v in _E4M3_BYTES),
    448.0,
    _round_e4m3,
    unused=(0x7F, 0xFF),
    exponent=8,
    mantissa_bits=3,
    kind="e4m3",
)
"""FP8 elements (256 codes, 0x7F and 0xFF are NaN and never written)."""


def e2m1_with(special: float) -> Codebook:
    """E2M1 whose code 8 (minus zero) stands for ``special`` instead (RaZeR, arXiv 2501.04052)."""
    top = max(6.0, abs(special))
    values = (*_HALF, special, *(-v for v in _HALF[1:]))
    return Codebook(f"e2m1{special:+g}", values, top, _round_e2m1_special, kind="e2m1_special")


def _round_e2m1_special(codebook: Codebook, z: Floats) -> Codes:
    codes = _round_e2m1(codebook, z)
    codes[codes == 8] = 0
    special = codebook.array[8]
    nearer = np.abs(z - special) < np.abs(z - codebook.array[codes])
    codes[nearer] = 8
    return codes
