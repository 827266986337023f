"""Codes and scales of blocks of 16, a block per lane, in the reference's FP32 order of operations.

Launch with ``enable_fp_fusion=False``: products and sums round one by one (``halfbyte.search.reference``).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(tile, LANES: tl.constexpr, COUNT: tl.constexpr):
    """Elements with an even number, and those with an odd one, of [lanes, 2 count]."""
    return tl.split(tl.reshape(tile, (LANES, COUNT, 2)))


@triton.jit
def _quarter(tile, LANES: tl.constexpr):
    """The four elements of [lanes, 4]."""
    even, odd = _halves(tile, LANES, 2)
    a, c = _halves(even, LANES, 1)
    b, d = _halves(odd, LANES, 1)
    return tl.reshape(a, (LANES,)), tl.reshape(b, (LANES,)), tl.reshape(c, (LANES,)), tl.reshape(d, (LANES,))


@triton.jit
def _elements(tile, LANES: tl.constexpr):
    """The sixteen elements of each block [lanes, 16]."""
    even, odd = _halves(tile, LANES, 8)
    e0, e2 = _halves(even, LANES, 4)
    e1, e3 = _halves(odd, LANES, 4)
    a0, a4, a8, a12 = _quarter(e0, LANES)
    a1, a5, a9, a13 = _quarter(e1, LANES)
    a2, a6, a10, a14 = _quarter(e2, LANES)
    a3, a7, a11, a15 = _quarter(e3, LANES)
    return a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15


@triton.jit
def _scale_code(v):
    """E4M3 codes 1..126 of positive numbers, rounded half to even."""
    v = tl.minimum(v, 448.0)
    t = tl.maximum(v, 0.015625)
    magic = ((t.to(tl.int32, bitcast=True) & 0x7F800000) + (20 << 23)).to(tl.float32, bitcast=True)
    q = (v + magic) - magic
    normal = (q.to(tl.int32, bitcast=True) >> 20) - (120 << 3)
    return tl.maximum(tl.where(q < 0.015625, (q * 512.0).to(tl.int32), normal), 1)


@triton.jit
def _scale_value(code):
    field = code >> 3
    normal = ((code + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    return tl.where(field == 0, (code & 7).to(tl.float32) * 0.001953125, normal)


@triton.jit
def _nearest(z, KIND: tl.constexpr):
    """The codebook's value nearest to z, and its code."""
    negative = z.to(tl.int32, bitcast=True) < 0
    if KIND == "e2m1":
        a = tl.minimum(tl.abs(z), 6.0)
        t = tl.maximum(a, 1.0)
        magic = ((t.to(tl.int32, bitcast=True) & 0x7F800000) + (22 << 23)).to(tl.float32, bitcast=True)
        q = (a + magic) - magic
        code = tl.minimum(tl.minimum(q * 2.0, q + 2.0), q * 0.5 + 4.0).to(tl.int32)
        return tl.where(negative, -q, q), code | tl.where(negative, 8, 0)
    if KIND == "if4_int":
        z = z * 1.16666666
    q = (tl.minimum(tl.abs(z), 7.0) + 8388608.0) - 8388608.0
    whole = q.to(tl.int32)
    signed = tl.where(negative, -q, q)
    if KIND == "int_sign_magnitude":
        return signed, whole | tl.where(negative, 8, 0)
    code = tl.where(negative, -whole, whole) & 15
    if KIND == "if4_int":
        return signed * 0.8571428571, code
    return signed, code


@triton.jit
def _loss(v, w, inverse, shown, KIND: tl.constexpr, METRIC: tl.constexpr, WEIGHTED: tl.constexpr, OVER: tl.constexpr):
    """The error of a block at a scale. ``shown``: scale, amax and 1536 of Four Over Six, which errs in full size."""
    total = tl.zeros_like(inverse)
    for e in tl.static_range(16):
        z = v[e] * inverse
        q, _ = _nearest(z, KIND)
        error = z - q
        if OVER:
            error = tl.div_rn(q * shown[0] * shown[1], tl.full(z.shape, 1536.0, tl.float32)) - v[e]
        term = error * error if METRIC == "sse" else tl.abs(error)
        if WEIGHTED:
            term = term * w[e]
        total = tl.maximum(total, term) if METRIC == "max" else total + term
    return total


