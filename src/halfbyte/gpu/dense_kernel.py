"""The product of a few tokens with a packed matrix: y = x W^T, split along K where rows alone are too few programs."""

from __future__ import annotations

import triton
import triton.language as tl

from halfbyte.gpu.tile_kernel import product_of_tiles, sum_of_splits


@triton.jit
def dense_kernel(
    x, words, scales, factor, bias, y, parts, counters, tables, scale_values,
    shape_m, shape_n, shape_k, x_stride, strips, tiles,
    SCALE_TEXT: tl.constexpr, WORD_TEXT: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, CHOOSES: tl.constexpr,
    DECODE: tl.constexpr, TYPE: tl.constexpr, TOKENS: tl.constexpr, STRIPS: tl.constexpr, SPLITS: tl.constexpr,
    BIAS: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [m, n] = factor x [m, k] W^T + bias; programs (rows of W, splits of K, tokens).

    ``WHOLE``: k is a multiple of 128. Sums are FP32; ``parts`` and ``counters`` as in ``sum_of_splits``, unused
    where SPLITS is 1.
    """
    group, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    strip = tl.minimum(group * STRIPS + tl.arange(0, STRIPS), strips - 1).to(tl.int64)
    token = batch * TOKENS + tl.arange(0, TOKENS)
    first = split * tiles // SPLITS
    stop = (split + 1) * tiles // SPLITS
    x_at = x + token.to(tl.int64)[:, None] * x_stride + (first * 128 + tl.arange(0, 128))[None, :]
    sums = product_of_tiles(
        x_at, (token < shape_m)[:, None], shape_k, words, scales, strip, tiles, first, stop, tables, scale_values,
        SCALE_TEXT, WORD_TEXT, KIND, SCALE, CHOOSES, DECODE, TYPE, TOKENS, STRIPS, WHOLE, STAGES,
    )  # fmt: skip
    row = (group * STRIPS * 16 + tl.arange(0, STRIPS * 16))[:, None]
    last = True
    if SPLITS > 1:
        place = batch * tl.num_programs(0) + group
        sums, last = sum_of_splits(sums, parts, counters, place, row, token[None, :], shape_n, TOKENS, SPLITS)
    if last:
        result = sums * tl.load(factor)
        if BIAS:
            result += tl.load(bias + row, mask=row < shape_n, other=0.0).to(tl.float32)
        at = y + token.to(tl.int64)[None, :] * shape_n + row
        tl.store(at, result.to(y.dtype.element_ty), mask=(row < shape_n) & (token < shape_m)[None, :])
