from __future__ import annotations

import numpy as np
import pytest
from tests.search.objective import weighted_error

from halfbyte.errors import FormatError
from halfbyte.kernels import backends, use_backend
from halfbyte.search.gptq import gptq, prepare
from halfbyte.search.output_metric import prepare_output
from halfbyte.search.row_feedback import subtract_products
from search.hessians import hessian, weight
from search.test_gptq import FORMATS, MODES, same


def outputs(rows: int, seed: int = 7) -> np.ndarray:
    """Gradients of rows that are alike in size and share a few directions."""
    r = np.random.RandomState(seed)
    g = r.standard_normal((1024, rows)) + r.standard_normal((1024, 6)) @ r.standard_normal((6, rows))
    return np.asarray(g.T @ g)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ["none", "act"])
@pytest.mark.parametrize("name", ["nvfp4", "mixfp4", "int4_asym_g32", "mxfp4"])
def test_the_identity_as_metric_changes_no_bit(name: str, order, mode) -> None:
    w, h = weight(21, 128), hessian(128)
    plain = gptq(w, name, "sweep", h, mode=mode, order=order)
    assert same(gptq(w, name, "sweep", h, mode=mode, order=order, output=np.eye(21)), plain)


@pytest.mark.parametrize("name", FORMATS)
def test_row_feedback_lowers_the_weighted_error_of_every_format(name: str) -> None:
    w, h, g = weight(48, 256), hessian(256), outputs(48)
    plain = weighted_error(gptq(w, name, "sweep", h).decode() - w, h, g)
    assert weighted_error(gptq(w, name, "sweep", h, output=g).decode() - w, h, g) < 0.8 * plain


@pytest.mark.parametrize("mode", ["in_loop", "local_hessian", "static"])
@pytest.mark.parametrize("name", ["mixfp4", "mxfp4", "int4_asym_g32"])
def test_every_backend_gives_the_same_bits(name: str, mode) -> None:
    w, h, g = weight(18, 64), hessian(64), outputs(18)
    w[3, 32:] = 0
    found = []
    for backend in backends():
        with use_backend(backend):
            found.append(gptq(w, name, "sweep", h, mode=mode, order="act", output=g))
    assert all(same(found[0], other) for other in found[1:])


@pytest.mark.parametrize("search", ["absmax", "four_over_six", "sweep"])
def test_every_search_gives_the_same_bits_on_every_backend(search: str) -> None:
    w, h, g = weight(17, 64), hessian(64), outputs(17)
    found = []
    for backend in backends():
        with use_backend(backend):
            found.append(gptq(w, "nvfp4", search, h, output=g))
    assert all(same(found[0], other) for other in found[1:])


def test_given_scales_are_kept() -> None:
    w, h, g = weight(20, 128), hessian(128), outputs(20)
    given = gptq(w, "nvfp4", "sweep", h)
    found = gptq(w, "nvfp4", "sweep", h, mode="static", order="act", given=given, output=g)
    assert found.scales.tobytes() == given.scales.tobytes() and found.codes.tobytes() != given.codes.tobytes()


def test_experts_have_metrics_of_their_own() -> None:
    w, h = weight(3, 17, 64), hessian(64)
    metrics = [prepare_output(outputs(17, seed)) for seed in range(2)]
    whole = gptq(w, "nvfp4", "sweep", prepare(h, "nvfp4"), output=[*metrics, None])
    for i, output in enumerate([*metrics, None]):
        one = gptq(w[i], "nvfp4", "sweep", prepare(h, "nvfp4"), output=output)
        assert one.codes.tobytes() == whole.codes[i].tobytes() and one.scales.tobytes() == whole.scales[i].tobytes()


def test_a_rotated_format_takes_row_feedback() -> None:
    w, h, g = weight(32, 128), hessian(128), outputs(32)
    plain = gptq(w, "mxfp4_hadamard", "sweep", h)
    found = gptq(w, "mxfp4_hadamard", "sweep", h, output=g)
    assert weighted_error(found.decode() - w, h, g) < weighted_error(plain.decode() - w, h, g)


def test_metrics_that_do_not_fit_are_refused() -> None:
    w, h = weight(4, 64), hessian(64)
    for output in (np.eye(5), [prepare_output(np.eye(4))] * 2, prepare_output(np.eye(5))):
        with pytest.raises(FormatError):
            gptq(w, "nvfp4", "sweep", h, output=output)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("shape", [(3, 37, 40), (70, 5, 1040), (16, 1, 8)])
def test_products_are_taken_out_one_after_the_other(backend: str, shape: tuple[int, int, int]) -> None:
    count, rows, columns = shape
    out, left, right = weight(rows, columns), weight(count, rows, seed=1), weight(count, columns, seed=2)
    expected = out.copy()
    for i in range(count):
        expected -= left[i][:, None] * right[i]
    with use_backend(backend):
        subtract_products(out, left, right)
    assert out.tobytes() == expected.tobytes()