@triton.jit
def _try_codebook(
    v, w, amax, best, inverse, stored, table, unit, shared, offsets, count,
    KIND: tl.constexpr, INDEX: tl.constexpr, BASE: tl.constexpr, FIRST: tl.constexpr, SINGLE: tl.constexpr,
    METRIC: tl.constexpr, WEIGHTED: tl.constexpr, OVER: tl.constexpr,
):  # fmt: skip
    """Offer every scale of a codebook; a later one must be strictly better. ``shared``: amax, scales of Four Over Six.

    ``BASE`` is the magnitude that the block's largest element meets.
    """
    one = tl.full(amax.shape, 1.0, tl.float32)
    base = tl.div_rn(amax if OVER else tl.where(amax == 0, 1.0, amax), one * BASE)
    if OVER:
        base = base * shared[1]
    begin = _scale_code(base)
    for i in range(count):
        if OVER:
            code = _scale_code(base * (1.0 + 0.5 * i))
            scale = _scale_value(code)
            new_inverse = tl.div_rn(one, shared[2] * scale)
        else:
            code = tl.minimum(tl.maximum(begin + tl.load(offsets + i), 1), 126)
            scale = _scale_value(code)
            new_inverse = tl.div_rn(one, scale)
        loss = best
        if not SINGLE:
            loss = _loss(v, w, new_inverse, (scale, shared[0]), KIND, METRIC, WEIGHTED, OVER)
            if not OVER:
                if FIRST:
                    power = ((253 << 23) - (scale.to(tl.int32, bitcast=True) & 0x7F800000)).to(tl.float32, bitcast=True)
                    unit = tl.where(i == 0, power, unit)
                relative = scale * unit
                loss = loss * (relative * relative)
        better = loss < best
        if FIRST:
            better = better | (i == 0)
        best = tl.where(better, loss, best)
        inverse = tl.where(better, new_inverse, inverse)
        stored = tl.where(better, code, stored)
        table = tl.where(better, INDEX, table)
    return best, inverse, stored, table, unit


@triton.jit
def encode_kernel(
    x, importance, inverses, overs, offsets, codes, scales, blocks, per_matrix, per_row, counts_first, counts_second,
    FIRST: tl.constexpr, SECOND: tl.constexpr, FIRST_INDEX: tl.constexpr, SECOND_INDEX: tl.constexpr,
    FIRST_BASE: tl.constexpr, SECOND_BASE: tl.constexpr, SINGLE: tl.constexpr, METRIC: tl.constexpr,
    WEIGHTED: tl.constexpr, WEIGHT_PER_MATRIX: tl.constexpr, OVER: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Bytes of two codes and scale bytes of blocks x [blocks, 16].

    ``inverses`` FP32 [matrices]: what elements are multiplied by (reciprocals of global scales, or the power of two
    of Four Over Six); ``overs`` FP32 [matrices, 3]: amax, encode scale and decode scale of Four Over Six.
    """
    block = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = block < blocks
    matrix = block // per_matrix
    at = block.to(tl.int64)[:, None] * 16 + tl.arange(0, 16)[None, :]
    raw = tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32)
    factor = tl.load(inverses + matrix, mask=inside, other=1.0)
    v = _elements(raw * factor[:, None], LANES)
    w = v
    if WEIGHTED:
        row = (matrix * per_row if WEIGHT_PER_MATRIX else 0) + block % per_row
        weights = tl.load(
            importance + row.to(tl.int64)[:, None] * 16 + tl.arange(0, 16)[None, :], mask=inside[:, None], other=0.0
        )
        w = _elements(weights, LANES)
    amax = tl.max(tl.abs(raw * factor[:, None]), axis=1)
    empty = tl.max(tl.abs(raw), axis=1) == 0
    shared = (amax, amax, amax)
    if OVER:
        shared = (
            tl.load(overs + matrix * 3, mask=inside, other=1.0),
            tl.load(overs + matrix * 3 + 1, mask=inside, other=1.0),
            tl.load(overs + matrix * 3 + 2, mask=inside, other=1.0),
        )
    best = tl.full((LANES,), float("inf"), tl.float32)
    inverse = tl.full((LANES,), 1.0, tl.float32)
    unit = tl.full((LANES,), 1.0, tl.float32)
    stored = tl.zeros((LANES,), tl.int32)
    table = tl.zeros((LANES,), tl.int32)
    best, inverse, stored, table, unit = _try_codebook(
        v, w, amax, best, inverse, stored, table, unit, shared, offsets, counts_first, FIRST, FIRST_INDEX, FIRST_BASE,
        True, SINGLE, METRIC, WEIGHTED, OVER,
    )  # fmt: skip
    if SECOND != "":
        best, inverse, stored, table, unit = _try_codebook(
            v, w, amax, best, inverse, stored, table, unit, shared, offsets, counts_second, SECOND, SECOND_INDEX,
            SECOND_BASE, False, SINGLE, METRIC, WEIGHTED, OVER,
        )  # fmt: skip
    for e in tl.static_range(8):
        _, low = _nearest(v[2 * e] * inverse, FIRST)
        _, high = _nearest(v[2 * e + 1] * inverse, FIRST)
        if SECOND != "":
            _, other_low = _nearest(v[2 * e] * inverse, SECOND)
            _, other_high = _nearest(v[2 * e + 1] * inverse, SECOND)
            low = tl.where(table == FIRST_INDEX, low, other_low)
            high = tl.where(table == FIRST_INDEX, high, other_high)
        both = tl.where(empty, 0, low | high << 4)
        tl.store(codes + block.to(tl.int64) * 8 + e, both.to(tl.uint8), mask=inside)
    tl.store(scales + block, tl.where(empty, 0, stored | table << 7).to(tl.uint8), mask=inside)
