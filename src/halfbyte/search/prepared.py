"""Hessians made ready for rounding: factored once for all weights that read the same input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfbyte.errors import FormatError
from halfbyte.formats import Format, get_format
from halfbyte.formats.arrays import Doubles, Floats
from halfbyte.search.encode_options import Mode, Order
from halfbyte.search.gptq_reference import Rounding
from halfbyte.search.hessian import Factors, checked, damped, diagonal_blocks, factor


@dataclass(frozen=True)
class Prepared:
    """A Hessian, made ready for one format, mode and order; good for all weights that read the same input.

    ``columns`` are the columns in the order in which they are rounded, None for their own order. ``damping`` is the
    one that the factorization needed. ``hessian`` FP32 [K, K], in the order of the columns, is what ``refine`` needs:
    damped, its mean input 1; None where it was not asked for.
    """

    format: Format
    mode: Mode
    order: Order
    rounding: Rounding
    columns: NDArray[np.int64] | None
    damping: float
    hessian: Floats | None = None


def prepare(
    hessian: ArrayLike,
    format: str | Format,
    *,
    mode: Mode = "in_loop",
    order: Order = "none",
    damping: float = 0.01,
    refine: bool = False,
) -> Prepared:
    """Factor a Hessian [K, K] for ``gptq``: the costly part that weights with the same input share.

    ``refine``: keep what descent needs beside the factors.
    """
    fmt = get_format(format)
    check(fmt, mode, order)
    columns = np.shape(hessian)[-1] if np.ndim(hessian) else 0
    fmt.check((1, columns))
    h = checked(hessian, columns)
    size = fmt.block[1]
    permutation = _permutation(np.diagonal(h), size, mode) if order == "act" else None
    if permutation is not None:
        h = h[np.ix_(permutation, permutation)]
    factors = factor(h, damping)
    kept = damped(h, factors.damping).astype(np.float32) if refine else None
    if mode == "static":
        place = np.arange(columns) if permutation is None else permutation
        given = np.asarray(place // size, dtype=np.int32)
        return Prepared(fmt, mode, order, _rounding(factors, 16, block_of=given), permutation, factors.damping, kept)
    if mode == "in_loop":
        rounding = _rounding(factors, size, judge_feedback=True)
    elif mode == "local_hessian":
        rounding = _rounding(factors, size, judge=local_factors(h, size, damping))
    else:
        rounding = _rounding(factors, size)
    return Prepared(fmt, mode, order, rounding, permutation, factors.damping, kept)


def local_factors(hessian: Doubles, size: int, damping: float) -> Factors:
    """Factors of the blocks [K/size, size, size] along the diagonal of a Hessian [K, K]."""
    mean = float(np.trace(hessian)) / len(hessian)
    # damped as the whole is: relative to the mean of all columns
    blocks = diagonal_blocks(hessian, size) + damping * mean * np.eye(size)
    factors = factor(blocks, 0.0)
    share = np.trace(blocks, axis1=-2, axis2=-1)[:, None] / size
    return Factors(factors.feedback, factors.unfold, factors.gain * np.where(share > 0, share, 1), damping)


def lower(matrices: Doubles) -> NDArray[np.float32]:
    """Coefficients for the kernels: row j holds those of the columns before it."""
    return np.ascontiguousarray(np.tril(np.swapaxes(matrices, -1, -2), -1), dtype=np.float32)


def _rounding(
    factors: Factors,
    size: int,
    *,
    judge: Factors | None = None,
    judge_feedback: bool = False,
    block_of: NDArray[np.int32] | None = None,
) -> Rounding:
    k = len(factors.gain)
    inner = lower(diagonal_blocks(factors.feedback, size))
    narrow = factors.feedback.astype(np.float32)
    outer = np.ascontiguousarray(narrow.reshape(k, k // 16, 16).transpose(1, 0, 2))
    gain = np.ones(k, dtype=np.float32)
    if judge_feedback:
        gain = (factors.gain / factors.gain.mean()).astype(np.float32)
    if judge is not None:
        gain = (judge.gain / judge.gain.mean()).astype(np.float32).reshape(-1)
    # a diagonal Hessian needs no feedback
    alone = np.count_nonzero(narrow) == k
    return Rounding(
        gain,
        lower(judge.unfold) if judge is not None else inner if judge_feedback and not alone else None,
        judge_feedback,
        None if alone else inner,
        None if alone else outer,
        block_of,
    )


def _permutation(diagonal: Doubles, size: int, mode: Mode) -> NDArray[np.int64]:
    """Columns by falling activation; blocks stay together where their scale is chosen at their turn."""
    if mode == "static":
        return np.argsort(-diagonal, kind="stable")
    blocks = diagonal.reshape(-1, size)
    first = np.argsort(-blocks.sum(axis=1), kind="stable")
    within = np.argsort(-blocks, axis=1, kind="stable")
    return np.asarray((first[:, None] * size + within[first]).reshape(-1))


def problem(fmt: Format) -> str | None:
    """Why GPTQ does not apply to a format, or None."""
    if fmt.rounds_columns and fmt.block[0] == 1 and 16 <= fmt.block[1] <= 128:
        return None if fmt.block[1] % 16 == 0 else f"{fmt.name} has blocks of {fmt.block[1]} columns"
    return f"{fmt.name} has no plain blocks of 16 to 128 columns along K"


def check(fmt: Format, mode: str, order: str) -> None:
    """FormatError for a format, mode or order that GPTQ does not have."""
    refusal = problem(fmt)
    if refusal:
        raise FormatError(f"GPTQ does not apply: {refusal}; use a search with importance instead")
    for name, value, known in (("mode", mode, get_args(Mode)), ("order", order, get_args(Order))):
        if value not in known:
            raise FormatError(f"unknown {name} {value!r}: known are {', '.join(known)}")
