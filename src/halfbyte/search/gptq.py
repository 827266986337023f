"""GPTQ for formats with blocks along K: rounding with error feedback, scales and codebooks chosen by the same error.

GPTQ (Frantar et al., arXiv 2210.17323) rounds column after column and takes each error out of the columns that
follow. What a block's scale and codebook are chosen by, and when, matters most: by default every candidate is run
through the block's own columns, feedback included, and the one with the least GPTQ loss stays ("in_loop").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfbyte import kernels
from halfbyte.errors import FormatError
from halfbyte.formats import Format, QuantizedTensor, get_format
from halfbyte.formats.arrays import Array, Doubles
from halfbyte.formats.format import check_finite
from halfbyte.formats.packing import pack_codes
from halfbyte.search.encode import as_weight, empty, encode, set_scales
from halfbyte.search.encode_options import EncodeOptions, GptqKeywords, GptqOptions, Mode, Order
from halfbyte.search.gptq_reference import Rounding, round_reference
from halfbyte.search.hessian import Factors, checked, diagonal_blocks, factor
from halfbyte.search.rotated_space import hessian_in_block_space
from halfbyte.search.searches import Search, get_search

if TYPE_CHECKING:
    from halfbyte.search.encode_options import Unpack

_LARGEST = 1e30  # errors of larger weights would overflow FP32


@dataclass(frozen=True)
class Prepared:
    """A Hessian, made ready for one format, mode and order; good for all weights that read the same input.

    ``columns`` are the columns in the order in which they are rounded, None for their own order. ``damping`` is the
    one that the factorization needed.
    """

    format: Format
    mode: Mode
    order: Order
    rounding: Rounding
    columns: NDArray[np.int64] | None
    damping: float


def gptq(
    weight: ArrayLike,
    format: str | Format,
    search: str | Search,
    hessian: ArrayLike | Prepared | Sequence[Prepared],
    *,
    options: GptqOptions | None = None,
    **keywords: Unpack[GptqKeywords],
) -> QuantizedTensor:
    """Quantize ``weight`` [..., N, K] so that the error of its outputs is small, by GPTQ.

    ``hessian`` is the mean or sum of x x^T over the inputs x, [K, K], or one for each leading index [..., K, K];
    or what ``prepare`` made of it (a sequence of them for a stack), in which case ``mode``, ``order`` and
    ``damping`` are those of ``prepare``. Keyword arguments are the fields of ``GptqOptions`` and go before those in
    ``options``. Modes say when the scale and codebook of a block are chosen, among the candidates of ``search``:

    - ``in_loop``: at its turn, each candidate judged by the GPTQ loss that it leads to within the block;
    - ``local_hessian``: at its turn, by e H e of nearest rounding with the block's part of the Hessian;
    - ``compensated``: at its turn, by squared error (with the search absmax: the original GPTQ with groups);
    - ``static``: beforehand, by squared error on the original weights, or as in ``given``, a tensor of that format.

    ``order`` "act" rounds the columns with the largest activations first: single columns in mode ``static``, whole
    blocks otherwise, since a block's scale is chosen once. ``damping``: see ``halfbyte.search.hessian.factor``. The
    other fields are those of ``encode``. For formats in rotated space the Hessian, which must not be prepared, is
    rotated too, and DuQuant's rotation is found from it. Rows are independent, so slices of rows (with the ``amax`` or
    ``global_scale`` of the whole) give the bytes of the whole. FormatError for what the format, the Hessian or the
    arguments do not allow.
    """
    fmt = get_format(format)
    scale_search = get_search(search, fmt)
    chosen = dataclasses.replace(options or GptqOptions(), **keywords)
    if chosen.given is not None:
        chosen = dataclasses.replace(chosen, given=fmt.to_plain(chosen.given))
    block_hessian, steps = hessian_in_block_space(hessian, fmt, np.shape(weight)[:-2])
    array, stored_steps = fmt.rotate(as_weight(weight, fmt), steps)
    tensor = _gptq_plain(array, fmt.plain, scale_search, block_hessian, chosen)
    return fmt.from_plain(tensor, stored_steps)


def _gptq_plain(array: Array, fmt: Format, search: Search, hessian: Any, options: GptqOptions) -> QuantizedTensor:
    """Round a weight in a format without rotation."""
    prepared = _prepared(hessian, fmt, options, array.shape)
    mode, given = prepared[0].mode, options.given
    if given is not None and mode != "static":
        raise FormatError(f"scales are given, but mode {mode!r} chooses them; use mode 'static'")
    largest, finite = kernels.amax(array)
    if not finite:
        check_finite(array)
    if float(np.max(largest, initial=0)) > _LARGEST:
        raise FormatError(f"the weight holds {np.max(largest):.3g}; GPTQ needs magnitudes up to {_LARGEST:g}")
    if mode != "static":
        out = empty(fmt, array.shape)
        set_scales(out, search, array, options)
    elif given is not None:
        out = _fresh(given, fmt, array.shape)
    else:
        names = ("global_scale", "global_scale_inv", "amax", "power_of_two")
        out = encode(array, fmt, search, options=EncodeOptions(**{name: getattr(options, name) for name in names}))
    _round(array, out, search, prepared)
    if options.stats is not None:
        kernels.compare(out, array, options.stats)
    return out


def prepare(
    hessian: ArrayLike,
    format: str | Format,
    *,
    mode: Mode = "in_loop",
    order: Order = "none",
    damping: float = 0.01,
) -> Prepared:
    """Factor a Hessian [K, K] for ``gptq``: the costly part that weights with the same input share."""
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
    if mode == "static":
        place = np.arange(columns) if permutation is None else permutation
        given = np.asarray(place // size, dtype=np.int32)
        return Prepared(fmt, mode, order, _rounding(factors, 16, block_of=given), permutation, factors.damping)
    if mode == "in_loop":
        rounding = _rounding(factors, size, judge_feedback=True)
    elif mode == "local_hessian":
        rounding = _rounding(factors, size, judge=local_factors(h, size, damping))
    else:
        rounding = _rounding(factors, size)
    return Prepared(fmt, mode, order, rounding, permutation, factors.damping)


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


def _round(array: NDArray[Any], out: QuantizedTensor, how: Search, prepared: Sequence[Prepared]) -> None:
    """Fill the codes of ``out``, and its scales where they are not given."""
    flat = array.reshape((-1, *array.shape[-2:]) if array.ndim > 1 else (1, 1, -1))
    shared = len(prepared) == 1
    for i, one in enumerate(prepared):
        part = slice(None) if shared else slice(i, i + 1)
        _one(flat[part], _part(out, part, flat.shape), how, one)


def _one(x: NDArray[Any], out: QuantizedTensor, how: Search, prepared: Prepared) -> None:
    fmt, rounding, columns = out.format, prepared.rounding, prepared.columns
    codes = np.empty(x.shape, dtype=np.uint8)
    given = rounding.block_of is not None
    # scales of a permuted weight are in the order of its blocks; given ones are looked up by their own place
    target = out if columns is None or given else empty(fmt, x.shape)
    target.global_scale = out.global_scale
    if columns is not None:
        x = np.ascontiguousarray(x[..., columns])
    if kernels.supports_gptq(fmt, how):
        arrays: dict[str, NDArray[Any] | None] = {
            name: getattr(rounding, name) for name in ("judge", "gain", "inner", "outer", "block_of")
        }
        arrays |= {"codes": codes, "scales": target.scales, "offsets": target.offsets}
        arrays["global_scale"] = target.global_scale
        kernels.gptq_into(x, fmt, how, rounding.judge_feedback, arrays)
    else:
        with np.errstate(over="ignore", under="ignore"):
            round_reference(x.astype(np.float32, copy=False), target, how, rounding, codes)
    if columns is not None:
        ordered = np.empty_like(codes)
        ordered[..., columns] = codes
        codes = ordered
        if not given:
            blocks = columns[:: fmt.block[1]] // fmt.block[1]
            out.scales[..., blocks] = target.scales
            if out.offsets is not None:
                out.offsets[..., blocks] = target.offsets
    out.codes[...] = pack_codes(codes, 8 * out.codes.shape[-1] // x.shape[-1])


def _part(out: QuantizedTensor, part: slice, shape: tuple[int, ...]) -> QuantizedTensor:
    """Views of some matrices of a tensor, as [L, N, K]."""
    lead, n, k = shape
    scale = None if out.global_scale is None else out.global_scale.reshape(lead)[part]
    offsets = None if out.offsets is None else out.offsets.reshape(lead, n, -1)[part]
    codes, scales = out.codes.reshape(lead, n, -1)[part], out.scales.reshape(lead, n, -1)[part]
    return QuantizedTensor(out.format, (len(codes), n, k), codes, scales, scale, offsets)


def _fresh(given: QuantizedTensor, fmt: Format, shape: tuple[int, ...]) -> QuantizedTensor:
    """The scales of a tensor, with codes yet to be found."""
    if given.format != fmt or given.shape != shape:
        kind = f"{given.format.name} {list(given.shape)}"
        raise FormatError(f"the given scales are of {kind}, the weight needs {fmt.name} {list(shape)}")
    return dataclasses.replace(given, codes=np.empty_like(given.codes))


def _prepared(hessian: Any, fmt: Format, options: GptqOptions, shape: tuple[int, ...]) -> Sequence[Prepared]:
    """One for all matrices of the weight, or one for each."""
    count = int(np.prod(shape[:-2], dtype=np.int64))
    if isinstance(hessian, Prepared):
        prepared: Sequence[Prepared] = [hessian]
    elif isinstance(hessian, Sequence) and hessian and all(isinstance(one, Prepared) for one in hessian):
        prepared = hessian
    else:
        given = np.asarray(hessian)
        k = shape[-1]
        if given.shape not in ((k, k), (*shape[:-2], k, k)):
            raise FormatError(f"the Hessian has shape {list(given.shape)}, but the weight {list(shape)}")
        if given.ndim > 2:
            given = given.reshape(-1, k, k)
        each = [given] if given.ndim == 2 else given
        mode, order, damping = options.mode, options.order, options.damping
        prepared = [prepare(one, fmt, mode=mode, order=order, damping=damping) for one in each]
    if len(prepared) not in (1, count):
        raise FormatError(f"{len(prepared)} Hessians do not fit a stack of {count} matrices")
    for one in prepared:
        if one.format != fmt or len(one.rounding.gain) != shape[-1]:
            raise FormatError(
                f"the Hessian was prepared for {one.format.name} and {len(one.rounding.gain)} columns, "
                f"not for {fmt.name} and {shape[-1]}"
            )
        if one.mode != prepared[0].mode:
            raise FormatError("the Hessians of a stack were prepared for different modes")
    return prepared


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
