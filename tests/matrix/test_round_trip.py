"""Every format in every dialect that holds it, on every kind of model.

Each engine reads the values that halfbyte decodes; what halfbyte reads it writes again to the same bytes; and another
dialect gets the same codes and scales, from which the first one's files come back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte
from halfbyte.checkpoint import Inventory, Reader
from halfbyte.dialects import get_dialect
from halfbyte.errors import PlanError
from halfbyte.formats import get_format
from halfbyte.source.checkpoint import Checkpoint
from matrix.cases import CASES, PAIRS, Case, Made, Pair, has_global_scale, make
from matrix.judges import JUDGES, Stored
from matrix.names import modules
from small_models import read_file

pytestmark = pytest.mark.slow

ids = " / ".join


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Made]:
    return {}


def made(case: Case, known: dict[Case, Made], tmp_path: Path) -> Made:
    if case not in known:
        known[case] = make(tmp_path, case.dialect, get_format(case.format), case.model)
    return known[case]


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_engine_reads_the_values_that_halfbyte_decodes(
    case: Case, checkpoints: dict[Case, Made], tmp_path: Path
) -> None:
    one = made(case, checkpoints, tmp_path)
    out, original = one.out, Checkpoint.open(one.source)
    ours, checkpoint = {}, Checkpoint.open(out)
    sources = {weight.name: weight for weight in original.weights}
    with Reader(checkpoint.inventory) as reader, Reader(original.inventory) as source:
        for weight in (w for w in checkpoint.weights if w.name in checkpoint.formats):
            values = checkpoint.read(reader, weight)
            ours |= dict(modules(case.dialect, case.model, weight.name, values))
            # both could misread the same wrong bytes: the error must be that of the codes in memory
            difference = values.astype(np.float64) - original.read(source, sources[weight.name])
            assert np.square(difference).sum() == pytest.approx(one.errors[weight.name], rel=1e-4), weight.name
    infos = checkpoint.inventory.tensors
    config = out / "config.json"
    theirs = JUDGES[case.dialect](
        Stored(
            out,
            json.loads(config.read_text()) if config.exists() else {},
            read_file(out),
            {name: info.dtype for name, info in infos.items()},
        )
    )
    assert theirs.keys() == ours.keys()
    for name, values in theirs.items():
        if values.dtype == np.float64:
            # llama.cpp multiplies its sums by the global scale, we the block scales: only the last bit may differ
            np.testing.assert_array_max_ulp(ours[name], values.astype(np.float32), 1)
        else:
            # in the type that the engine gives
            np.testing.assert_array_equal(ours[name].astype(values.dtype), values, name)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_what_is_read_is_written_again_to_the_same_bytes(
    case: Case, checkpoints: dict[Case, Made], tmp_path: Path
) -> None:
    one = made(case, checkpoints, tmp_path)
    checkpoint = Checkpoint.open(one.out)
    assert checkpoint.dialect is not None and len(checkpoint.formats) == len(one.errors)
    with Reader(checkpoint.inventory) as reader:
        for weight in (w for w in checkpoint.weights if w.name in checkpoint.formats):
            fmt, tensor = checkpoint.formats[weight.name], checkpoint.read_quantized(reader, weight)
            outputs = checkpoint.dialect.spelling.outputs(weight, fmt)
            again = {output.name: bytearray(reader.read(output.name).nbytes) for output in outputs}
            for written in checkpoint.dialect.spelling.write(outputs, fmt, tensor, 0, 0):
                start = written.start * written.array.itemsize
                again[written.output.name][start : start + written.array.nbytes] = written.array.tobytes()
            for name, content in again.items():
                assert content == reader.read(name).tobytes(), name


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_another_dialect_gets_the_same_codes_and_gives_them_back(pair: Pair, tmp_path: Path) -> None:
    fmt = get_format(pair.format)
    first = make(tmp_path, pair.dialect, fmt, pair.model, pair.other).out
    there = tmp_path / "there"
    halfbyte.convert(first, there, pair.other)
    rounded = (
        has_global_scale(fmt)
        and get_dialect(pair.dialect).spelling.global_scale_inv != get_dialect(pair.other).spelling.global_scale_inv
    )
    _same_codes(first, there, rounded)
    if get_dialect(pair.other).package.standalone or (
        get_dialect(pair.dialect).spelling.power_of_two and has_global_scale(fmt)
    ):
        # no way back: GGUF is no source, and MLX takes no global scales that it did not choose
        with pytest.raises(PlanError):
            halfbyte.convert(there, tmp_path / "back", pair.dialect)
        return
    halfbyte.convert(there, tmp_path / "back", pair.dialect)
    before, after = (_stored(folder) for folder in (first, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        if array.dtype == np.float32 and rounded and "scale" in name:
            np.testing.assert_array_max_ulp(array, after[name], 1)
        elif "scale" in name and array.dtype != after[name].dtype:
            # FP32 scales are kept FP32, although this dialect would write its own as BF16
            assert after[name].dtype == np.float32
            np.testing.assert_array_equal(array.astype(np.float32), after[name], name)
        else:
            assert (array.dtype, array.shape, array.tobytes()) == (
                after[name].dtype,
                array.shape,
                after[name].tobytes(),
            )


def _same_codes(one: Path, two: Path, rounded: bool) -> None:
    """Of all quantized weights; ``rounded``: their global scale is stored as its reciprocal in one of both."""
    a, b = Checkpoint.open(one), Checkpoint.open(two)
    assert a.formats == b.formats
    others = {weight.name: weight for weight in b.weights}
    with Reader(a.inventory) as reader, Reader(b.inventory) as other:
        for weight in (w for w in a.weights if w.name in a.formats):
            before, after = a.read_quantized(reader, weight), b.read_quantized(other, others[weight.name])
            np.testing.assert_array_equal(before.codes, after.codes)
            np.testing.assert_array_equal(before.scales, after.scales)
            for x, y in ((before.offsets, after.offsets), (before.global_scale, after.global_scale)):
                assert (x is None) == (y is None)
                if x is not None and y is not None:
                    np.testing.assert_array_max_ulp(x, y, 1) if rounded else np.testing.assert_array_equal(x, y)


def _stored(folder: Path) -> dict[str, Any]:
    tensors = read_file(folder)
    assert tensors.keys() == Inventory.open(folder).tensors.keys()
    return tensors


def test_every_dialect_and_every_format_is_in_the_matrix() -> None:
    assert {case.dialect for case in CASES} == {dialect.name for dialect in halfbyte.dialects.list_dialects()}
    assert {case.format for case in CASES} == set(halfbyte.formats.list_formats())
