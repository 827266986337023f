from __future__ import annotations

import numpy as np
import pytest
from tests.search.objective import weighted_error

from halfbyte.errors import FormatError
from halfbyte.kernels import backends, use_backend
from halfbyte.search.gptq import gptq, prepare
from halfbyte.search.hessian import checked, damped
from halfbyte.search.output_metric import DAMPING, prepare_output
from search.hessians import hessian, weight
from search.test_gptq import FORMATS, MODES, same
from search.test_row_feedback import outputs


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_descent_lowers_the_weighted_error_and_keeps_the_scales(name: str, metric: bool) -> None:
    w, h, g = weight(40, 256), hessian(256), outputs(40)
    output = g if metric else None
    before = gptq(w, name, "sweep", h, order="act", output=output)
    after = gptq(w, name, "sweep", h, order="act", output=output, refine="descent")
    objective = damped(checked(h, 256), 0.01), damped(checked(g, 40), DAMPING) if metric else None
    assert after.scales.tobytes() == before.scales.tobytes()
    assert weighted_error(after.decode() - w, *objective) < weighted_error(before.decode() - w, *objective)


@pytest.mark.parametrize("mode", MODES)
def test_no_move_that_was_made_can_be_taken_back_with_gain(mode) -> None:
    w, h = weight(18, 64), hessian(64)
    before = gptq(w, "mixfp4", "sweep", h, mode=mode).decode()
    after = gptq(w, "mixfp4", "sweep", h, mode=mode, refine="descent").decode()
    objective = damped(checked(h, 64), 0.01)
    reached = weighted_error(after - w, objective)
    assert (before != after).any()
    for place in np.argwhere(before != after):
        back = after.copy()
        back[tuple(place)] = before[tuple(place)]
        assert weighted_error(back - w, objective) > reached


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("mode", ["in_loop", "static"])
@pytest.mark.parametrize("name", ["mixfp4", "mxfp4", "affine4_g64", "int4_asym_g32"])
def test_every_backend_moves_the_same_codes(name: str, mode, metric: bool) -> None:
    w, h, g = weight(18, 64), hessian(64), outputs(18)
    w[3, 32:] = 0
    found = []
    for backend in backends():
        with use_backend(backend):
            kind = {"output": g} if metric else {}
            found.append(gptq(w, name, "sweep", h, mode=mode, order="act", refine="descent", **kind))
    assert all(same(found[0], other) for other in found[1:])


def test_without_a_metric_slices_of_rows_give_the_bytes_of_the_whole() -> None:
    w, prepared = weight(41, 128), prepare(hessian(128), "mixfp4", order="act", refine=True)
    whole = gptq(w, "mixfp4", "sweep", prepared, refine="descent")
    for start, stop in ((0, 1), (1, 18), (18, 41)):
        part = gptq(w[start:stop], "mixfp4", "sweep", prepared, refine="descent", amax=np.abs(w).max())
        assert part.codes.tobytes() == whole.codes[start:stop].tobytes()


def test_what_was_prepared_without_refine_is_refused() -> None:
    w, h = weight(16, 64), hessian(64)
    with pytest.raises(FormatError, match="prepared without `refine`"):
        gptq(w, "nvfp4", "sweep", prepare(h, "nvfp4"), refine="descent")
    with pytest.raises(FormatError, match="output Hessian was prepared without `refine`"):
        gptq(w, "nvfp4", "sweep", h, refine="descent", output=prepare_output(np.eye(16)))


def test_tiny_and_huge_weights_are_rounded_as_without_descent_or_better() -> None:
    w, h = weight(16, 64), hessian(64)
    for size in (1e-30, 1e25):
        found = gptq((w * np.float32(size)), "int4_g32", "sweep", h, refine="descent")
        assert np.isfinite(found.decode()).all()
