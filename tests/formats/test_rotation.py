from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import kernels
from halfbyte.errors import FormatError
from halfbyte.formats import get_format, list_formats, rotated
from halfbyte.formats.rotation import END, ROTATIONS, hadamard_matrix, plain_swaps, rotate_reference
from halfbyte.search import encode
from search.test_rotated_space import rotation_matrices

SIZES = {16: "nvfp4", 32: "mxfp4", 64: "int4_g64", 128: "int4_g128"}


def swaps(rng: np.random.Generator, *shape: int, size: int) -> np.ndarray:
    """Any steps, with gaps and numbers that are no channel."""
    return rng.integers(0, 2 * size, (*shape, 16)).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SIZES)), st.sampled_from(sorted(ROTATIONS)), st.booleans(), st.integers(0, 1 << 30))
def test_every_backend_rotates_to_the_same_bits(size: int, name: str, inverse: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    fmt = get_format(f"{SIZES[size]}_{name}")
    lead, blocks = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    steps = swaps(rng, lead, blocks, size=size) if ROTATIONS[name].steps else None
    x = (rng.standard_t(2, (lead, 3, blocks * size)) * 10.0 ** rng.integers(-30, 30)).astype(np.float32)
    expected = x.copy()
    rotate_reference(expected, size, steps, inverse)
    for backend in kernels.backends():
        found = x.copy()
        with kernels.use_backend(backend):
            fmt.rotate_in_place(found, steps, inverse)
        assert found.tobytes() == expected.tobytes(), backend


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_the_product_with_its_matrix_and_is_undone(size: int) -> None:
    rng = np.random.default_rng(0)
    fmt, steps = get_format(f"{SIZES[size]}_duquant"), swaps(rng, 2, size=size)
    x = rng.standard_normal((5, 2 * size)).astype(np.float32)
    turned = x.copy()
    fmt.rotate_in_place(turned, steps)
    each = [part @ matrix for part, matrix in zip(np.split(x, 2, axis=1), rotation_matrices(size, steps), strict=True)]
    assert np.allclose(turned, np.concatenate(each, axis=1), atol=1e-5)
    fmt.rotate_in_place(turned, steps, inverse=True)
    assert np.allclose(turned, x, atol=1e-5)


def test_the_hadamard_matrix_is_flat_and_its_own_inverse() -> None:
    for size in SIZES:
        h = hadamard_matrix(size)
        assert np.allclose(h @ h, np.eye(size)) and np.allclose(np.abs(h), size**-0.5) and (h == h.T).all()


def test_without_steps_duquant_is_the_hadamard_matrix() -> None:
    x = np.random.default_rng(1).standard_normal((2, 4, 64)).astype(np.float32)
    plain, other = encode(x, "mxfp4_hadamard"), encode(x, "mxfp4_duquant")
    assert np.array_equal(plain.codes, other.codes) and np.array_equal(plain.decode(), other.decode())
    assert other.rotation is not None and np.array_equal(other.rotation, plain_swaps((2, 2, 16)))
    none = encode(x, "mxfp4_duquant", rotation=np.full((2, 2, 16), END, np.uint8))
    assert np.array_equal(none.decode(), encode(x, "mxfp4").decode())


@pytest.mark.parametrize("name", ["mxfp4_hadamard", "mxfp4_duquant", "nvfp4_hadamard", "mixfp4_duquant"])
def test_codes_are_those_of_the_rotated_weight_in_the_plain_format(name: str) -> None:
    rng = np.random.default_rng(2)
    fmt = get_format(name)
    x = rng.standard_t(4, (3, 8, 128)).astype(np.float32)
    steps = swaps(rng, 3, 128 // fmt.block[1], size=fmt.block[1]) if fmt.rotation.steps else None
    turned = x.copy()
    fmt.rotate_in_place(turned, steps)
    tensor, plain = encode(x, fmt, rotation=steps), encode(turned, fmt.plain)
    assert np.array_equal(tensor.codes, plain.codes) and np.array_equal(tensor.scales, plain.scales)
    restored = plain.decode()
    fmt.rotate_in_place(restored, steps, inverse=True)
    assert tensor.decode().tobytes() == restored.tobytes() == tensor.format.decode(tensor).tobytes()


def test_an_outlier_costs_mxfp4_less_once_it_is_spread() -> None:
    x = np.random.default_rng(3).standard_normal((64, 256)).astype(np.float32)
    x[:, ::32] *= 30
    lost = {name: float(np.square(encode(x, name).decode() - x).sum()) for name in ("mxfp4", "mxfp4_hadamard")}
    assert lost["mxfp4_hadamard"] < 0.9 * lost["mxfp4"]


@pytest.mark.parametrize("name", [f for f in list_formats() if getattr(get_format(f), "rotation", None)])
def test_a_stack_is_encoded_as_its_members_in_the_declared_arrays(name: str) -> None:
    rng = np.random.default_rng(4)
    fmt = get_format(name)
    x = rng.standard_t(3, (3, 6, 4 * fmt.block[1])).astype(np.float32)
    steps = swaps(rng, 3, 4, size=fmt.block[1]) if fmt.rotation.steps else None
    whole = encode(x, fmt, rotation=steps)
    for part, (kind, shape) in fmt.parts(x.shape).items():
        array = getattr(whole, part)
        assert array.dtype == kind and array.shape == shape
    for i in range(3):
        one = encode(x[i], fmt, rotation=None if steps is None else steps[i])
        assert np.array_equal(one.codes, whole.codes[i]) and np.array_equal(one.decode(), whole.decode()[i])
    assert np.square(whole.decode() - x).sum() < 0.05 * np.square(x).sum()


@pytest.mark.parametrize("name", ["mxfp4_duquant", "mixfp4_hadamard"])
def test_errors_are_those_of_decoded_values_and_equal_values_have_none(name: str) -> None:
    x = np.random.default_rng(5).standard_t(3, (8, 256)).astype(np.float32)
    while_encoding, later, none = (kernels.ErrorStats() for _ in range(3))
    tensor = encode(x, name, stats=while_encoding)
    kernels.compare(tensor, x, later)
    assert later.squared_error == float(np.square((tensor.decode() - x).astype(np.float64)).sum())
    assert while_encoding.squared_error == pytest.approx(later.squared_error, rel=1e-5)
    assert (while_encoding.saturated, while_encoding.codebook_blocks) == (later.saturated, later.codebook_blocks)
    assert kernels.compare(tensor, tensor.decode(), none) and none.max_error == none.squared_error == 0


def test_names_of_formats_in_rotated_space_are_made_of_both() -> None:
    fmt = get_format("int4_hadamard")
    assert fmt.name == "int4_g128_hadamard" and fmt.plain == get_format("int4_g128")
    assert get_format("mxfp4_duquant") is get_format("mxfp4_duquant") and get_format("mxfp4").plain.rotation is None
    assert get_format("mxfp4_duquant").nbytes((64, 256)) == get_format("mxfp4").nbytes((64, 256)) + 8 * 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotated(get_format("fp8_channel"), "hadamard"), "fp8_channel cannot be rotated"),
        (lambda: get_format("hif4_hadamard"), "hif4 cannot be rotated"),
        (lambda: rotated(get_format("mxfp4_duquant"), "hadamard"), "rotated weights already"),
        (lambda: encode(np.ones((2, 64)), "mxfp4_hadamard", importance=np.ones(64)), "mixes the channels"),
        (lambda: encode(np.ones((2, 64)), "mxfp4", rotation=np.zeros((2, 16), np.uint8)), "in no rotated space"),
        (lambda: encode(np.ones((2, 64)), "mxfp4_duquant", rotation=np.zeros((3, 16), np.uint8)), "needs uint8"),
        (lambda: encode(np.full((2, 64), np.inf), "mxfp4_hadamard"), "infinity"),
        (lambda: encode(np.full((2, 64), 3e38), "mxfp4_hadamard"), "leaves the range of FP32"),
        (lambda: hadamard_matrix(24), "power of two"),
    ],
)
def test_what_cannot_be_rotated_is_refused(call, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        call()
