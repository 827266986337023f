"""Parts of the kernels: a tile of weights decoded in registers, activations in the same order, and split sums.

A tile's weights [rows, 128] and activations [tokens, 128] have their columns in an order in which each lane's words
are the fragments of its own matrix instructions: nothing moves between lanes. ``DECODE`` chooses machine instructions
("asm") or plain operations ("plain") that look values up in memory; Triton's interpreter runs the second.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _spread(first, second, third, fourth, STRIPS: tl.constexpr):
    """Values of the blocks (r, c) = 00, 10, 01, 11 [strips, 32] as [strips, lane, c, r, h]."""
    by_row = tl.join(tl.join(first, second), tl.join(third, fourth))  # strips, lane, r, c
    wide = tl.reshape(tl.permute(by_row, (0, 1, 3, 2)), (STRIPS, 32, 2, 2, 1))
    return tl.broadcast_to(wide, (STRIPS, 32, 2, 2, 2))


@triton.jit
def _words(pointers, STRIPS: tl.constexpr):
    """Words [strips, lane, c, r, h] of a tile, by two loads of 16 bytes per lane."""
    low = tl.reshape(tl.load(pointers), (STRIPS, 32, 4))
    high = tl.reshape(tl.load(pointers + 128), (STRIPS, 32, 4))
    both = tl.permute(tl.join(low, high), (0, 1, 3, 2))
    return tl.reshape(both, (STRIPS, 32, 2, 2, 2))


@triton.jit
def _by_instructions(
    words, s0, s1, SCALE_TEXT: tl.constexpr, WORD_TEXT: tl.constexpr, NARROW: tl.constexpr,
    CHOOSES: tl.constexpr, TYPE: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Weights [8 words' elements] of [strips, lane, c, r, h] by the texts of ``ptx_text``."""
    words = tl.reshape(words, (STRIPS * 256,))
    if CHOOSES:
        out = tl.inline_asm_elementwise(
            SCALE_TEXT, "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r", [s0], dtype=(tl.int32,) * 12, is_pure=True, pack=1
        )
        one = tl.reshape(_spread(out[4], out[5], out[6], out[7], STRIPS), (STRIPS * 256,))
        two = tl.reshape(_spread(out[8], out[9], out[10], out[11], STRIPS), (STRIPS * 256,))
    elif NARROW:
        out = tl.inline_asm_elementwise(SCALE_TEXT, "=r,=r,=r,=r,r", [s0], dtype=(tl.int32,) * 4, is_pure=True, pack=1)
    else:
        out = tl.inline_asm_elementwise(
            SCALE_TEXT, "=r,=r,=r,=r,r,r", [s0, s1], dtype=(tl.int32,) * 4, is_pure=True, pack=1
        )
    scale = tl.reshape(_spread(out[0], out[1], out[2], out[3], STRIPS), (STRIPS * 256,))
    if CHOOSES:
        e = tl.inline_asm_elementwise(
            WORD_TEXT, "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r", [words, scale, one, two],
            dtype=(tl.int16,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        e = tl.inline_asm_elementwise(
            WORD_TEXT, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words, scale],
            dtype=(tl.int16,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
    low = tl.join(tl.join(e[0], e[4]), tl.join(e[2], e[6]))
    high = tl.join(tl.join(e[1], e[5]), tl.join(e[3], e[7]))
    return tl.join(low, high).to(TYPE, bitcast=True)


@triton.jit
def _by_operations(
    words, s0, s1, tables, scale_values, KIND: tl.constexpr, SCALE: tl.constexpr, CHOOSES: tl.constexpr,
    TYPE: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """The same weights by tables in memory: 16 values of each codebook, 256 values of scale bytes."""
    if SCALE == "byte":
        b0, b1, b2, b3 = s0 & 255, (s0 >> 8) & 255, (s0 >> 16) & 255, (s0 >> 24) & 255
        stored = _spread(b0, b1, b2, b3, STRIPS)
        scale = tl.load(scale_values + stored)
        table = stored >> 7 if CHOOSES else tl.zeros_like(stored)
    else:
        stored = _spread(s0 & 0xFFFF, (s0 >> 16) & 0xFFFF, s1 & 0xFFFF, (s1 >> 16) & 0xFFFF, STRIPS)
        if SCALE == "bfloat16":
            scale = (stored << 16).to(tl.float32, bitcast=True)
        else:
            scale = stored.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        table = tl.zeros_like(stored)
    e = tl.arange(0, 8)[None, None, None, None, None, :]
    bits = words[:, :, :, :, :, None]
    if KIND == "mirrored":
        sign = (bits >> tl.where(e < 4, 8 * e + 7, 8 * e - 29)) & 1
        index = (((bits >> (4 * e)) & 7) ^ 4) | (sign << 3)
    elif KIND == "table":
        index = ((bits >> (4 * e)) & 15) ^ 4
    else:
        index = (bits >> (4 * (e // 2) + 16 * (e % 2))) & 15
    value = tl.load(tables + table[:, :, :, :, :, None] * 16 + index)
    return (value * scale[:, :, :, :, :, None]).to(TYPE)


@triton.jit
def weight_tile(
    words, scales, tables, scale_values, SCALE_TEXT: tl.constexpr, WORD_TEXT: tl.constexpr, KIND: tl.constexpr,
    SCALE: tl.constexpr, CHOOSES: tl.constexpr, DECODE: tl.constexpr, TYPE: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Weights [16 strips, 128] of type TYPE from pointers to words [strips, 128] and scales [strips, 32].

    ``tables`` and ``scale_values`` are what plain operations look up.
    """
    bits = _words(words, STRIPS)
    s0 = tl.load(scales)
    s1 = s0
    if SCALE != "byte":
        s1 = tl.load(scales + 32)
    if DECODE == "asm":
        values = _by_instructions(
            bits, s0, s1, SCALE_TEXT, WORD_TEXT, SCALE == "byte", CHOOSES, TYPE, STRIPS
        )  # elements are (a, b, d)
    else:
        values = _by_operations(bits, s0, s1, tables, scale_values, KIND, SCALE, CHOOSES, TYPE, STRIPS)
    split = tl.reshape(values, (STRIPS, 8, 4, 2, 2, 2, 2, 2, 2))  # strip g t c r h a b d
    ordered = tl.permute(split, (0, 4, 1, 3, 5, 7, 2, 6, 8))  # strip r g | c h b t a d
    return tl.reshape(ordered, (STRIPS * 16, 128))


@triton.jit
def token_tile(x, TOKENS: tl.constexpr):
    """Activations [tokens, 128] in the order of ``weight_tile``'s columns, transposed."""
    split = tl.reshape(x, (TOKENS, 2, 4, 2, 2, 2, 2))  # token c t h a b d
    return tl.trans(tl.reshape(tl.permute(split, (0, 1, 3, 5, 2, 4, 6)), (TOKENS, 128)))


@triton.jit
def lane_pointers(words, scales, tiles, SCALE: tl.constexpr):
    """Pointers to the words [strips, 128] and scales [strips, 32] of tiles, which are numbers [strips]."""
    planes: tl.constexpr = 32 if SCALE == "byte" else 64
    word_at = words + tiles[:, None] * 256 + tl.arange(0, 128)[None, :]
    return word_at, scales + tiles[:, None] * planes + tl.arange(0, 32)[None, :]


@triton.jit
def product_of_tiles(
    x_at, inside, shape_k, words, scales, strip, tiles, first, stop, tables, scale_values,
    SCALE_TEXT: tl.constexpr, WORD_TEXT: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, CHOOSES: tl.constexpr,
    DECODE: tl.constexpr, TYPE: tl.constexpr, TOKENS: tl.constexpr, STRIPS: tl.constexpr, WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sums FP32 [16 strips, tokens] of the tiles ``first`` to ``stop`` of ``strip`` [strips] times activations.

    ``x_at`` [tokens, 128] points to the activations of the first tile; ``inside`` [tokens, 1] says which there are.
    """
    word_at, scale_at = lane_pointers(words, scales, strip * tiles + first, SCALE)
    planes: tl.constexpr = 32 if SCALE == "byte" else 64
    column = tl.arange(0, 128)
    sums = tl.zeros((STRIPS * 16, TOKENS), tl.float32)
    for tile in tl.range(first, stop, num_stages=STAGES):
        weights = weight_tile(
            word_at, scale_at, tables, scale_values, SCALE_TEXT, WORD_TEXT, KIND, SCALE, CHOOSES, DECODE, TYPE, STRIPS
        )
        present = inside if WHOLE else inside & (tile * 128 + column < shape_k)[None, :]
        tokens = token_tile(tl.load(x_at, mask=present, other=0.0).to(TYPE), TOKENS)
        sums = tl.dot(weights, tokens, sums, input_precision="ieee")
        word_at += 256
        scale_at += planes
        x_at += 128
    return sums


@triton.jit
def sum_of_splits(sums, parts, counters, place, rows, columns, shape_n, TOKENS: tl.constexpr, SPLITS: tl.constexpr):
    """Store this program's sums; in the last program of a tile return all sums, added in the order of the splits.

    ``parts`` FP32 [splits, tokens padded, n]; ``counters`` int32, zero before and after. The second result says
    whether this program is the last. ``rows`` [r, 1] and ``columns`` [1, t] are places of ``sums`` in parts.
    """
    split = tl.program_id(1)
    tokens = tl.num_programs(2) * TOKENS
    inside = rows < shape_n
    at = columns * shape_n + rows
    tl.store(parts + split * tokens * shape_n + at, sums, mask=inside)
    tl.debug_barrier()
    before = tl.atomic_add(counters + place, 1, sem="acq_rel")
    last = before == SPLITS - 1
    total = sums
    if last:
        total = tl.zeros_like(sums)
        for s in range(SPLITS):
            total += tl.load(parts + s * tokens * shape_n + at, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(counters + place, 0)
    return total, last
