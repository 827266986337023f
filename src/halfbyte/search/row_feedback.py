"""Rounding with row feedback: each row takes the errors of earlier rows, weighed by the metric of the outputs.

The metric and its factors are those of ``halfbyte.search.output_metric``. Within a row GPTQ rounds as it always does,
its scales chosen in the loop. d_i is the target of row i minus its values.

Order of operations, all in FP32: rows are worked on in groups of 16, in the order of the metric. When a group is
finished, every later row j becomes t_j - F_ij * d_i for its rows i in turn. Within a group all rows do a block of
columns before the next block: the errors of earlier columns are taken out as GPTQ does, and then, row after row, the
sum of F_ij * d_i over the group's earlier rows i.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte import kernels
from halfbyte.formats import Format, QuantizedTensor
from halfbyte.formats.arrays import Codes, Floats
from halfbyte.search.encode import encode
from halfbyte.search.encode_options import EncodeOptions
from halfbyte.search.gptq_reference import Rounding, Rows
from halfbyte.search.output_metric import PreparedOutput
from halfbyte.search.prepared import Prepared
from halfbyte.search.searches import Search

GROUP = 16
"""Rows between two updates of all rows below them."""


def round_rows(
    x: Floats,
    out: QuantizedTensor,
    search: Search,
    prepared: Prepared,
    output: PreparedOutput,
    codes: Codes,
    chooses: bool,
) -> None:
    """Round x [N, K] into unpacked ``codes`` [N, K] and the scales and offsets of ``out``.

    ``x`` is over the global scale, its columns in the order of ``prepared``. ``chooses``: in mode ``static``, the
    scales of a group are chosen from its rows when its turn comes; otherwise they are given in ``out``.
    """
    n = len(x)
    targets = np.ascontiguousarray(x[output.rows])
    scales, offsets = out.scales.reshape(n, -1), None if out.offsets is None else out.offsets.reshape(n, -1)
    for start in range(0, n, GROUP):
        rows = output.rows[start : start + GROUP]
        stop = start + len(rows)
        part = targets[start:stop]
        if chooses:
            chosen = encode(_in_place(part, prepared), out.format, search, options=_unscaled(out.format))
            given, shifts = chosen.scales, chosen.offsets
        else:
            given, shifts = scales[rows], None if offsets is None else offsets[rows]
        group = QuantizedTensor(out.format, part.shape, np.empty(0, np.uint8), given, None, shifts)
        found, error = np.empty(part.shape, np.uint8), np.empty_like(part)
        coupling = np.ascontiguousarray(output.feedback[start:stop, start:stop])
        round_group(part, group, search, prepared.rounding, coupling, found, error)
        codes[rows], scales[rows] = found, group.scales
        if offsets is not None:
            offsets[rows] = group.offsets
        subtract_products(targets[stop:], np.ascontiguousarray(output.feedback[start:stop, stop:]), error)


def round_group(
    x: Floats, out: QuantizedTensor, search: Search, how: Rounding, coupling: Floats, codes: Codes, error: Floats
) -> None:
    """Round the rows x [R, K] of a group; ``coupling`` [R, R] holds the share of row i's error that row j takes at
    [i, j]. ``error`` [R, K] becomes what was left of each row."""
    arrays: dict[str, NDArray[Any] | None] = {
        name: getattr(how, name) for name in ("judge", "gain", "inner", "outer", "block_of")
    }
    arrays |= {"x": x, "coupling": coupling, "codes": codes, "error": error}
    arrays |= {"scales": out.scales, "offsets": out.offsets}
    if kernels.round_rows_into(out.format, search, how.judge_feedback, arrays):
        return
    with np.errstate(over="ignore", under="ignore"):
        rows = Rows.of(x, out, codes)
        size = rows.size(how)
        for start in range(0, len(rows.y), size):
            rows.compensate(start, how)
            block = slice(start, start + size)
            for row in range(len(x)):
                taken = np.zeros(size, np.float32)
                for earlier in range(row):
                    taken += coupling[earlier, row] * error[earlier, block]
                rows.y[block, row] -= taken
                rows.part(slice(row, row + 1)).round_block(start, search, how)
                error[row, block] = (x[row, block] - taken) - rows.values[block, row]


def subtract_products(out: Floats, left: Floats, right: Floats) -> None:
    """Take left [S, M] transposed times right [S, K] from out [M, K], one product after the other, in FP32."""
    if kernels.subtract_products(out, left, right):
        return
    for coefficients, values in zip(left, right, strict=True):
        out -= coefficients[:, None] * values


def _in_place(x: Floats, prepared: Prepared) -> NDArray[Any]:
    """Columns in their own order again."""
    if prepared.columns is None:
        return x
    natural = np.empty_like(x)
    natural[:, prepared.columns] = x
    return natural


def _unscaled(fmt: Format) -> EncodeOptions:
    return EncodeOptions(global_scale=1.0) if fmt.has_global_scale else EncodeOptions()
