from __future__ import annotations

import numpy as np
import pytest

from halfbyte.errors import FormatError
from halfbyte.formats import BlockFormat, get_format, list_formats, register, registry, scales
from halfbyte.formats import codebooks as codebooks
from halfbyte.search import SEARCHES, encode

REQUIRED = {
    *("nvfp4", "mixfp4", "mixfp4_makora", "mixfp4_paper", "mixfp4_twos_complement", "if4", "mxfp4", "mxfp8"),
    *("hif4", "razer", "razer_e3m3", "iq4_nl", "nf4", "fp8_tensor", "fp8_channel", "fp8_block128"),
    *(f"int4{kind}_g{group}" for kind in ("", "_asym") for group in (16, 32, 64, 128)),
    *(f"affine{bits}_g{group}" for bits in (4, 8) for group in (32, 64, 128)),
}
ALONG_K = [n for n in list_formats() if get_format(n).block[0] == 1 and get_format(n).block[1] > 0]


def test_every_promised_format_is_registered() -> None:
    assert set(list_formats()) >= REQUIRED


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("int4", "int4_g128"),
        ("int4_asym", "int4_asym_g128"),
        ("fp8", "fp8_channel"),
        ("fp8_block", "fp8_block128"),
        ("affine", "affine4_g64"),
        ("affine8", "affine8_g64"),
        ("mixfp4_compressed_tensors", "mixfp4"),
    ],
)
def test_aliases_name_their_format(alias: str, name: str) -> None:
    assert get_format(alias) is get_format(name)


def test_a_format_object_stands_for_itself() -> None:
    assert get_format(get_format("nvfp4")) is get_format("nvfp4")


def test_an_unknown_format_names_the_nearest_ones() -> None:
    with pytest.raises(FormatError, match="unknown format 'mixfp5': did you mean mixfp4"):
        get_format("mixfp5")
    with pytest.raises(FormatError, match=r"known formats: .*nvfp4"):
        get_format("qqqqq")


def test_a_new_format_is_one_declaration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FORMATS", dict(registry._FORMATS))
    fp4_by_rows_of_64 = BlockFormat("fp4_g64", (codebooks.E2M1,), scales.FP16, (1, 64))
    register(fp4_by_rows_of_64)
    x = np.random.RandomState(0).standard_normal((4, 128)).astype(np.float32)
    assert np.abs(encode(x, "fp4_g64").decode() - x).max() < 0.6
    assert [s for s in SEARCHES if SEARCHES[s].problem(fp4_by_rows_of_64) is None] == ["absmax", "sweep", "exhaustive"]


@pytest.mark.parametrize("name", ALONG_K)
def test_columns_that_do_not_fill_blocks_are_refused(name: str) -> None:
    block = get_format(name).block[1]
    x = np.ones((2, block * 2 + 8), dtype=np.float32)
    with pytest.raises(FormatError, match=f"K = {block * 2 + 8} is not a multiple of the block size {block} of {name}"):
        encode(x, name, "absmax")


@pytest.mark.parametrize("shape", [(), (0,), (0, 64), (4, 0)])
def test_empty_weights_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match="is empty"):
        encode(np.ones(shape, dtype=np.float32), "nvfp4")


@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_block128"])
def test_a_vector_is_refused_where_a_scale_spans_rows(name: str) -> None:
    with pytest.raises(FormatError, match="needs a matrix"):
        encode(np.ones(128, dtype=np.float32), name)


@pytest.mark.parametrize("names", [("nvfp4",), ("new_format", "affine4"), ("int4",)])
def test_a_name_or_alias_that_is_taken_is_refused(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FORMATS", dict(registry._FORMATS))
    before = get_format("nvfp4")
    fmt = BlockFormat(names[0], (codebooks.E2M1,), scales.FP16, (1, 64))
    with pytest.raises(FormatError, match=f"the name '{names[-1]}' belongs to the format"):
        register(fmt, *names[1:])
    assert get_format("nvfp4") is before and "new_format" not in list_formats()
