from __future__ import annotations

import numpy as np
import pytest

from formats.cases import QUICK, draw
from halfbyte import kernels
from halfbyte.formats import get_format
from halfbyte.kernels import ErrorStats
from halfbyte.kernels.stats import reference_stats
from halfbyte.search import encode
from kernels.cases import NATIVE, inputs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "search"), QUICK)
def test_errors_measured_while_encoding_are_those_of_the_decoded_values(name: str, search: str) -> None:
    fmt = get_format(name)
    for kind, x in inputs(fmt).items():
        for isa in NATIVE:
            with kernels.use_backend(isa):
                encoding, comparing = ErrorStats(), ErrorStats()
                tensor = encode(x, fmt, search, stats=encoding)
                kernels.compare(tensor, x, comparing)
            expected = reference_stats(tensor, x)
            for found in (encoding, comparing):
                assert found.squared_error == pytest.approx(expected.squared_error, rel=1e-12), (kind, isa)
                assert found.squares == pytest.approx(expected.squares, rel=1e-12), (kind, isa)
                assert found.max_error == expected.max_error, (kind, isa)
                assert found.saturated == expected.saturated, (kind, isa)
                assert found.codebook_blocks == expected.codebook_blocks, (kind, isa)
                assert found.elements == x.size


@pytest.mark.parametrize("name", ["mixfp4", "int4_g32", "affine4_g32", "hif4", "fp8_channel", "mxfp8"])
def test_sums_do_not_depend_on_the_instruction_set(name: str) -> None:
    x = draw("heavy", (37, 512), 3)
    found = []
    for isa in NATIVE:
        with kernels.use_backend(isa):
            stats = ErrorStats()
            encode(x, name, "sweep", stats=stats)
            found.append(stats)
    assert all(stats == found[0] for stats in found)


def test_a_divisor_is_decoded_with_while_errors_are_measured() -> None:
    x = draw("normal", (4, 64), 5)
    stats = ErrorStats()
    tensor = encode(x, "nvfp4", global_scale_inv=np.float32(900), stats=stats)
    error = tensor.decode().astype(np.float64) - x
    assert stats.squared_error == pytest.approx(float((error**2).sum()), rel=1e-12)
    assert tensor.global_scale == np.float32(1) / np.float32(900)


def test_values_that_the_format_holds_have_no_error() -> None:
    exact = encode(draw("normal", (16, 256), 6), "nvfp4", global_scale=np.float32(2.0**-10)).decode()
    stats = ErrorStats()
    encode(exact, "nvfp4", global_scale=np.float32(2.0**-10), stats=stats)
    assert (stats.squared_error, stats.max_error, stats.relmse) == (0, 0, 0)


def test_statistics_of_slices_add_up_to_those_of_the_whole() -> None:
    x = draw("normal", (64, 256), 7)
    whole, parts = ErrorStats(), ErrorStats()
    encode(x, "mixfp4", "absmax", global_scale=np.float32(0.001), stats=whole)
    for part in np.split(x, 4):
        encode(part, "mixfp4", "absmax", global_scale=np.float32(0.001), stats=parts)
    assert parts.squared_error == pytest.approx(whole.squared_error, rel=1e-12)
    assert (parts.elements, parts.max_error, parts.codebook_blocks) == (
        whole.elements,
        whole.max_error,
        whole.codebook_blocks,
    )
    assert sum(whole.codebook_blocks) == x.size // 16


@pytest.mark.parametrize("isa", [*NATIVE, "reference"])
def test_values_that_decode_to_no_number_are_reported(isa: str) -> None:
    x = draw("normal", (4, 64), 8)
    with kernels.use_backend(isa):
        tensor = encode(x, "nvfp4", "absmax")
        tensor.scales[1, 2] = 0x7F
        assert not kernels.compare(tensor, x, ErrorStats())
