"""How the kernels see a format."""

from __future__ import annotations

import numpy as np
import pytest
from tests.gpu.weights import FORMATS

from halfbyte.formats import BlockFormat, get_format
from halfbyte.gpu.table_layout import describe_tables
from halfbyte.kernels.linear import NoKernelError


@pytest.mark.parametrize("name", FORMATS)
def test_tables_hold_the_values_of_the_codebooks(name: str) -> None:
    fmt = get_format(name)
    assert isinstance(fmt, BlockFormat)
    layout = describe_tables(fmt)
    values = layout.values()
    for table, codebook, recode in zip(values, fmt.codebooks, layout.recode, strict=False):
        used = [code for code in range(16) if code not in codebook.unused]
        np.testing.assert_array_equal(table[np.array(recode)[used]], codebook.array[used])


@pytest.mark.parametrize("name", [n for n in FORMATS if describe_tables(get_format(n)).narrow])
def test_scale_bytes_have_the_values_of_the_format(name: str) -> None:
    fmt, layout = get_format(name), describe_tables(get_format(name))
    stored = np.array([0, 1, 8, 60, 126, 129, 200, 254], dtype=np.uint8)
    values, _ = fmt.split_scales(stored)
    signs = np.where((stored > 127) & layout.negates, -1, 1)
    np.testing.assert_array_equal(layout.scale_values(fmt)[stored], np.abs(values) * signs)


def test_kinds_of_tables() -> None:
    kinds = {name: describe_tables(get_format(name)).kind for name in FORMATS}
    assert kinds["mixfp4"] == kinds["if4"] == kinds["nvfp4"] == kinds["mxfp4"] == "mirrored"
    assert kinds["razer"] == kinds["nf4"] == kinds["iq4_nl"] == "table"
    assert kinds["int4_g128"] == kinds["q4_0"] == "linear"


@pytest.mark.parametrize("name", ["razer_e3m3", "mxfp8", "hif4", "mxfp4_hadamard", "fp8_tensor", "affine4_g64"])
def test_formats_without_a_product_are_named(name: str) -> None:
    with pytest.raises(NoKernelError, match=f"format {name}; decode"):
        describe_tables(get_format(name))
