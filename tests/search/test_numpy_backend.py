"""The reference backend: every matrix of a stack, and every row, is encoded as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest

from formats.cases import FORMATS, draw, shape_for
from halfbyte.formats import get_format
from halfbyte.kernels import use_backend
from halfbyte.search import encode


@pytest.mark.parametrize("name", FORMATS)
def test_a_stack_is_encoded_matrix_by_matrix_each_with_its_own_importance(name: str) -> None:
    shape = (2, *shape_for(get_format(name)))
    x = draw("heavy", shape, 3)
    importance = np.abs(draw("normal", (2, shape[-1]), 4)) + np.float32(0.01)
    with use_backend("reference"):
        stack = encode(x, name, "sweep", importance)
        for i in range(2):
            alone = encode(x[i], name, "sweep", importance[i])
            assert stack.codes[i].tobytes() == alone.codes.tobytes()
            assert stack.scales[i].tobytes() == alone.scales.tobytes()


@pytest.mark.parametrize("name", ["nvfp4", "int4_g32", "affine4_g64", "hif4"])
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    x = draw("normal", (5, 128), 1)
    importance = np.abs(draw("normal", (128,), 2))
    with use_backend("reference"):
        scale = encode(x, name).global_scale
        whole = encode(x, name, "sweep", importance, global_scale=scale)
        rows = [encode(x[i : i + 1], name, "sweep", importance, global_scale=scale) for i in range(5)]
    assert whole.codes.tobytes() == b"".join(row.codes.tobytes() for row in rows)
    assert whole.scales.tobytes() == b"".join(row.scales.tobytes() for row in rows)


@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_block128", "nvfp4", "int4_asym_g32"])
def test_important_columns_lose_less(name: str) -> None:
    x = draw("normal", (128, 128), 5)
    importance = np.full(128, 1e-6, np.float32)
    importance[:8] = 1
    with use_backend("reference"):
        plain, weighted = (encode(x, name, "sweep", i).decode() for i in (None, importance))
    errors = [float(np.square(y - x)[:, :8].sum()) for y in (plain, weighted)]
    assert errors[1] < errors[0] or name == "fp8_tensor"  # its one scale is that of the largest element
