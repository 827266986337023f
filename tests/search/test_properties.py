"""Laws that hold for every registered format and every search that applies to it; a new one is tested by itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.cases import (
    CASES,
    FORMATS,
    QUICK,
    block_errors,
    block_sizes,
    by_block,
    draw,
    fine_scales,
    not_above,
    same_scale,
    scale_values,
    weights,
)
from halfbyte.formats import BlockFormat, QuantizedTensor, get_format
from halfbyte.formats.packing import unpack_nibbles
from halfbyte.search import SEARCHES, encode

pytestmark = pytest.mark.slow

few = settings(max_examples=8, deadline=None, derandomize=True, database=None)
every_case = pytest.mark.parametrize(("name", "search"), QUICK)


def unpacked(q: QuantizedTensor) -> np.ndarray:
    return q.codes if q.codes.shape == q.shape else unpack_nibbles(q.codes)


def exact_again(fmt: object, search: str) -> bool:
    """Whether the scale of a decoded block is among the candidates that the search tries for it.

    Sweeps contain it, but for tables whose largest element may lie elsewhere than they expect of 4 bit integers and
    of E4M3. Absmax-like searches compute it, if each table holds its ``top`` in both signs. Formats with rounded
    offsets (affine) or micro exponents (HiF4) have no such candidate.
    """
    if not isinstance(fmt, BlockFormat):
        return False
    if search in ("sweep", "exhaustive"):
        return fmt.scale.ordered or all(t.kind in ("int_offset", "e4m3") for t in fmt.codebooks)
    return all({t.top, -t.top} <= set(t.values) for t in fmt.codebooks)


@every_case
@few
@given(data=st.data())
def test_arrays_have_the_declared_types_and_shapes(name: str, search: str, data: st.DataObject) -> None:
    x = data.draw(weights(name))
    q = encode(x, name, search)
    stored = {k: getattr(q, k) for k in ("codes", "scales", "global_scale", "offsets")}
    found = {k: (v.dtype, v.shape) for k, v in stored.items() if v is not None}
    assert found == {k: (np.dtype(d), s) for k, (d, s) in q.format.parts(x.shape).items()}
    assert q.nbytes == q.format.nbytes(x.shape)


@every_case
@few
@given(data=st.data())
def test_unused_codes_are_never_written(name: str, search: str, data: st.DataObject) -> None:
    q = encode(data.draw(weights(name)), name, search)
    if isinstance(q.format, BlockFormat):
        chosen = np.broadcast_to(q.format.spread(q.codebooks, q.shape), q.shape)
        for index, codebook in enumerate(q.format.codebooks):
            assert not np.isin(unpacked(q)[chosen == index], codebook.unused).any()
        assert q.codebooks.max() < len(q.format.codebooks)


@every_case
@few
@given(data=st.data())
def test_nothing_is_non_finite_and_no_non_zero_block_has_a_zero_scale(
    name: str, search: str, data: st.DataObject
) -> None:
    x = data.draw(weights(name, decades=30))
    q = encode(x, name, search)
    assert np.isfinite(q.decode()).all()
    scales = scale_values(q)
    assert np.isfinite(scales).all()
    used = np.abs(by_block(x, q.format)).max(axis=1) > 0
    assert (scales.reshape(-1)[used] != 0).all()


@every_case
@few
@given(data=st.data())
def test_decoded_values_are_encoded_again_without_loss(name: str, search: str, data: st.DataObject) -> None:
    x = data.draw(weights(name))
    q = encode(x, name, search)
    if not exact_again(q.format, search):
        return
    values = q.decode()
    again = encode(values, name, search, **same_scale(q))
    kept = np.ones(q.scales.size, dtype=bool)
    if search not in ("sweep", "exhaustive"):
        # subnormal scales are too coarse for absmax to find them again
        kept = fine_scales(q) | (scale_values(q).reshape(-1) == 0)
    first, second = (by_block(v, q.format)[kept] for v in (values, again.decode()))
    np.testing.assert_allclose(second, first, rtol=5e-7, atol=0)
    if search == "absmax" and isinstance(q.format, BlockFormat) and len(q.format.codebooks) == 1:
        assert np.array_equal(again.scales.reshape(-1)[kept], q.scales.reshape(-1)[kept])


@every_case
def test_encoding_decoded_values_loses_less_than_encoding_did(name: str, search: str) -> None:
    x = draw("normal", (8, 1024), 1)
    q = encode(x, name, search)
    again = encode(q.decode(), name, search, **same_scale(q))
    first = np.linalg.norm(q.decode().astype(np.float64) - x)
    second = np.linalg.norm(again.decode().astype(np.float64) - q.decode())
    assert second < 0.8 * first


@every_case
@few
@given(data=st.data())
def test_a_power_of_two_scales_the_decoded_values_exactly(name: str, search: str, data: st.DataObject) -> None:
    x = data.draw(weights(name))
    x = x * np.ldexp(np.float32(1), -np.frexp(np.abs(x).max())[1])  # HiF4 has no global scale and a narrow range
    factor = np.float32(2.0 ** data.draw(st.integers(-6, 6)))
    q, scaled = encode(x, name, search), encode(x * factor, name, search)
    values, expected = scaled.decode(), q.decode() * factor
    if q.global_scale is not None:
        assert np.array_equal(scaled.codes, q.codes)
        assert np.array_equal(scaled.scales, q.scales)
    else:
        # subnormal scales have other steps
        kept = fine_scales(q) & fine_scales(scaled)
        values, expected = by_block(values, q.format)[kept], by_block(expected, q.format)[kept]
    assert np.array_equal(values, expected)


@every_case
@few
@given(data=st.data())
def test_permuted_blocks_give_permuted_codes(name: str, search: str, data: st.DataObject) -> None:
    x = data.draw(weights(name))
    fmt = get_format(name)
    if fmt.block[0] > 1:
        x = np.concatenate([np.resize(x, fmt.block), np.resize(x[::-1], fmt.block)])
    q = encode(x, name, search)
    height = max(fmt.block[0], 1)
    order = np.random.RandomState(0).permutation(len(x) // height)
    p = encode(x.reshape(len(order), height, -1)[order].reshape(x.shape), name, search, **same_scale(q))
    assert np.array_equal(p.codes.reshape(len(order), -1), q.codes.reshape(len(order), -1)[order])
    if fmt.block[0] == 1 and fmt.block[1] > 0:
        count = x.size // fmt.block[1]
        order = np.random.RandomState(1).permutation(count)
        p = encode(x.reshape(count, -1)[order].reshape(x.shape), name, search, **same_scale(q))
        assert np.array_equal(p.codes.reshape(count, -1), q.codes.reshape(count, -1)[order])
        assert np.array_equal(p.scales.reshape(-1), q.scales.reshape(-1)[order])


@every_case
@few
@given(data=st.data())
def test_importance_lowers_the_weighted_error_of_every_block(name: str, search: str, data: st.DataObject) -> None:
    x = data.draw(weights(name))
    importance = np.exp(np.random.RandomState(data.draw(st.integers(0, 99))).uniform(-7, 7, x.shape[-1]))
    importance = (importance / importance.max()).astype(np.float32)
    plain = encode(x, name, search)
    weighted = encode(x, name, search, importance)
    size = np.sqrt(by_block(x.astype(np.float64) ** 2 * importance, plain.format).sum(axis=1))
    after, before = (block_errors(q, x, importance, SEARCHES[search].metric) for q in (weighted, plain))
    assert not_above(after, before, size)


@every_case
@few
@given(data=st.data())
def test_uniform_importance_changes_no_byte(name: str, search: str, data: st.DataObject) -> None:
    x = data.draw(weights(name))
    plain, uniform = encode(x, name, search), encode(x, name, search, np.full(x.shape[-1], 0.37))
    assert np.array_equal(plain.codes, uniform.codes)
    assert np.array_equal(plain.scales, uniform.scales)


@pytest.mark.parametrize("name", FORMATS)
@few
@given(data=st.data())
def test_a_wider_search_is_no_worse_in_any_block(name: str, data: st.DataObject) -> None:
    x = data.draw(weights(name))
    found = {}
    scale = same_scale(encode(x, name, "absmax"))
    for search in ("exhaustive", "sweep", "four_over_six", "absmax"):
        if (name, search) in CASES:
            found[search] = block_errors(encode(x, name, search, **scale), x)
    size = block_sizes(x, get_format(name))
    for wider, narrower in itertools.pairwise(found.values()):
        assert not_above(wider, narrower, size)


@every_case
def test_a_stack_is_encoded_as_its_members(name: str, search: str) -> None:
    r = np.random.RandomState(3)
    rows, columns = (4, 256) if get_format(name).block[0] < 2 else (130, 160)
    stack = r.standard_normal((2, 3, rows, columns)).astype(np.float32) * r.uniform(0.1, 9, (2, 3, 1, 1))
    stack = stack.astype(np.float32)
    whole = encode(stack, name, search)
    member = encode(stack[1, 2], name, search)
    assert np.array_equal(whole.codes[1, 2], member.codes)
    assert np.array_equal(whole.scales[1, 2], member.scales)
    assert np.array_equal(whole.decode()[1, 2], member.decode())
