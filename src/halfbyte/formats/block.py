"""Block formats: codes of one of a few codebooks, times a block scale, times a global scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats.arrays import Array, Codes, Floats
from halfbyte.formats.codebooks import Codebook
from halfbyte.formats.format import Format, QuantizedTensor
from halfbyte.formats.given_scales import edges, inverse_of, scaled
from halfbyte.formats.losses import unit_of
from halfbyte.formats.packing import pack_nibbles, unpack_nibbles
from halfbyte.formats.scale_search import ColumnChoice, Encoded, ScaleSearch
from halfbyte.formats.scales import ScaleType


@dataclass(frozen=True)
class BlockFormat(Format):
    """value = codebook[selector][code] * scale * global_scale.

    ``codebooks`` are indexed by the selector, whose bits lie above the scale's code in the scale byte.
    ``order`` is the order in which a search tries the codebooks: a later one must be strictly better, so the
    first wins ties. ``block_shape`` is (rows, columns) that share a scale, -1 for all of that dimension.
    ``shared_base``: all codebooks use the first tried codebook's absmax scale (IF4) instead of their own.
    ``global_top``: the global scale maps the tensor's amax to ``global_top`` times the largest scale.
    """

    codebooks: tuple[Codebook, ...] = field()
    scale: ScaleType = field()
    block_shape: tuple[int, int]
    has_global_scale: bool = False
    order: tuple[int, ...] = (0,)
    shared_base: bool = False
    global_top: float = 6.0

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        return self.block_shape

    @cached_property
    def bits(self) -> int:
        """Bits of an element's code."""
        return self.codebooks[0].bits

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales for a weight's shape; per-global scales have shape [...] + [1, 1]."""
        rows, columns = self.block_shape
        k = 1 if columns < 0 else -(-shape[-1] // columns)
        if len(shape) == 1:
            return (k,)
        n = shape[-2] if rows == 1 else 1 if rows < 0 else -(-shape[-2] // rows)
        return (*shape[:-2], n, k)

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Dtype and shape of codes, scales and global_scale."""
        width = shape[-1] // 2 if self.bits == 4 else shape[-1]
        parts: dict[str, tuple[Any, tuple[int, ...]]] = {
            "codes": (np.uint8, (*shape[:-1], width)),
            "scales": (self.scale.dtype, self.scales_shape(shape)),
        }
        if self.has_global_scale:
            parts["global_scale"] = (np.float32, shape[:-2])
        return parts

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Two-dimensional blocks may be cut at the edges; blocks along K may not."""
        if self.block_shape[0] > 1 and len(shape) >= 2 and 0 not in shape:
            return None
        return super().problem(shape)

    def split_scales(self, scales: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
        """FP32 scale values and codebook indices (None where there is one codebook) of stored scales."""
        if len(self.codebooks) == 1:
            return self.scale.to_value(scales), None
        mask = np.uint8((1 << self.scale.bits) - 1)
        return self.scale.to_value(scales & mask), scales >> np.uint8(self.scale.bits)

    def codebooks_of(self, tensor: QuantizedTensor) -> NDArray[np.uint8]:
        """Index of the codebook that each block chose."""
        chosen = self.split_scales(tensor.scales)[1]
        return super().codebooks_of(tensor) if chosen is None else chosen

    def zero_scales(self, tensor: QuantizedTensor) -> NDArray[np.bool_]:
        """Which stored scales are zero, whatever codebook their selector bits choose."""
        return np.asarray(self.split_scales(tensor.scales)[0] == 0)

    def scale_factors(self, tensor: QuantizedTensor) -> NDArray[np.float32]:
        """What each of the 256 scale bytes stands for, times the global scale: FP32 [..., 256]."""
        if self.scale.dtype is not np.uint8:
            return super().scale_factors(tensor)
        scales, _ = self.split_scales(np.arange(256, dtype=np.uint8))
        return self._times_global_scale(scales, tensor, (..., None))

    def global_scale_reach(self, largest_scale: float | None = None) -> float:
        """2688 = 6 * 448 for NVFP4; FormatError without a global scale."""
        if not self.has_global_scale:
            return super().global_scale_reach(largest_scale)
        return (self.scale.maximum if largest_scale is None else largest_scale) * self.global_top

    def block_reach(self, tensor: QuantizedTensor) -> NDArray[np.float32]:
        """Largest magnitude of each block's codebook, times its scale."""
        scales, chosen = self.decode_scales(tensor)
        ends = np.array([np.abs(np.delete(t.array, list(t.unused))).max() for t in self.codebooks], dtype=np.float32)
        return np.asarray(np.abs(scales) * (ends[0] if chosen is None else ends[chosen]))

    def is_finite(self, tensor: QuantizedTensor) -> bool:
        """Whether scales and codes are numbers, without decoding: no product of theirs leaves the range of FP32."""
        arrays = [self.split_scales(tensor.scales)[0], tensor.global_scale, tensor.global_scale_inv]
        # E4M3 has NaN, signed bytes have not
        broken = bool(np.isnan(self.codebooks[0].array).any() and ((tensor.codes & 0x7F) == 0x7F).any())
        broken |= tensor.global_scale_inv is not None and not tensor.global_scale_inv.all()
        return not broken and all(np.isfinite(array).all() for array in arrays if array is not None)

    def value_range(self, tensor: QuantizedTensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Lowest and highest value of each element's codebook, times its scale."""
        scales, chosen = self.decode_scales(tensor)
        used = [np.delete(t.array, list(t.unused)) for t in self.codebooks]
        ends = np.array([[u.min() for u in used], [u.max() for u in used]], dtype=np.float32)
        first, last = (ends[:, 0].reshape(2, *(1,) * scales.ndim) if chosen is None else ends[:, chosen]) * scales
        return self.spread(first, tensor.shape), self.spread(last, tensor.shape)

    def round_to(self, tensor: QuantizedTensor, x: Array) -> QuantizedTensor:
        """The nearest value of each block's codebook to x over the block's scale."""
        scales, chosen = self.split_scales(tensor.scales)
        inverse = self.spread(inverse_of(scales), tensor.shape)
        lead = (..., *(None,) * min(2, scales.ndim))
        whole = () if tensor.global_scale is None else (inverse_of(tensor.global_scale)[lead],)
        z = scaled(x, *whole, inverse)
        codes = self.codebooks[0].encode(z)
        if chosen is not None:
            index = self.spread(chosen, tensor.shape)
            for number, codebook in enumerate(self.codebooks[1:], 1):
                codes = np.where(index == number, codebook.encode(z), codes)
        return replace(tensor, codes=pack_nibbles(codes) if self.bits == 4 else codes)

    def cells(self, tensor: QuantizedTensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Middles between the values of each block's codebook, times the block's scale."""
        scales, chosen = self.decode_scales(tensor)
        codes = unpack_nibbles(tensor.codes) if self.bits == 4 else tensor.codes
        ends = np.stack([np.stack(edges(codebook)) for codebook in self.codebooks])
        index = np.zeros_like(codes) if chosen is None else self.spread(chosen, tensor.shape)
        first, last = (ends[index, end, codes] * self.spread(scales, tensor.shape) for end in (0, 1))
        return np.minimum(first, last), np.maximum(first, last)

    def describe(self) -> dict[str, Any]:
        """Block, bits, scale type, global scale, codebooks and selector bits."""
        facts: dict[str, Any] = {"block": list(self.block), "bits": self.bits, "scale": self.scale.name}
        facts["tensor_scale"] = "multiplier" if self.has_global_scale else None
        facts["tables"] = [t.name for t in self.codebooks]
        if self.bits == 4:
            facts["table_values"] = [list(t.values) for t in self.codebooks]
        if len(self.codebooks) > 1:
            facts["selector"] = f"scale byte >> {self.scale.bits}"
        return facts

    def encode_reference(
        self, x: Floats, search: ScaleSearch, global_scale: Floats | None, weight: Floats | None
    ) -> Encoded:
        """By the search, which chooses a scale and a codebook for each block."""
        return Encoded(*search.encode_blocks(x, self, global_scale, weight))

    @property
    def rounds_columns(self) -> bool:
        """GPTQ can round these formats column by column."""
        return True

    def column_choices(self, y: Floats, search: ScaleSearch) -> Iterator[tuple[ColumnChoice, bool]]:
        """Every codebook, in the order in which they are tried, with every scale of the search."""
        none = np.zeros(y.shape[1], dtype=np.float32)
        amax = np.abs(y).max(axis=0)
        judged = not search.single(self)
        for index in self.order:
            base = self.codebooks[self.order[0]] if self.shared_base else self.codebooks[index]
            for stored, scale in search.column_candidates(amax, base, self):
                yield ColumnChoice(stored, scale, none, np.full(len(amax), index, dtype=np.uint8)), judged

    def column_unit(self, y: Floats, first: ColumnChoice) -> Floats:
        """The power of two above the first candidate's scale, inverted."""
        return unit_of(first.scale)

    def round_column(self, y: Floats, choice: ColumnChoice) -> tuple[Codes, Floats]:
        """The nearest values of each row's codebook; a scale of zero stands for zeros."""
        zero = choice.scale == 0
        z = y * (np.float32(1) / np.where(zero, np.float32(1), choice.scale))
        codes, values = np.zeros(y.shape, dtype=np.uint8), np.zeros(y.shape, dtype=np.float32)
        for index, codebook in enumerate(self.codebooks):
            rows = choice.codebook == index
            if rows.any():
                codes[rows] = codebook.encode(z[rows])
                values[rows] = codebook.array[codes[rows]]
        codes[zero] = self.codebooks[0].encode(np.zeros((1, 1), dtype=np.float32))[0, 0]
        return codes, np.where(zero, np.float32(0), values * choice.scale)

    def stored_choice(self, stored: Array, offset: Array | None) -> ColumnChoice:
        """Scale and codebook of stored scales; a stored zero is a block of zeros."""
        none = np.zeros(len(stored), dtype=np.float32)
        scale, chosen = self.split_scales(stored)
        zero = (stored & np.uint8((1 << self.scale.bits) - 1)) == 0 if stored.dtype == np.uint8 else scale == 0
        codebook = np.zeros(len(stored), dtype=np.uint8) if chosen is None else chosen
        return ColumnChoice(stored, np.where(zero, np.float32(0), scale), none, codebook)

    def settled_choice(self, choice: ColumnChoice, y: Floats) -> ColumnChoice:
        """Put selector bits above the scales; blocks of zeros get the scale zero."""
        zero, stored = ~np.any(y, axis=0), choice.stored
        if len(self.codebooks) > 1:
            stored = stored | (choice.codebook << np.uint8(self.scale.bits))
        stored = np.where(zero, np.zeros_like(stored), stored)
        codebook = np.where(zero, np.uint8(0), choice.codebook)
        return ColumnChoice(stored, np.where(zero, np.float32(0), choice.scale), choice.offset, codebook)

    def spread(self, per_block: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Repeat one value per block (shape of the scales) over the block's elements."""
        rows, columns = self.block_shape
        full = per_block
        if columns > 0:
            full = np.repeat(full, columns, axis=-1)[..., : shape[-1]]
        if rows > 1:
            full = np.repeat(full, rows, axis=-2)[..., : shape[-2], :]
        return np.broadcast_to(full, shape)

    def decode_scales(self, tensor: QuantizedTensor) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
        """What each block's codebook values are multiplied by, and its codebook's index (None where there is one)."""
        scales, chosen = self.split_scales(tensor.scales)
        return self._times_global_scale(scales, tensor, (..., *(None,) * min(2, scales.ndim))), chosen

    @staticmethod
    def _times_global_scale(
        scales: NDArray[np.float32], tensor: QuantizedTensor, lead: tuple[Any, ...]
    ) -> NDArray[np.float32]:
        """Scales times the global scale, or over its reciprocal where that is the stored number."""
        if tensor.global_scale_inv is not None:
            return np.asarray(scales / tensor.global_scale_inv[lead])
        return scales if tensor.global_scale is None else np.asarray(scales * tensor.global_scale[lead])

    def decode(self, tensor: QuantizedTensor) -> NDArray[np.float32]:
        """FP32: codebook value times (scale times global scale), each product rounded once."""
        scales, chosen = self.decode_scales(tensor)
        codes = unpack_nibbles(tensor.codes) if self.bits == 4 else tensor.codes
        if chosen is None:
            values = self.codebooks[0].array[codes]
        else:
            stacked = np.concatenate([t.array for t in self.codebooks])
            index = self.spread(chosen, tensor.shape) * np.uint8(len(self.codebooks[0].values)) + codes
            values = stacked[index]
        return np.asarray(values * self.spread(scales, tensor.shape), dtype=np.float32)
