"""Coordinate descent of codes: after rounding, single codes move as long as the weighted error falls; scales stay.

For an error E the cost is tr(A E H Eᵀ), A the metric of the outputs or the identity. With G = A E H, moving element
(r, i) by d changes it by 2 d G_ri + d² A_rr H_ii. The best move of an element is to the value nearest to
q - G_ri / (A_rr H_ii); a row makes its best move, updates its G and goes on until no move gains. Every move lowers
the cost, so descent never raises it. All in FP32, in the order of operations of ``descend_group_reference``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte import kernels
from halfbyte.formats import QuantizedTensor
from halfbyte.formats.arrays import Codes, Floats
from halfbyte.formats.packing import pack_codes
from halfbyte.search.output_metric import PreparedOutput
from halfbyte.search.prepared import Prepared
from halfbyte.search.row_feedback import GROUP, subtract_products

MARGIN = np.float32(2.0**-8)
"""A move gains at least this share of what it costs alone: rounding errors of G never make rows run in circles."""
_MOVES = 4  # of a row, times its columns: a bound that no real weight comes near


def descend(x: Floats, out: QuantizedTensor, prepared: Prepared, output: PreparedOutput | None, codes: Codes) -> int:
    """Move unpacked ``codes`` [N, K], and return how many moves there were.

    ``x`` [N, K] is what was to be rounded, over the global scale, columns in the order of ``prepared``, with its
    scales and offsets in ``out``. Without ``output`` rows do not touch each other.
    """
    hessian = prepared.hessian
    assert hessian is not None
    n, k = x.shape
    places = _places(prepared, k)
    scales, offsets = out.scales.reshape(n, -1), None if out.offsets is None else out.offsets.reshape(n, -1)
    values = _values(out, prepared, codes)
    pushed = np.zeros_like(x)  # E H
    order = np.arange(n) if output is None else output.rows
    subtract_products(pushed, np.ascontiguousarray((x - values)[order].T), hessian)
    moves = 0
    for start in range(0, n, GROUP):
        rows = order[start : start + GROUP]
        span = slice(start, start + len(rows))
        if output is None:
            gradient, coupling = pushed[span].copy(), np.eye(len(rows), dtype=np.float32)
        else:
            assert output.metric is not None
            gradient, coupling = np.zeros((len(rows), k), np.float32), output.metric[span, span].copy()
            subtract_products(gradient, np.ascontiguousarray(-output.metric[:, span]), pushed)
        group = Group(
            values[rows],
            codes[rows],
            QuantizedTensor(
                out.format,
                (len(rows), k),
                np.empty(0, np.uint8),
                scales[rows],
                None,
                None if offsets is None else offsets[rows],
            ),
            places,
            gradient,
            coupling,
        )
        moved, count = group.descend(hessian)
        codes[rows] = group.codes
        moves += count
        if output is not None:
            pushed[span] += moved
    return moves


class Group:
    """Rows [R, K] whose codes move: values, codes, scales, G, and the part [R, R] of the metric between them.

    ``places`` int32 [K]: the block of ``scales`` in which each column lies.
    """

    def __init__(
        self,
        values: Floats,
        codes: Codes,
        scales: QuantizedTensor,
        places: NDArray[np.int32],
        gradient: Floats,
        coupling: Floats,
    ) -> None:
        self.values, self.codes, self.scales, self.places = values, codes, scales, places
        self.gradient, self.coupling = gradient, coupling

    def descend(self, hessian: Floats) -> tuple[Floats, int]:
        """Move codes and values; return what became of E H [R, K], and how many moves there were."""
        moved = np.zeros_like(self.values)
        arrays: dict[str, NDArray[Any] | None] = {
            name: getattr(self, name) for name in ("values", "codes", "places", "gradient", "coupling")
        }
        arrays |= {"hessian": hessian, "moved": moved}
        arrays |= {"scales": self.scales.scales, "offsets": self.scales.offsets}
        count = kernels.descend_into(self.scales.format, arrays, float(MARGIN), _MOVES * len(hessian))
        if count is None:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                count = self._reference(hessian, moved)
        return moved, count

    def _reference(self, hessian: Floats, moved: Floats) -> int:
        total = 0
        for row in range(len(self.values)):
            total += self._row(row, hessian, moved[row])
            for later in range(row + 1, len(self.values)):
                self.gradient[later] += self.coupling[row, later] * moved[row]
        return total

    def _row(self, row: int, hessian: Floats, moved: Floats) -> int:
        fmt, shifts = self.scales.format, self.scales.offsets
        choice = fmt.stored_choice(
            self.scales.scales[row][self.places], None if shifts is None else shifts[row][self.places]
        )
        weight, values, codes, gradient = self.coupling[row, row], self.values[row], self.codes[row], self.gradient[row]
        curve = weight * np.diagonal(hessian)
        step = np.float32(1) / curve
        for move in range(_MOVES * len(hessian)):
            found, rounded = fmt.round_column(values - gradient * step, choice)
            change = rounded - values
            bent = change * curve
            gain = -(change * ((gradient + gradient) + bent))
            gain = np.where((found != codes) & (gain > MARGIN * (change * bent)), gain, np.float32(0))
            best = int(gain.argmax())
            if not gain[best] > 0:
                return move
            gradient += (change[best] * weight) * hessian[best]
            moved += change[best] * hessian[best]
            values[best], codes[best] = rounded[best], found[best]
        return _MOVES * len(hessian)


def _places(prepared: Prepared, columns: int) -> NDArray[np.int32]:
    given = prepared.rounding.block_of
    size = prepared.format.block[1]
    return np.asarray(np.arange(columns) // size, dtype=np.int32) if given is None else given


def _values(out: QuantizedTensor, prepared: Prepared, codes: Codes) -> Floats:
    """What the codes stand for, over the global scale, columns in the order of ``prepared``."""
    fmt, shape = out.format, codes.shape
    columns = prepared.columns if prepared.rounding.block_of is not None else None
    natural = codes
    if columns is not None:
        natural = np.empty_like(codes)
        natural[:, columns] = codes
    packed = pack_codes(natural, fmt.bits)
    one = np.ones((), np.float32) if fmt.has_global_scale else None
    offsets = None if out.offsets is None else out.offsets.reshape(shape[0], -1)
    values = QuantizedTensor(fmt, shape, packed, out.scales.reshape(shape[0], -1), one, offsets).decode()
    return np.ascontiguousarray(values if columns is None else values[:, columns])
