"""The very instructions that kernels run, for all scale bytes, selectors and indices."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.gpu.ptx_machine import Words, run_ptx
from tests.gpu.weights import FORMATS

from halfbyte.formats import get_format
from halfbyte.gpu.ptx_text import chosen_registers, scale_text, word_text
from halfbyte.gpu.table_layout import TYPES, Operand, TableLayout, describe_tables
from halfbyte.gpu.word_packing import _words_of
from halfbyte.kernels.linear import NoKernelError

OPERANDS: tuple[Operand, ...] = ("bfloat16", "float16")
CASES = [(n, o) for n in FORMATS for o in OPERANDS if o == "bfloat16" or describe_tables(get_format(n)).scale == "e4m3"]


def every_index() -> Words:
    """Words in which every element takes every index: indices [16, 8]."""
    return (np.arange(16)[:, None] + 3 * np.arange(8)) % 16


def word_bits(indices: Any, layout: TableLayout) -> Words:
    lanes = np.zeros((1, 1, 1, 2, 8, 4, 2, 2, 8), dtype=np.uint8)
    lanes.reshape(-1, 8)[: len(indices)] = indices
    return _words_of(lanes, layout).reshape(-1)[: len(indices)].view(np.uint32)


def scale_words(layout: TableLayout) -> list[Words]:
    """All scale bytes, each in all four places; or many scales of 16 bits."""
    if layout.narrow:
        stored = np.arange(256, dtype=np.uint32)
        places = [stored, (stored * 7 + 3) % 256, (stored * 5 + 11) % 256, 255 - stored]
        return [sum((p << np.uint32(8 * i) for i, p in enumerate(places)), np.uint32(0))]
    values = np.exp2(np.linspace(-12, 8, 4 * 256)).astype(TYPES["bfloat16" if layout.scale == "bf16" else "float16"])
    return list(values.view(np.uint16).reshape(2, 256, 2).copy().view(np.uint32)[..., 0])


def stored_scales(words: list[Words], layout: TableLayout) -> Any:
    """Scales of the blocks (r, c) as they are stored: [4, words]."""
    if layout.narrow:
        return np.stack([words[0] >> np.uint32(8 * i) & np.uint32(255) for i in range(4)])
    return np.stack([w >> np.uint32(16 * r) & np.uint32(0xFFFF) for w in words for r in (0, 1)])


def exact_scales(name: str, stored: Any, layout: TableLayout) -> Any:
    if layout.narrow:
        return layout.scale_values(get_format(name))[stored]
    dtype: Any = ml_dtypes.bfloat16 if layout.scale == "bf16" else np.float16
    return stored.astype(np.uint16).view(dtype).astype(np.float32)


@pytest.mark.parametrize(("name", "operand"), CASES)
def test_words_decode_to_the_weights_of_the_format(name: str, operand: Operand) -> None:
    layout = describe_tables(get_format(name))
    words = scale_words(layout)
    stored = stored_scales(words, layout)
    out = run_ptx(scale_text(layout, operand), 12 if layout.chooses else 4, words)
    indices = every_index()
    bits = word_bits(indices, layout)
    exact = exact_scales(name, stored, layout).astype(np.float64)
    tables = layout.values().astype(np.float64)
    # NaN bytes and powers of two beyond the reach of activations are no scales of weights
    sane = np.isfinite(exact) & (exact != 0) & (np.abs(exact) < 2.0**100) & (np.abs(exact) > 2.0**-100)
    if layout.scale == "e4m3":
        sane &= stored & 127 != 127
    for block in range(4):
        selector = stored[block] >> 7 if layout.chooses else np.zeros(256, dtype=int)
        extra = [out[4 + block], out[8 + block]] if layout.chooses else []
        for row, word in enumerate(bits):
            inputs = [np.full(256, word, dtype=np.uint32), out[block], *extra]
            halves = run_ptx(word_text(layout, operand), 8, inputs)
            got = np.stack([h.astype(np.uint16).view(TYPES[operand]).astype(np.float64) for h in halves], axis=-1)
            wanted = tables[selector][:, indices[row]] * exact[block][:, None]
            assert_close(got[sane[block]], wanted[sane[block]], layout, operand)


def assert_close(got: Any, wanted: Any, layout: TableLayout, operand: Operand) -> None:
    """Exact where the format's values are, else within the roundings of table, factor and product."""
    whole = all(v == int(v) for table in layout.tables for v in table) and all(f in (0.5, 1.0) for f in layout.factors)
    short = max(abs(v) for table in layout.tables for v in table) < 16
    if whole and short and layout.scale in ("e4m3", "e8m0"):
        np.testing.assert_array_equal(got, wanted)
    else:
        rounding = 2.0**-8 if operand == "bfloat16" else 2.0**-11
        np.testing.assert_allclose(got, wanted, rtol=3 * rounding, atol=2.0**-24 if operand == "float16" else 0)


@pytest.mark.parametrize("byte", range(0, 256, 5))
def test_a_zero_scale_is_zero_under_every_selector(byte: int) -> None:
    layout = describe_tables(get_format("mixfp4"))
    word = np.full(1, (byte & 0x80) * 0x01010101, dtype=np.uint32)
    scales = run_ptx(scale_text(layout, "bfloat16"), 12, [word])[:4]
    assert all(int(s[0]) & 0x7FFF7FFF == 0 for s in scales)


def test_nvfp4_needs_no_selected_register_and_mixfp4_two() -> None:
    assert chosen_registers(describe_tables(get_format("nvfp4")), "bfloat16") == []
    assert len(chosen_registers(describe_tables(get_format("mixfp4")), "bfloat16")) == 2


def test_scales_beyond_fp16_are_refused_there() -> None:
    with pytest.raises(NoKernelError, match="e8m0 scales do not fit into FP16"):
        scale_text(describe_tables(get_format("mxfp4")), "float16")
