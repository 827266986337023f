"""A packed matrix decoded once into BF16, FP16 or FP32, for many tokens, where a library's product is faster."""

from __future__ import annotations

import triton
import triton.language as tl

from halfbyte.gpu.tile_kernel import lane_pointers, weight_tile


@triton.jit
def decode_kernel(
    words, scales, factor, y, tables, scale_values, shape_n, shape_k, strips, tiles,
    SCALE_TEXT: tl.constexpr, WORD_TEXT: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, CHOOSES: tl.constexpr,
    DECODE: tl.constexpr, TYPE: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """y [n, k] = factor W; programs (groups of strips, tiles)."""
    group, tile = tl.program_id(0), tl.program_id(1)
    strip = tl.minimum(group * STRIPS + tl.arange(0, STRIPS), strips - 1).to(tl.int64)
    word_at, scale_at = lane_pointers(words, scales, strip * tiles + tile, SCALE)
    weights = weight_tile(
        word_at, scale_at, tables, scale_values, SCALE_TEXT, WORD_TEXT, KIND, SCALE, CHOOSES, DECODE, TYPE, STRIPS
    )
    split = tl.reshape(weights, (STRIPS * 16, 2, 2, 2, 4, 2, 2))  # row c h b t a d
    natural = tl.reshape(tl.permute(split, (0, 1, 4, 2, 5, 3, 6)), (STRIPS * 16, 128))
    row = (group * STRIPS * 16 + tl.arange(0, STRIPS * 16))[:, None].to(tl.int64)
    column = (tile * 128 + tl.arange(0, 128))[None, :]
    values = (natural.to(tl.float32) * tl.load(factor)).to(y.dtype.element_ty)
    tl.store(y + row * shape_k + column, values, mask=(row < shape_n) & (column < shape_k))
