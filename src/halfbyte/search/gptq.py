"""GPTQ for formats with blocks along K: rounding with error feedback, scales and codebooks chosen by the same error.

GPTQ (Frantar et al., arXiv 2210.17323) rounds column after column and takes each error out of the columns that
follow. What a block's scale and codebook are chosen by, and when, matters most: by default every candidate is run
through the block's own columns, feedback included, and the one with the least GPTQ loss stays ("in_loop").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfbyte import kernels
from halfbyte.errors import FormatError
from halfbyte.formats import Format, QuantizedTensor, get_format
from halfbyte.formats.arrays import Array, Codes
from halfbyte.formats.format import check_finite
from halfbyte.formats.packing import pack_codes
from halfbyte.search.descent import descend
from halfbyte.search.encode import as_weight, empty, encode, set_scales
from halfbyte.search.encode_options import EncodeOptions, GptqKeywords, GptqOptions
from halfbyte.search.gptq_reference import round_reference
from halfbyte.search.output_metric import PreparedOutput, prepare_output
from halfbyte.search.prepared import Prepared, check, prepare, problem
from halfbyte.search.rotated_space import hessian_in_block_space
from halfbyte.search.row_feedback import round_rows
from halfbyte.search.searches import Search, get_search

if TYPE_CHECKING:
    from halfbyte.search.encode_options import Unpack

__all__ = ["Prepared", "check", "gptq", "prepare", "problem"]

_LARGEST = 1e30  # errors of larger weights would overflow FP32


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
    rotated too, and DuQuant's rotation is found from it. Without ``output`` rows are independent, so slices of rows
    (with the ``amax`` or ``global_scale`` of the whole) give the bytes of the whole; with it, give whole matrices.
    The weight may be any target, also one that was corrected for errors elsewhere in the model. FormatError for what
    the format, the Hessians or the arguments do not allow.
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
    outputs = _outputs(options, array.shape)
    chooses = mode == "static" and given is None and outputs is not None
    if given is not None:
        out = _fresh(given, fmt, array.shape)
    elif mode != "static" or chooses:
        out = empty(fmt, array.shape)
        set_scales(out, search, array, options)
    else:
        names = ("global_scale", "global_scale_inv", "amax", "power_of_two")
        out = encode(array, fmt, search, options=EncodeOptions(**{name: getattr(options, name) for name in names}))
    _round(array, out, search, prepared, outputs, options.refine is not None, chooses)
    if options.stats is not None:
        kernels.compare(out, array, options.stats)
    return out


def _round(
    array: NDArray[Any],
    out: QuantizedTensor,
    how: Search,
    prepared: Sequence[Prepared],
    outputs: Sequence[PreparedOutput | None] | None,
    refine: bool,
    chooses: bool,
) -> None:
    """Fill the codes of ``out``, and its scales where they are not given."""
    flat = array.reshape((-1, *array.shape[-2:]) if array.ndim > 1 else (1, 1, -1))
    shared = len(prepared) == 1
    if outputs is None and not refine:
        for i, one in enumerate(prepared):
            part = slice(None) if shared else slice(i, i + 1)
            _one(flat[part], _part(out, part, flat.shape), how, one)
        return
    for i in range(len(flat)):
        part = slice(i, i + 1)
        output = None if outputs is None else outputs[0 if len(outputs) == 1 else i]
        matrix = _part(out, part, flat.shape)
        _weighed(flat[i], matrix, how, prepared[0 if shared else i], output, refine, chooses)


def _one(x: NDArray[Any], out: QuantizedTensor, how: Search, prepared: Prepared) -> None:
    """Round the columns of matrices x [L, N, K]."""
    target = _in_order(out, prepared)
    if prepared.columns is not None:
        x = np.ascontiguousarray(x[..., prepared.columns])
    _store(out, target, _columns(x, target, how, prepared), prepared)


def _columns(x: NDArray[Any], target: QuantizedTensor, how: Search, prepared: Prepared) -> Codes:
    """Codes of x [L, N, K], whose columns are in the order in which they are rounded."""
    codes = np.empty(x.shape, dtype=np.uint8)
    rounding = prepared.rounding
    if kernels.supports_gptq(target.format, how):
        arrays: dict[str, NDArray[Any] | None] = {
            name: getattr(rounding, name) for name in ("judge", "gain", "inner", "outer", "block_of")
        }
        arrays |= {"codes": codes, "scales": target.scales, "offsets": target.offsets}
        arrays["global_scale"] = target.global_scale
        kernels.gptq_into(x, target.format, how, rounding.judge_feedback, arrays)
    else:
        with np.errstate(over="ignore", under="ignore"):
            round_reference(x.astype(np.float32, copy=False), target, how, rounding, codes)
    return codes


def _weighed(
    x: NDArray[Any],
    out: QuantizedTensor,
    how: Search,
    prepared: Prepared,
    output: PreparedOutput | None,
    refine: bool,
    chooses: bool,
) -> None:
    """Round a matrix x [N, K] with row feedback, by descent, or both."""
    if output is not None and len(output.rows) != len(x):
        raise FormatError(f"the output Hessian is of {len(output.rows)} rows, but the weight has {len(x)}")
    wide = x.astype(np.float32)
    if out.global_scale is not None:
        wide *= np.float32(1) / out.global_scale[0]
    if prepared.columns is not None:
        wide = np.ascontiguousarray(wide[:, prepared.columns])
    # given scales, and those that a group gets from its rows, have the places of the file
    target = _in_order(out, prepared)
    if output is None:
        unit = dataclasses.replace(target, global_scale=None)
        codes = _columns(wide[None], unit, how, prepared)[0]
    else:
        codes = np.empty(wide.shape, dtype=np.uint8)
        round_rows(wide, target, how, prepared, output, codes, chooses)
    if refine:
        descend(wide, target, prepared, output, codes)
    _store(out, target, codes[None], prepared)


def _in_order(out: QuantizedTensor, prepared: Prepared) -> QuantizedTensor:
    """Where scales go: those of a permuted weight are in the order of its blocks; given ones keep their own place."""
    if prepared.columns is None or prepared.rounding.block_of is not None:
        return out
    target = empty(out.format, out.shape)
    target.global_scale = out.global_scale
    return target


def _store(out: QuantizedTensor, target: QuantizedTensor, codes: Codes, prepared: Prepared) -> None:
    """Codes and scales back into the order of the weight's columns."""
    columns = prepared.columns
    if columns is not None:
        ordered = np.empty_like(codes)
        ordered[..., columns] = codes
        codes = ordered
        if target is not out:
            blocks = columns[:: out.format.block[1]] // out.format.block[1]
            out.scales[..., blocks] = target.scales
            if out.offsets is not None:
                out.offsets[..., blocks] = target.offsets
    out.codes[...] = pack_codes(codes, 8 * out.codes.shape[-1] // codes.shape[-1])


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


def _outputs(options: GptqOptions, shape: tuple[int, ...]) -> Sequence[PreparedOutput | None] | None:
    """One output metric for all matrices of the weight, or one for each; None where there is none."""
    given, count = options.output, int(np.prod(shape[:-2], dtype=np.int64))
    if given is None:
        return None
    outputs: Sequence[PreparedOutput | None]
    if isinstance(given, PreparedOutput):
        outputs = [given]
    elif isinstance(given, list | tuple) and all(one is None or isinstance(one, PreparedOutput) for one in given):
        outputs = given
    else:
        array = np.asarray(given)
        n = shape[-2] if len(shape) > 1 else 1
        if array.shape not in ((n, n), (*shape[:-2], n, n)):
            raise FormatError(f"the output Hessian has shape {list(array.shape)}, but the weight {list(shape)}")
        outputs = [prepare_output(one, refine=options.refine is not None) for one in array.reshape(-1, n, n)]
    if len(outputs) not in (1, count):
        raise FormatError(f"{len(outputs)} output Hessians do not fit a stack of {count} matrices")
    if options.refine is not None and any(one is not None and one.metric is None for one in outputs):
        raise FormatError("the output Hessian was prepared without `refine`, which descent needs")
    return outputs


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
        refine = options.refine is not None
        prepared = [prepare(one, fmt, mode=mode, order=order, damping=damping, refine=refine) for one in each]
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
        if options.refine is not None and one.hessian is None:
            raise FormatError("the Hessian was prepared without `refine`, which descent needs")
    return prepared
