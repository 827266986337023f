"""Masters: where training starts."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.formats import QuantizedTensor
from halfbyte.search import encode
from halfbyte.train.masters import master_of
from halfbyte.train.rounding import round_given


def pair() -> tuple[np.ndarray, QuantizedTensor]:
    """A weight, and codes of it that are not the nearest ones, as GPTQ leaves them."""
    rng = np.random.default_rng(2)
    weight = rng.normal(0, 0.02, (16, 64)).astype(np.float32)
    tensor = encode(weight, "nvfp4", "sweep")
    return weight, tensor.format.round_to(tensor, weight + rng.normal(0, 0.004, weight.shape).astype(np.float32))


def test_cells_keep_every_code_and_are_nearer_to_the_weight() -> None:
    weight, tensor = pair()
    master = master_of("w", tensor, weight, "cell")
    np.testing.assert_array_equal(round_given(tensor, master).tensor.decode(), tensor.decode())
    assert np.abs(master - weight).sum() < 0.5 * np.abs(tensor.decode() - weight).sum()


def test_a_weight_inside_its_cell_is_its_own_master() -> None:
    weight, _ = pair()
    tensor = encode(weight, "nvfp4", "sweep")
    master = master_of("w", tensor, weight, "cell")
    assert (master == weight).mean() > 0.8


def test_decoded_and_original_masters_are_just_these() -> None:
    weight, tensor = pair()
    np.testing.assert_array_equal(master_of("w", tensor, weight, "decoded"), tensor.decode())
    np.testing.assert_array_equal(master_of("w", tensor, weight, "original"), weight)


def test_another_models_weight_is_refused() -> None:
    _, tensor = pair()
    with pytest.raises(HalfbyteError, match="not what the codes"):
        master_of("w", tensor, np.random.default_rng(9).normal(0, 1, (16, 64)).astype(np.float32), "cell")


def test_codes_that_rounding_never_gives_are_refused() -> None:
    weight, _ = pair()
    odd = encode(weight, "mixfp4_twos_complement", "sweep")
    odd.codes[...], odd.scales[...] = 0x88, odd.scales | 0x80  # -8, of the codebook of integers
    with pytest.raises(HalfbyteError, match="never writes"):
        master_of("w", odd, None, "decoded")
