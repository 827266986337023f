"""Codes and scales in the order in which the threads of a kernel need them, and back.

A strip is 16 rows, a tile 16 rows of 128 columns. Lane 4g + t of the warp that multiplies a tile holds rows g and
g + 8, of each the blocks of 16 columns number t and 4 + t. Eight weights are a word; a lane's words of one half of the
columns are 16 bytes in a row:

    words  int32 [experts, strips, tiles, half c, lane (g, t), row r, word h]    row 16 strip + 8r + g,
                                                                     columns 128 tile + 64c + 16t + 8h + (0..7)
    scales int32 [experts, strips, tiles, 1, lane]  byte r + 2c is that of row r and half c
           or    [experts, strips, tiles, half c, lane]  the half-words of rows r, for scales of 16 bits

A block of 32 or more columns has its scale once for every 16. Within a word, element e has its index in bits 4e..4e+3,
except for "mirrored" tables: there bits 4e..4e+2 hold the index of the magnitude with its highest bit inverted, as
PRMT wants it, and the sign of element e lies in bit 8e + 7 for e < 4 and in bit 8e - 29 otherwise, so that four signs
go into four bytes at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import FormatError
from halfbyte.formats import Format, QuantizedTensor
from halfbyte.formats.packing import pack_nibbles, unpack_nibbles
from halfbyte.gpu.table_layout import TableLayout, describe_tables
from halfbyte.kernels.linear import NoKernelError

ROWS, COLUMNS, BLOCK = 16, 128, 16
_SIGN = tuple(8 * e + 7 if e < 4 else 8 * e - 29 for e in range(8))
# of linear tables, the bits of the elements: a shift brings two of them into the halves of a register
_LINEAR = tuple(4 * (e // 2) + 16 * (e % 2) for e in range(8))


@dataclass(frozen=True)
class PackedWords:
    """A quantized weight [N, K] or [experts, N, K] as words and scales; ``factors`` FP32 [experts] are global scales.

    ``scale_dtype`` is that of the file's scales. ``inverse``: the file stores reciprocals of global scales.
    """

    format: Format
    layout: TableLayout
    shape: tuple[int, ...]
    words: NDArray[np.int32]
    scales: NDArray[np.int32]
    factors: NDArray[np.float32]
    scale_dtype: np.dtype[Any]
    global_scale: NDArray[np.float32] | None
    inverse: bool

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales and factors."""
        return self.words.nbytes + self.scales.nbytes + self.factors.nbytes


