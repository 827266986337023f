"""Affine formats: unsigned codes with a scale and an offset per group along K."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from halfbyte.formats.arrays import Array, Codes, Floats
from halfbyte.formats.format import Format, QuantizedTensor
from halfbyte.formats.losses import SMALLEST, loss_of, unit_of
from halfbyte.formats.packing import pack_codes, unpack_codes
from halfbyte.formats.registry import register
from halfbyte.formats.scale_search import ColumnChoice, Encoded, ScaleSearch

_END = np.float32(2.0**127 * (1 - 2.0**-6))  # levels * scale + bias must not overflow in wider groups


@dataclass(frozen=True)
class AffineFormat(Format):
    """value = code * scale + bias (MLX), or (code - zero_point) * scale (asymmetric INT4).

    Scales and biases are BF16 [..., N, K/group]; zero points are uint8 of that shape.
    """

    bits: int = field()
    group: int
    offset: Literal["bias", "zero_point"] = field()

    @property
    def block(self) -> tuple[int, int]:
        """The ``group`` columns of a row that share a scale and an offset."""
        return (1, self.group)

    @property
    def levels(self) -> int:
        """The largest code that a group can use."""
        return (1 << self.bits) - 1

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Dtype and shape of codes, scales and offsets."""
        groups = (*shape[:-1], shape[-1] // self.group)
        width = shape[-1] * self.bits // 8
        offset_type = ml_dtypes.bfloat16 if self.offset == "bias" else np.uint8
        return {
            "codes": (np.uint8, (*shape[:-1], width)),
            "scales": (ml_dtypes.bfloat16, groups),
            "offsets": (offset_type, groups),
        }

    def value_range(self, tensor: QuantizedTensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Values of code 0 and of the largest code."""
        assert tensor.offsets is not None
        scales, offsets = tensor.scales.astype(np.float32), tensor.offsets.astype(np.float32)
        levels = np.float32(self.levels)
        if self.offset == "bias":
            first, last = offsets, levels * scales + offsets
        else:
            first, last = (-offsets) * scales, (levels - offsets) * scales
        return np.repeat(first, self.group, axis=-1), np.repeat(last, self.group, axis=-1)

    def round_to(self, tensor: QuantizedTensor, x: Array) -> QuantizedTensor:
        """The nearest codes of x under each group's scale and offset; zeros where a scale is zero."""
        grouped, scale, offset = self._grouped(tensor, x)
        one = np.where(scale == 0, np.float32(1), scale)
        q = np.where(scale == 0, np.float32(0), numbers(grouped, one, offset, self))
        return replace(tensor, codes=pack_codes(q.astype(np.uint8).reshape(tensor.shape), self.bits))

    def cells(self, tensor: QuantizedTensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Half a step to both sides of each value, none beyond the codes 0 and ``levels``."""
        q = unpack_codes(tensor.codes, self.bits).astype(np.float32)
        grouped, scale, offset = self._grouped(tensor, q)
        half = np.float32(0.5)
        ends = [np.clip(grouped + side, 0, np.float32(self.levels)) for side in (-half, half)]
        first, last = (values(end, scale, offset, self).reshape(tensor.shape) for end in ends)
        return np.minimum(first, last), np.maximum(first, last)

    def _grouped(self, tensor: QuantizedTensor, x: Array) -> tuple[Floats, Floats, Floats]:
        """x by groups, with their scales and offsets in FP32."""
        assert tensor.offsets is not None
        scale, offset = (a.astype(np.float32)[..., None] for a in (tensor.scales, tensor.offsets))
        return x.astype(np.float32, copy=False).reshape(*tensor.scales.shape, self.group), scale, offset

    def describe(self) -> dict[str, Any]:
        """Block, bits, scale type and kind of offset."""
        return {"block": list(self.block), "bits": self.bits, "scale": "bf16", "offset": self.offset}

    def decode(self, tensor: QuantizedTensor) -> NDArray[np.float32]:
        """FP32: the product is rounded, then the sum."""
        assert tensor.offsets is not None
        grouped = unpack_codes(tensor.codes, self.bits).reshape(*tensor.scales.shape, self.group).astype(np.float32)
        scales = tensor.scales.astype(np.float32)[..., None]
        offsets = tensor.offsets.astype(np.float32)[..., None]
        values = grouped * scales + offsets if self.offset == "bias" else (grouped - offsets) * scales
        return np.asarray(values.reshape(tensor.shape), dtype=np.float32)

    def encode_reference(
        self, x: Floats, search: ScaleSearch, global_scale: Floats | None, weight: Floats | None
    ) -> Encoded:
        """Groups by NumPy: both ends of a group's range are shrunk by every pair of the search's factors."""
        low, high = x.min(axis=1), x.max(axis=1)
        wide = high / 2 - low / 2 > _END
        if wide.any():
            x = np.where(wide[:, None], np.clip(x, -_END, _END), x)
            low, high = x.min(axis=1), x.max(axis=1)
        n = len(x)
        best = np.full(n, np.inf, dtype=np.float32)
        codes = np.zeros(x.shape, dtype=np.uint8)
        scales = np.zeros(n, dtype=ml_dtypes.bfloat16)
        offsets = np.zeros(n, dtype=ml_dtypes.bfloat16 if self.offset == "bias" else np.uint8)
        # a power of two changes no bit of the result; it keeps the squares of huge and tiny weights in range
        unit = unit_of(np.maximum(np.abs(low), np.abs(high)) + SMALLEST)[:, None]
        for shrink_low in search.shrink:
            for shrink_high in search.shrink:
                scale, offset = solve_range(low * np.float32(shrink_low), high * np.float32(shrink_high), self)
                q = numbers(x, scale[:, None], offset[:, None], self)
                loss = loss_of((values(q, scale[:, None], offset[:, None], self) - x) * unit, weight, "sse")
                better = loss < best
                best[better], codes[better] = loss[better], q[better]
                scales[better], offsets[better] = scale[better], offset[better]
        return Encoded(codes, scales, offsets)

    @property
    def rounds_columns(self) -> bool:
        """GPTQ can round these formats column by column."""
        return True

    def column_choices(self, y: Floats, search: ScaleSearch) -> Iterator[tuple[ColumnChoice, bool]]:
        """Both ends of a group's range, shrunk by every pair of the search's factors."""
        none = np.zeros(y.shape[1], dtype=np.float32)
        low, high = y.min(axis=0), y.max(axis=0)
        for shrink_low in search.shrink:
            for shrink_high in search.shrink:
                scale, offset = solve_range(low * np.float32(shrink_low), high * np.float32(shrink_high), self)
                yield ColumnChoice(scale.astype(ml_dtypes.bfloat16), scale, offset, none), True

    def column_unit(self, y: Floats, first: ColumnChoice) -> Floats:
        """The power of two above the group's largest magnitude, inverted."""
        return unit_of(np.maximum(np.abs(y.min(axis=0)), np.abs(y.max(axis=0))) + SMALLEST)

    def round_column(self, y: Floats, choice: ColumnChoice) -> tuple[Codes, Floats]:
        """The nearest codes, and what they stand for."""
        q = numbers(y, choice.scale, choice.offset, self)
        return q.astype(np.uint8), values(q, choice.scale, choice.offset, self)

    def stored_choice(self, stored: Array, offset: Array | None) -> ColumnChoice:
        """Scale and offset as FP32."""
        assert offset is not None
        none = np.zeros(len(stored), dtype=np.float32)
        return ColumnChoice(stored, stored.astype(np.float32), offset.astype(np.float32), none)


def solve_range(low: Floats, high: Floats, fmt: AffineFormat) -> tuple[Floats, Floats]:
    """Scale and offset of a range, as the FP32 values of what is stored."""
    if fmt.offset == "zero_point":
        return _zero_point(low, high, fmt)
    # MLX's rule: the end of larger magnitude is met exactly by a whole number of steps
    low, high = np.minimum(low, high), np.maximum(low, high)
    # MLX's own floor is 1e-7, which would wipe out groups of tiny weights
    floor = np.maximum(np.maximum(np.abs(low), np.abs(high)) * np.float32(2.0**-30), SMALLEST)
    step = np.maximum((high - low) / np.float32(fmt.levels), floor)
    downward = np.abs(low) > np.abs(high)
    step = np.where(downward, step, -step)
    edge = np.where(downward, low, high)
    whole = np.rint(edge / step)
    step = np.where(whole != 0, edge / np.where(whole != 0, whole, 1), step)
    offset = np.where(whole != 0, edge, np.float32(0))
    return _as_bf16(step), _as_bf16(offset)


def _zero_point(low: Floats, high: Floats, fmt: AffineFormat) -> tuple[Floats, Floats]:
    """compressed-tensors' asymmetric rule: the range always holds zero, which gets a code of its own."""
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    scale = _as_bf16(np.maximum((high - low) / np.float32(fmt.levels), SMALLEST))
    return scale, np.clip(np.rint(-low / scale), 0, fmt.levels)


def _as_bf16(x: Floats) -> Floats:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def numbers(x: Floats, scale: Floats, offset: Floats, fmt: AffineFormat) -> Floats:
    """The codes of x as numbers."""
    if fmt.offset == "bias":
        return np.clip(np.rint((x - offset) / scale), 0, fmt.levels)
    return np.clip(np.rint(x / scale) + offset, 0, fmt.levels)


def values(q: Floats, scale: Floats, offset: Floats, fmt: AffineFormat) -> Floats:
    """The FP32 values that codes stand for."""
    return q * scale + offset if fmt.offset == "bias" else (q - offset) * scale


for _bits in (2, 3, 4, 5, 6, 8):
    for _group in (32, 64, 128):
        register(
            AffineFormat(f"affine{_bits}_g{_group}", _bits, _group, "bias"),
            *((f"affine{_bits}",) + (("affine",) if _bits == 4 else ()) if _group == 64 else ()),
        )
for _group in (16, 32, 64, 128):
    register(
        AffineFormat(f"int4_asym_g{_group}", 4, _group, "zero_point"),
        *(("int4_asym",) if _group == 128 else ()),
    )
