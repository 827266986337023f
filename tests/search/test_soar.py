from __future__ import annotations

import numpy as np
import pytest

from halfbyte.errors import FormatError
from halfbyte.formats import BlockFormat, get_format
from halfbyte.search import encode
from halfbyte.search.soar import row_sums, soar_global_scale
from search.hessians import weight


def squared_error(w: np.ndarray, scale: np.ndarray, search: str = "sweep") -> float:
    return float(np.square(encode(w, "nvfp4", search, global_scale=scale).decode().astype(np.float64) - w).sum())


@pytest.mark.parametrize("search", ["absmax", "four_over_six", "sweep"])
def test_the_fitted_scale_is_no_worse_than_the_first(search: str) -> None:
    w = weight(64, 256)
    found = soar_global_scale([w], "nvfp4", search)
    assert np.isclose(squared_error(w, found.global_scale, search), min(found.errors), rtol=1e-6)
    assert min(found.errors) <= found.errors[0] and len(found.errors) <= 16


def test_block_scales_that_all_round_alike_are_corrected_by_the_tensor_scale() -> None:
    """With one code for every block the projection alone decides."""
    w = np.tile(np.array([6.0, 3.0, 1.0, 0.55] * 4, dtype=np.float32), (8, 4)) * np.float32(0.01)
    found = soar_global_scale([w], "nvfp4", "absmax", tolerance=0.0)
    assert min(found.errors) < found.errors[0]


def test_importance_decides_what_is_fitted() -> None:
    w = weight(32, 64)
    importance = np.where(np.arange(64) < 16, 100.0, 1.0)
    plain, weighted = (soar_global_scale([w], "nvfp4", "absmax", i).global_scale for i in (None, importance))
    assert plain != weighted


def test_experts_have_scales_of_their_own_and_fused_weights_one() -> None:
    w = weight(3, 8, 64) * np.float32([[[1]], [[10]], [[0.1]]])
    found = soar_global_scale([w, 2 * w], "mixfp4")
    assert found.global_scale.shape == (3,) and len(set(found.global_scale.tolist())) == 3
    assert found.global_scale.dtype == np.float32


def test_experts_are_fitted_as_if_each_were_alone() -> None:
    w = weight(4, 16, 64) * np.float32([[[1]], [[10]], [[0.1]], [[3]]])
    importance = np.exp(weight(4, 64))
    found = soar_global_scale([w], "nvfp4", "absmax", importance)
    each = [soar_global_scale([w[i]], "nvfp4", "absmax", importance[i]) for i in range(4)]
    assert found.global_scale.tolist() == [float(one.global_scale) for one in each]
    assert np.isclose(min(found.errors), sum(min(one.errors) for one in each))
    assert len(found.errors) == max(len(one.errors) for one in each)


@pytest.mark.parametrize("columns", [16, 96, 1024])
@pytest.mark.parametrize("global_scale_inv", [False, True])
def test_sums_of_rows_do_not_depend_on_the_rows_around_them(columns: int, global_scale_inv: bool) -> None:
    w, fmt = weight(301, columns), get_format("mixfp4")
    assert isinstance(fmt, BlockFormat)
    more = fmt, "sweep", np.float32(1e-3), np.exp(weight(columns)), global_scale_inv
    parts = [row_sums(w[a:b], *more) for a, b in ((0, 1), (1, 8), (8, 200), (200, 301))]
    np.testing.assert_array_equal(row_sums(w, *more), np.concatenate(parts))


def test_a_stored_reciprocal_is_fitted_as_what_it_decodes_to() -> None:
    w = weight(64, 256)
    found = soar_global_scale([w], "nvfp4", "absmax", global_scale_inv=True)
    decoded = encode(w, "nvfp4", "absmax", global_scale_inv=1 / found.global_scale).decode().astype(np.float64)
    assert np.isclose(np.square(decoded - w).sum(), min(found.errors), rtol=1e-12)


def test_weights_of_zero_keep_a_scale_of_one() -> None:
    assert soar_global_scale([np.zeros((4, 32), dtype=np.float32)], "nvfp4").global_scale == 1


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(FormatError, match="mxfp4 has no global scale"):
        soar_global_scale([weight(4, 32)], "mxfp4")
    with pytest.raises(FormatError, match="the same leading shape"):
        soar_global_scale([weight(4, 32), weight(2, 4, 32)], "nvfp4")
    with pytest.raises(FormatError, match="the same leading shape"):
        soar_global_scale([], "nvfp4")
    with pytest.raises(FormatError, match="importance has shape"):
        soar_global_scale([weight(2, 4, 32)], "nvfp4", importance=np.ones(16))
