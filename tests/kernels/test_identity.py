from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.cases import TENSOR_SCALED, draw, weights
from halfbyte import kernels
from halfbyte.formats import get_format
from halfbyte.search import encode
from kernels.cases import (
    KERNEL_CASES,
    NATIVE,
    QUICK_KERNEL_CASES,
    TYPES,
    cast,
    differences,
    inputs,
    reference,
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "search"), QUICK_KERNEL_CASES)
def test_every_instruction_set_encodes_as_the_reference(name: str, search: str) -> None:
    fmt = get_format(name)
    for kind, x in inputs(fmt).items():
        importance = np.abs(draw("heavy", x.shape[-1:], 9))
        importance[::5] = 0
        for type_name, dtype in TYPES.items():
            narrow = cast(x, dtype)
            for weight in (None, importance):
                expected = reference(narrow, fmt, search, weight)
                for isa in NATIVE:
                    with kernels.use_backend(isa):
                        found = encode(narrow, fmt, search, weight)
                    assert not differences(found, expected), (kind, type_name, isa, weight is not None)


@pytest.mark.parametrize(("name", "search"), [case for case in KERNEL_CASES if case not in QUICK_KERNEL_CASES])
def test_exhaustive_searches_are_pruned_without_changing_a_bit(name: str, search: str) -> None:
    fmt = get_format(name)
    for kind in ("heavy", "adversarial"):
        x = inputs(fmt)[kind]
        expected = reference(x, fmt, search)
        for isa in NATIVE:
            with kernels.use_backend(isa):
                assert not differences(encode(x, fmt, search), expected), (kind, isa)


@pytest.mark.parametrize("name", ["nvfp4", "mixfp4", "razer", "iq4_nl", "int4_g32", "mxfp4"])
@pytest.mark.parametrize("weighted", [False, True])
def test_pruned_sweeps_choose_what_the_reference_chooses_among_all(name: str, weighted: bool) -> None:
    x = draw("heavy", (256, 512), 11) * np.float32(0.01)
    importance = np.abs(draw("heavy", (512,), 12)) if weighted else None
    expected = reference(x, get_format(name), "sweep", importance)
    for isa in NATIVE:
        with kernels.use_backend(isa):
            assert not differences(encode(x, name, "sweep", importance), expected), isa


@pytest.mark.parametrize("importance_kind", ["zero", "per expert", "equal"])
def test_importance_of_every_kind_is_used_as_the_reference_does(importance_kind: str) -> None:
    x = draw("normal", (4, 6, 160), 13)
    importance = {
        "zero": np.zeros(160),
        "per expert": np.abs(draw("heavy", (4, 160), 14)),
        "equal": np.ones(160),
    }[importance_kind]
    for name in ("mixfp4", "int4_g32", "affine4_g32", "fp8_channel", "fp8_block128"):
        expected = reference(x, get_format(name), "sweep", importance)
        for isa in NATIVE:
            with kernels.use_backend(isa):
                assert not differences(encode(x, name, "sweep", importance), expected), (name, isa)


@pytest.mark.parametrize(("name", "search"), [case for case in QUICK_KERNEL_CASES if case[0] in TENSOR_SCALED])
def test_weights_beyond_the_given_tensor_scale_are_encoded_as_the_reference(name: str, search: str) -> None:
    fmt = get_format(name)
    for size in (1e-44, 1e-30, 1e30):
        x = draw("heavy", (6, 64), 3) * np.float32(size)
        for scale in (1e-37, 1e-30, 1e30, 3e38):
            expected = reference(x, fmt, search, global_scale=scale)
            for isa in NATIVE:
                with kernels.use_backend(isa):
                    assert not differences(encode(x, fmt, search, global_scale=scale), expected), (size, scale, isa)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_weights_with_any_options_are_encoded_as_the_reference(data: st.DataObject) -> None:
    name, search = data.draw(st.sampled_from(QUICK_KERNEL_CASES))
    fmt = get_format(name)
    x = data.draw(weights(name, decades=37)) if data.draw(st.booleans()) else data.draw(weights(name, decades=4))
    x = cast(x, TYPES[data.draw(st.sampled_from(sorted(TYPES)))])
    options = {}
    if "global_scale" in fmt.parts(x.shape):
        key = data.draw(st.sampled_from(["", "global_scale", "global_scale_inv", "amax", "power_of_two"]))
        if key == "power_of_two":
            options[key] = True
        elif key:
            # from scales that overflow the weights to scales that wipe them out
            options[key] = np.float32(10.0 ** data.draw(st.integers(-37, 37)))
    importance = np.abs(draw("heavy", x.shape[-1:], 1)) if data.draw(st.booleans()) else None
    expected = reference(x, fmt, search, importance, **options)
    for isa in NATIVE:
        with kernels.use_backend(isa):
            assert not differences(encode(x, fmt, search, importance, **options), expected), isa


@pytest.mark.slow
def test_real_weights_and_edges_are_encoded_as_the_reference(shared: Path) -> None:
    vectors = np.load(shared / "data" / "golden" / "fp4_vectors.npz")
    rows = {name.split("/")[0]: vectors[name] for name in vectors.files if name.endswith("/input")}
    assert len(rows) > 5
    for title, x in rows.items():
        for name, search in QUICK_KERNEL_CASES:
            fmt = get_format(name)
            if fmt.problem(x.shape):
                continue
            part = x[:8] if x.shape[0] > 16 else x
            expected = reference(part, fmt, search)
            for isa in NATIVE:
                with kernels.use_backend(isa):
                    assert not differences(encode(part, fmt, search), expected), (title, name, search, isa)
