from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.checkpoint.dtypes import BITS, nbytes
from halfbyte.checkpoint.header import parse_header
from halfbyte.checkpoint.layout import Layout, build_header
from halfbyte.errors import OutputError
from timing import within


def test_tensors_follow_the_header_in_the_order_given() -> None:
    layout = build_header([("b", "BF16", (2, 3)), ("a", "F32", ()), ("c", "U8", (0,)), ("d", "U8", (1,))])
    start = len(layout.header)
    assert layout.offsets == [start, start + 12, start + 16, start + 16]
    assert layout.total == start + 17


def test_the_header_is_compact_json_with_metadata_first() -> None:
    header = build_header([("a", "U8", (4,))]).header
    text = header[8:]
    assert int.from_bytes(header[:8], "little") == len(text)
    assert text.rstrip(b" ") == (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    )
    assert len(header) % 8 == 0


def test_own_metadata_replaces_the_default() -> None:
    layout = build_header([], {"format": "np", "made by": "x"})
    assert json.loads(layout.header[8:]) == {"__metadata__": {"format": "np", "made by": "x"}}


def test_names_may_be_any_unicode() -> None:
    layout = build_header([('ü"\\\n', "U8", (1,))])
    tensors, _ = parse_header(layout.header[8:], "x", layout.total)
    assert tensors[0].name == 'ü"\\\n'


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 5), max_size=4)),
        max_size=8,
    )
)
def test_a_built_header_parses_to_what_was_asked(wanted: dict[str, tuple[str, list[int]]]) -> None:
    entries = [(n, d, [*shape, 8] if BITS[d] < 8 else shape) for n, (d, shape) in wanted.items()]
    layout: Layout = build_header(entries)
    tensors, metadata = parse_header(layout.header[8:], "x", layout.total)
    found = {t.name: (t.dtype, list(t.shape), t.offset, t.nbytes) for t in tensors}
    assert found == {
        name: (dtype, shape, offset, nbytes(dtype, shape))
        for (name, dtype, shape), offset in zip(entries, layout.offsets, strict=True)
    }
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([("a", "U8", (1,)), ("a", "U8", (1,))], "name a twice"),
        ([("__metadata__", "U8", (1,))], "__metadata__ twice"),
        ([("a", "U9", (1,))], "tensor a cannot be written: unknown dtype"),
        ([("a", "F4", (3,))], "tensor a cannot be written: .* whole bytes"),
        ([("a", "U8", (-1,))], "tensor a has the impossible shape"),
        ([("\ud800", "U8", (1,))], "not valid Unicode"),
    ],
)
def test_an_impossible_output_is_refused(entries: list[tuple[str, str, tuple[int, ...]]], says: str) -> None:
    with pytest.raises(OutputError, match=says):
        build_header(entries)


def test_a_header_that_no_library_would_load_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("halfbyte.checkpoint.layout.MAX_HEADER_BYTES", 64)
    with pytest.raises(OutputError, match="smaller shards"):
        build_header([("a", "U8", (1,))])


def test_125000_tensors_are_laid_out_within_a_second_or_two() -> None:
    entries = [(f"model.layers.0.mlp.experts.{i}.down_proj.weight", "U8", (2048, 256)) for i in range(125_000)]
    layout = within(2, lambda: build_header(entries))  # about 0.3 s when nothing else runs
    assert layout.total - len(layout.header) == 125_000 * 2048 * 256
