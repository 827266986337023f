"""Every format answers the questions that other rooms ask, whatever kind of format it is."""

import json
from dataclasses import replace

import numpy as np
import pytest

import halfbyte
from halfbyte.errors import FormatError
from halfbyte.formats import QuantizedTensor, get_format, list_formats

ALL = [*list_formats(), "nvfp4_hadamard", "mixfp4_duquant"]


def quantized(name: str) -> QuantizedTensor:
    """A small tensor of a format; 128 columns hold whole blocks of every format."""
    rng = np.random.default_rng(3)
    return halfbyte.encode(rng.standard_normal((2, 16, 128)).astype(np.float32), name, search="absmax")


@pytest.mark.parametrize("name", ALL)
def test_a_format_describes_itself_in_json(name: str) -> None:
    fmt = get_format(name)
    facts = fmt.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["block"], facts["bits"]) == (list(fmt.block), fmt.bits)


@pytest.mark.parametrize("name", ALL)
def test_scales_have_the_shape_that_the_format_states(name: str) -> None:
    tensor = quantized(name)
    assert tensor.scales.shape == tensor.format.scales_shape(tensor.shape)
    values, chosen = tensor.format.split_scales(tensor.scales)
    assert values.shape == tensor.scales.shape and values.dtype == np.float32
    assert (chosen is None) == (len(tensor.format.codebooks) < 2)


@pytest.mark.parametrize("name", [n for n in ALL if get_format(n).rotation is None])
def test_decoded_values_lie_in_the_range_that_the_format_states(name: str) -> None:
    tensor = quantized(name)
    ends = tensor.format.value_range(tensor)
    values = tensor.decode()
    assert all(end.shape == tensor.shape for end in ends)
    assert (values >= np.minimum(*ends)).all() and (values <= np.maximum(*ends)).all()


@pytest.mark.parametrize(
    ("name", "has_global_scale", "shares_scale"),
    [
        ("nvfp4", True, True),
        ("fp8_tensor", False, True),
        ("fp8_channel", False, False),
        ("mxfp4", False, False),
        ("affine4", False, False),
        ("hif4", False, False),
        ("nvfp4_hadamard", True, True),
    ],
)
def test_one_number_scales_a_matrix_by_a_global_scale_or_a_single_block(
    name: str, has_global_scale: bool, shares_scale: bool
) -> None:
    fmt = get_format(name)
    assert (fmt.has_global_scale, fmt.shares_scale) == (has_global_scale, shares_scale)


@pytest.mark.parametrize(("name", "offset"), [("affine4", "bias"), ("int4_asym", "zero_point"), ("int4", None)])
def test_offsets_are_named(name: str, offset: str | None) -> None:
    assert get_format(name).offset == offset


def test_a_zero_scale_is_seen_under_a_selector_bit() -> None:
    tensor = quantized("mixfp4")
    scales = tensor.scales.copy()
    scales[0, 0, 0], scales[1, 2, 3] = 0x80, 0
    zero = tensor.format.zero_scales(replace(tensor, scales=scales))
    assert np.argwhere(zero).tolist() == [[0, 0, 0], [1, 2, 3]]


@pytest.mark.parametrize("name", ALL)
def test_finite_tensors_are_known_as_such(name: str) -> None:
    tensor = quantized(name)
    assert tensor.format.is_finite(tensor)


def test_a_nan_among_scales_or_codes_is_found() -> None:
    mx, fp8 = quantized("mxfp4"), quantized("fp8_channel")
    scales, codes = mx.scales.copy(), fp8.codes.copy()
    scales[0, 3, 1], codes[1, 2, 3] = 255, 0xFF
    assert not mx.format.is_finite(replace(mx, scales=scales))
    assert not fp8.format.is_finite(replace(fp8, codes=codes))


def test_scale_factors_are_those_of_decoding() -> None:
    tensor = quantized("nvfp4")
    factors = tensor.format.scale_factors(tensor)
    assert factors.shape == (2, 256)
    expected = tensor.format.decode_scales(tensor)[0]  # type: ignore[attr-defined]
    found = np.stack([factors[i][tensor.scales[i]] for i in range(2)])
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(FormatError, match="no scale bytes"):
        get_format("int4").scale_factors(quantized("int4"))


def test_a_rotated_format_knows_its_plain_one() -> None:
    rotated = get_format("mxfp4_hadamard")
    assert rotated.rotation is not None and rotated.plain == get_format("mxfp4")
    assert all(get_format(n).plain is get_format(n) for n in ("mxfp4", "affine4", "hif4"))
