from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.cases import TENSOR_SCALED, draw
from halfbyte import kernels
from halfbyte.formats import get_format
from halfbyte.search import SEARCHES
from halfbyte.search.gptq import gptq, prepare, problem
from halfbyte.search.local_hessian import prepare_local
from kernels.cases import NATIVE, TYPES, WITH_KERNELS, cast, differences
from search.hessians import hessian

MODES = ("in_loop", "local_hessian", "compensated", "static")
CASES = [
    (f, s)
    for f in WITH_KERNELS
    if problem(get_format(f)) is None
    for s in SEARCHES
    if s not in ("exhaustive", "four_over_six_mae", "four_over_six_absmax")
    and SEARCHES[s].problem(get_format(f)) is None
]


def reference(*arguments, **options):
    with kernels.use_backend("reference"):
        return gptq(*arguments, **options)


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE, reason="no native kernels here")
@pytest.mark.parametrize(("name", "search"), CASES)
def test_every_instruction_set_rounds_as_the_reference(name: str, search: str) -> None:
    fmt = get_format(name)
    k = max(48, 2 * fmt.block[1])
    k -= k % fmt.block[1]
    x = draw("heavy", (2, 9, k), 5) * np.float32([[[0.02]], [[3]]])
    x[0, 3], x[1, :, : fmt.block[1]] = 0, 0
    for mode, order in (("in_loop", "none"), ("local_hessian", "act"), ("compensated", "none"), ("static", "act")):
        prepared = prepare(hessian(k), fmt, mode=mode, order=order)
        expected = reference(x, fmt, search, prepared)
        for isa in NATIVE:
            with kernels.use_backend(isa):
                assert not differences(gptq(x, fmt, search, prepared), expected), (mode, isa)


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE, reason="no native kernels here")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_weights_with_any_options_are_rounded_as_the_reference(data: st.DataObject) -> None:
    name, search = data.draw(st.sampled_from(CASES))
    fmt = get_format(name)
    k = fmt.block[1] * data.draw(st.integers(1, 4))
    rows = data.draw(st.integers(1, 35))
    x = draw(data.draw(st.sampled_from(["normal", "sparse", "steps", "constant", "ramp"])), (rows, k), rows)
    x = cast(x * np.float32(10.0 ** data.draw(st.integers(-20, 12))), TYPES[data.draw(st.sampled_from(sorted(TYPES)))])
    options = {}
    if name in TENSOR_SCALED and data.draw(st.booleans()):
        options["global_scale"] = np.float32(10.0 ** data.draw(st.integers(-12, 12)))
    kind = data.draw(st.sampled_from([*MODES, "nearest", "feedback"]))
    h = hessian(k, seed=data.draw(st.integers(0, 3)))
    prepared = (
        prepare(h, fmt, mode=kind, order=data.draw(st.sampled_from(["none", "act"])))
        if kind in MODES
        else prepare_local(h, fmt, codes=kind)
    )
    expected = reference(x, fmt, search, prepared, **options)
    for isa in NATIVE:
        with kernels.use_backend(isa):
            assert not differences(gptq(x, fmt, search, prepared, **options), expected), isa


def test_threads_do_not_disturb_each_other() -> None:
    x, prepared = draw("normal", (64, 256), 1), prepare(hessian(256), "mixfp4")
    expected = gptq(x, "mixfp4", "sweep", prepared)
    found = [None] * 4

    def work(i: int) -> None:
        found[i] = gptq(x, "mixfp4", "sweep", prepared)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(differences(one, expected) for one in found)
