"""Mixtures of experts with packed weights: gate and up with the activation, down, and the sum over a token's slots."""

from __future__ import annotations

import triton
import triton.language as tl

from halfbyte.gpu.tile_kernel import lane_pointers, product_of_tiles, token_tile, weight_tile


@triton.jit
def _activated(gate, up, ACTIVATION: tl.constexpr, limit, alpha):
    if ACTIVATION == "clamped_swiglu":
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    if ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2.0 * inner) * up
    return gate * tl.sigmoid(gate) * up


@triton.jit
def gate_up_kernel(
    x, words, scales, factors, bias, hidden, places, tile_experts, tables, scale_values,
    slots, width, shape_k, strips, tiles, experts, limit, alpha,
    SCALE_TEXT: tl.constexpr, WORD_TEXT: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, CHOOSES: tl.constexpr,
    DECODE: tl.constexpr, TYPE: tl.constexpr, TOKENS: tl.constexpr, STRIPS: tl.constexpr, BIAS: tl.constexpr,
    WHOLE: tl.constexpr, ACTIVATION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """hidden [places, width] = activation of gate and up; programs (rows of the width, tiles of sorted slots).

    The first ``width`` rows of an expert's weight are gates, the others up. ``places`` are numbers of slots or -1,
    and ``tile_experts`` the expert of each tile of TOKENS places, ``experts`` where there is none.
    """
    group, tile = tl.program_id(0), tl.program_id(1)
    expert = tl.load(tile_experts + tile)
    if expert < experts:
        half = strips // 2
        strip = tl.minimum(group * STRIPS + tl.arange(0, STRIPS), half - 1) + expert.to(tl.int64) * strips
        word_at, scale_at = lane_pointers(words, scales, strip * tiles, SCALE)
        planes: tl.constexpr = 32 if SCALE == "byte" else 64
        place = tile * TOKENS + tl.arange(0, TOKENS)
        slot = tl.load(places + place)
        column = tl.arange(0, 128)
        inside = (slot >= 0)[:, None]
        x_at = x + (tl.maximum(slot, 0) // slots).to(tl.int64)[:, None] * shape_k + column[None, :]
        gates = tl.zeros((STRIPS * 16, TOKENS), tl.float32)
        ups = tl.zeros((STRIPS * 16, TOKENS), tl.float32)
        for k in tl.range(0, tiles, num_stages=STAGES):
            present = inside if WHOLE else inside & (k * 128 + column < shape_k)[None, :]
            tokens = token_tile(tl.load(x_at, mask=present, other=0.0).to(TYPE), TOKENS)
            weights = weight_tile(
                word_at, scale_at, tables, scale_values, SCALE_TEXT, WORD_TEXT, KIND, SCALE, CHOOSES, DECODE, TYPE,
                STRIPS,
            )  # fmt: skip
            gates = tl.dot(weights, tokens, gates, input_precision="ieee")
            weights = weight_tile(
                word_at + half * tiles * 256, scale_at + half * tiles * planes, tables, scale_values, SCALE_TEXT,
                WORD_TEXT, KIND, SCALE, CHOOSES, DECODE, TYPE, STRIPS,
            )  # fmt: skip
            ups = tl.dot(weights, tokens, ups, input_precision="ieee")
            word_at += 256
            scale_at += planes
            x_at += 128
        row = (group * STRIPS * 16 + tl.arange(0, STRIPS * 16))[:, None]
        factor = tl.load(factors + expert)
        gates *= factor
        ups *= factor
        if BIAS:
            bias_at = bias + expert * 2 * width + row
            gates += tl.load(bias_at, mask=row < width, other=0.0).to(tl.float32)
            ups += tl.load(bias_at + width, mask=row < width, other=0.0).to(tl.float32)
        result = _activated(gates, ups, ACTIVATION, limit, alpha)
        at = hidden + place.to(tl.int64)[None, :] * width + row
        tl.store(at, result.to(hidden.dtype.element_ty), mask=(row < width) & (slot >= 0)[None, :])


@triton.jit
def down_kernel(
    hidden, words, scales, factors, bias, by_slot, places, tile_experts, tables, scale_values,
    shape_n, width, strips, tiles, experts,
    SCALE_TEXT: tl.constexpr, WORD_TEXT: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, CHOOSES: tl.constexpr,
    DECODE: tl.constexpr, TYPE: tl.constexpr, TOKENS: tl.constexpr, STRIPS: tl.constexpr, BIAS: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """by_slot FP32 [slots of all tokens, n] from hidden [places, width]; programs as in ``gate_up_kernel``."""
    group, tile = tl.program_id(0), tl.program_id(1)
    expert = tl.load(tile_experts + tile)
    if expert < experts:
        strip = tl.minimum(group * STRIPS + tl.arange(0, STRIPS), strips - 1) + expert.to(tl.int64) * strips
        place = tile * TOKENS + tl.arange(0, TOKENS)
        slot = tl.load(places + place)
        hidden_at = hidden + place.to(tl.int64)[:, None] * width + tl.arange(0, 128)[None, :]
        sums = product_of_tiles(
            hidden_at, (slot >= 0)[:, None], width, words, scales, strip, tiles, 0, tiles, tables, scale_values,
            SCALE_TEXT, WORD_TEXT, KIND, SCALE, CHOOSES, DECODE, TYPE, TOKENS, STRIPS, WHOLE, STAGES,
        )  # fmt: skip
        row = (group * STRIPS * 16 + tl.arange(0, STRIPS * 16))[:, None]
        sums *= tl.load(factors + expert)
        if BIAS:
            sums += tl.load(bias + expert * shape_n + row, mask=row < shape_n, other=0.0).to(tl.float32)
        at = by_slot + tl.maximum(slot, 0).to(tl.int64)[None, :] * shape_n + row
        tl.store(at, sums, mask=(row < shape_n) & (slot >= 0)[None, :])


@triton.jit
def slot_sum_kernel(by_slot, chosen, shares, y, slots, shape_n, experts, COLUMNS: tl.constexpr):
    """y [tokens, n] = sum over a token's slots of share * by_slot, in the order of the slots.

    Slots whose number is no expert's add nothing.
    """
    token, block = tl.program_id(0), tl.program_id(1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < shape_n
    total = tl.zeros((COLUMNS,), tl.float32)
    for s in range(slots):
        slot = token * slots + s
        expert = tl.load(chosen + slot)
        if (expert >= 0) & (expert < experts):
            values = tl.load(by_slot + slot.to(tl.int64) * shape_n + column, mask=inside, other=0.0)
            total += values * tl.load(shares + slot)
    tl.store(y + token.to(tl.int64) * shape_n + column, total.to(y.dtype.element_ty), mask=inside)