def pack_words(tensor: QuantizedTensor) -> PackedWords:
    """Pack a weight [N, K] or [experts, N, K]; NoKernelError where the kernels have no product for it.

    FormatError where an array of the tensor does not fit its format.
    """
    layout = describe_tables(tensor.format)
    shape = tuple(tensor.shape)
    if len(shape) not in (2, 3):
        raise NoKernelError(f"a product needs a matrix or a stack of them, not a weight of shape {list(shape)}")
    lead = shape[0] if len(shape) == 3 else 1
    n = shape[-2]
    for name, (_, wanted) in tensor.format.parts(shape).items():
        array = getattr(tensor, name)
        if name in ("codes", "scales") and (array is None or array.shape != wanted):
            raise FormatError(f"{name} of a {tensor.format.name} weight {list(shape)} must be {list(wanted)}")
    scales, layout = _scale_bits(tensor, layout)
    scales = np.repeat(scales.reshape(lead, n, -1), layout.columns // BLOCK, axis=-1)
    codes = unpack_nibbles(tensor.codes.reshape(lead, n, -1))
    indices = _padded(_recoded(codes, scales, layout, tensor), (ROWS, COLUMNS))
    words = _words_of(_ordered(indices), layout)
    inverse = tensor.global_scale_inv is not None
    stored = tensor.global_scale_inv if inverse else tensor.global_scale
    factors = np.ones(lead, dtype=np.float32) if stored is None else stored.reshape(-1).astype(np.float32)
    return PackedWords(
        tensor.format,
        layout,
        shape,
        words,
        _scale_words(_padded(scales, (ROWS, COLUMNS // BLOCK)), layout),
        np.float32(1) / factors if inverse else factors.copy(),
        tensor.scales.dtype,
        None if stored is None else stored.copy(),
        inverse,
    )


def unpack_words(packed: PackedWords) -> QuantizedTensor:
    """Give back the tensor that was packed, byte for byte."""
    layout, shape, fmt = packed.layout, packed.shape, packed.format
    n, k = shape[-2:]
    scales = _scales_of(packed.scales, layout)[:, :n, : k // BLOCK]
    indices = _disordered(_indices_of(packed.words, layout))[:, :n, :k]
    codes = _coded(indices, scales, layout)
    stored = np.ascontiguousarray(scales[..., :: layout.columns // BLOCK])
    arrays: dict[str, Any] = {
        "codes": pack_nibbles(codes).reshape(*shape[:-1], k // 2),
        "scales": stored.view(packed.scale_dtype).reshape(fmt.scales_shape(shape)),
    }
    if packed.global_scale is not None and packed.inverse:
        arrays["global_scale_inv"] = packed.global_scale.copy()
        arrays["global_scale"] = np.asarray(np.float32(1) / packed.global_scale)
    elif packed.global_scale is not None:
        arrays["global_scale"] = packed.global_scale.copy()
    return QuantizedTensor(fmt, shape, **arrays)


def _scale_bits(tensor: QuantizedTensor, layout: TableLayout) -> tuple[NDArray[Any], TableLayout]:
    """Scales as the bits of their file, and the layout for their type, which need not be the format's."""
    scales = np.ascontiguousarray(tensor.scales)
    if layout.narrow:
        return scales.view(np.uint8), layout
    names = {"bfloat16": "bf16", "float16": "fp16"}
    if scales.dtype.name not in names:
        raise NoKernelError(f"there is no product on GPUs for scales of type {scales.dtype}; decode the weight instead")
    return scales.view(np.uint16), replace(layout, scale=names[scales.dtype.name])


def _selectors(scales: NDArray[Any], layout: TableLayout) -> NDArray[np.uint8]:
    """The table of each element, in the shape of the codes."""
    chosen = (scales >> 7).astype(np.uint8) if layout.chooses else np.zeros(scales.shape, dtype=np.uint8)
    return np.repeat(chosen, BLOCK, axis=-1)


def _recoded(
    codes: NDArray[np.uint8], scales: NDArray[Any], layout: TableLayout, tensor: QuantizedTensor
) -> NDArray[np.uint8]:
    recode = np.array(layout.recode, dtype=np.uint8)
    if (recode == np.arange(16)).all():
        return codes
    selectors = _selectors(scales, layout)
    for index, codebook in enumerate(getattr(tensor.format, "codebooks", ())[: len(recode)]):
        lost = [c for c in codebook.unused if (recode[index] != np.arange(16)).any()]
        if lost and (np.isin(codes, lost) & (selectors == index)).any():
            raise NoKernelError(
                f"a {tensor.format.name} weight uses the code {lost[0]}, which no encoder writes; decode it instead"
            )
    return np.asarray(recode[selectors, codes])


def _coded(indices: NDArray[np.uint8], scales: NDArray[Any], layout: TableLayout) -> NDArray[np.uint8]:
    back = np.argsort(np.array(layout.recode), axis=-1).astype(np.uint8)
    return np.asarray(back[_selectors(scales, layout), indices])


def _padded(array: NDArray[Any], multiple: tuple[int, int]) -> NDArray[Any]:
    rows, columns = (-array.shape[-2] % multiple[0], -array.shape[-1] % multiple[1])
    return np.pad(array, ((0, 0), (0, rows), (0, columns))) if rows or columns else array


def _ordered(elements: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[experts, rows, columns] as [experts, strips, tiles, c, g, t, r, h, e]."""
    lead, n, k = elements.shape
    split = elements.reshape(lead, n // ROWS, 2, 8, k // COLUMNS, 2, 4, 2, 8)
    return split.transpose(0, 1, 4, 5, 3, 6, 2, 7, 8)


def _disordered(elements: NDArray[np.uint8]) -> NDArray[np.uint8]:
    lead, strips, tiles = elements.shape[:3]
    rows = elements.transpose(0, 1, 6, 4, 2, 3, 5, 7, 8)
    return rows.reshape(lead, strips * ROWS, tiles * COLUMNS)


def _words_of(indices: NDArray[np.uint8], layout: TableLayout) -> NDArray[np.int32]:
    words: NDArray[np.uint32] = np.zeros(indices.shape[:-1], dtype=np.uint32)
    for e in range(8):
        index = indices[..., e].astype(np.uint32)
        if layout.kind == "mirrored":
            words |= ((index & 7) ^ 4) << np.uint32(4 * e)
            words |= (index >> 3) << np.uint32(_SIGN[e])
        elif layout.kind == "table":
            words |= (index ^ 4) << np.uint32(4 * e)
        else:
            words |= index << np.uint32(_LINEAR[e])
    return words.reshape(*indices.shape[:3], 2, 32, 4).view(np.int32)


def _indices_of(words: NDArray[np.int32], layout: TableLayout) -> NDArray[np.uint8]:
    lead, strips, tiles = words.shape[:3]
    bits = words.view(np.uint32).reshape(lead, strips, tiles, 2, 8, 4, 2, 2)
    indices = np.empty((*bits.shape, 8), dtype=np.uint8)
    for e in range(8):
        if layout.kind == "mirrored":
            indices[..., e] = (((bits >> (4 * e)) & 7) ^ 4) | (((bits >> _SIGN[e]) & 1) << 3)
        elif layout.kind == "table":
            indices[..., e] = ((bits >> (4 * e)) & 15) ^ 4
        else:
            indices[..., e] = (bits >> _LINEAR[e]) & 15
    return indices


def _scale_words(scales: NDArray[Any], layout: TableLayout) -> NDArray[np.int32]:
    lead, n, blocks = scales.shape
    split = scales.reshape(lead, n // ROWS, 2, 8, blocks // 8, 2, 4)
    ordered = split.transpose(0, 1, 4, 5, 3, 6, 2)  # experts, strips, tiles, c, g, t, r
    halves = np.ascontiguousarray(ordered).reshape(*ordered.shape[:4], 32, 2)
    if not layout.narrow:
        return halves.view(np.int32)[..., 0]
    whole = np.ascontiguousarray(halves.transpose(0, 1, 2, 4, 3, 5)).reshape(*halves.shape[:3], 1, 32, 4)
    return whole.view(np.int32)[..., 0]


def _scales_of(words: NDArray[np.int32], layout: TableLayout) -> NDArray[Any]:
    lead, strips, tiles = words.shape[:3]
    if layout.narrow:
        halves = words[..., None].view(np.uint8).reshape(lead, strips, tiles, 32, 2, 2).transpose(0, 1, 2, 4, 3, 5)
    else:
        halves = words[..., None].view(np.uint16).reshape(lead, strips, tiles, 2, 32, 2)
    split = halves.reshape(lead, strips, tiles, 2, 8, 4, 2)
    return split.transpose(0, 1, 6, 4, 2, 3, 5).reshape(lead, strips * ROWS, tiles * 8)
