"""Weights encoded on a device, bit for bit as the reference encodes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from halfbyte import kernels
from halfbyte.errors import FormatError
from halfbyte.formats import BlockFormat, Format, QuantizedTensor, get_format
from halfbyte.formats.format import check_finite
from halfbyte.formats.losses import unit_of
from halfbyte.gpu.encode_kernel import encode_kernel
from halfbyte.search import EncodeOptions, Search, get_search
from halfbyte.search.encode import as_weight, empty, relative_importance, set_scales

if TYPE_CHECKING:
    from halfbyte.search.encode_options import EncodeKeywords, Unpack

_KINDS = ("e2m1", "int_sign_magnitude", "int_twos_complement", "if4_int")
_LANES = 128
_LONGEST = 32  # candidates of a search that stay a loop worth running


def encodes(fmt: Format, search: Search) -> bool:
    """Whether weights of a format are encoded on devices by a search.

    They are in formats with blocks of 16, E4M3 scales and up to two codebooks of E2M1 or integers (NVFP4, MixFP4, IF4
    and the like), by the searches absmax, sweep and Four Over Six, and others with as many candidates.
    """
    return (
        type(fmt) is BlockFormat
        and kernels.supports(fmt, search)
        and fmt.scale.name == "e4m3"
        and fmt.block_shape == (1, 16)
        and len(fmt.codebooks) <= 2
        and all(codebook.kind in _KINDS for codebook in fmt.codebooks)
        and (search.only == "four_over_six" or len(search.offsets) <= _LONGEST)
    )


def encode_on_device(
    weight: ArrayLike,
    format: str | Format,
    search: str | Search = "sweep",
    importance: ArrayLike | None = None,
    *,
    device: torch.device | str = "cuda",
    options: EncodeOptions | None = None,
    **keywords: Unpack[EncodeKeywords],
) -> QuantizedTensor:
    """Quantize a weight [..., N, K] as ``halfbyte.search.encode`` does, with the search on a device.

    The result is the same bit for bit. FormatError as there, and for a format or search without a kernel
    (``encodes`` tells). Errors are counted on the CPU.
    """
    fmt = get_format(format)
    chosen = get_search(search, fmt)
    if not encodes(fmt, chosen):
        raise FormatError(f"{fmt.name} by {chosen.name} is not encoded on devices; encode it on the CPU")
    assert isinstance(fmt, BlockFormat)
    given = replace(options or EncodeOptions(), **keywords)
    if importance is not None:
        given = replace(given, importance=importance)
    array = as_weight(weight, fmt)
    check_finite(array)
    out = empty(fmt, array.shape)
    set_scales(out, chosen, array, given)
    importance = relative_importance(given.importance, array.shape)
    launch, codes, scales = prepare(_to_device(array, device), out, fmt, chosen, importance)
    launch()
    out.codes[...] = codes.cpu().numpy().reshape(out.codes.shape)
    out.scales[...] = scales.cpu().numpy().reshape(out.scales.shape)
    if given.stats is not None:
        kernels.compare(out, array, given.stats)
    return out


def prepare(
    x: torch.Tensor, out: QuantizedTensor, fmt: BlockFormat, search: Search, importance: Any = None
) -> tuple[Callable[[], object], torch.Tensor, torch.Tensor]:
    """A launch of the kernel for x [..., N, K] on its device, and what it fills: bytes of codes, and scales.

    ``out`` has the global scales; ``importance`` FP32 [1 or matrices, K].
    """
    device = x.device
    blocks, matrices = x.numel() // 16, int(np.prod(x.shape[:-2], dtype=np.int64))
    inverses, overs = _factors(out, search, matrices)
    codes = torch.empty(blocks * 8, dtype=torch.uint8, device=device)
    scales = torch.empty(blocks, dtype=torch.uint8, device=device)
    weights = inverses if importance is None else importance
    over = search.only == "four_over_six"
    order = [fmt.codebooks[i] for i in fmt.order]
    offsets = np.array(search.offsets, dtype=np.int32)
    counts = [(2 if c.kind == "e2m1" else 1) if over else len(offsets) for c in order]
    shared = order[0].top if fmt.shared_base and not over else None
    arguments = (weights, inverses, overs, offsets)
    launch = partial(
        encode_kernel[(-(-blocks // _LANES),)],
        x, *(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arguments), codes, scales, blocks,
        max(blocks // matrices, 1), x.shape[-1] // 16, counts[0], counts[-1],
        FIRST=order[0].kind, SECOND=order[1].kind if len(order) > 1 else "", FIRST_INDEX=fmt.order[0],
        SECOND_INDEX=fmt.order[-1], FIRST_BASE=order[0].top, SECOND_BASE=shared or order[-1].top,
        SINGLE=search.single(fmt), METRIC=search.metric, WEIGHTED=importance is not None,
        WEIGHT_PER_MATRIX=importance is not None and len(importance) > 1, OVER=over, LANES=_LANES, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return launch, codes, scales


def _factors(out: QuantizedTensor, search: Search, matrices: int) -> Sequence[Any]:
    """What elements of each matrix are multiplied by, and the three numbers of Four Over Six."""
    one, top = np.float32(1), np.float32(1536)
    if out.global_scale is None:
        return np.ones(matrices, dtype=np.float32), np.ones((matrices, 3), dtype=np.float32)
    scale = out.global_scale.reshape(-1)
    if search.only != "four_over_six":
        return one / scale, np.ones((matrices, 3), dtype=np.float32)
    unit = unit_of(scale)
    amax = scale * unit * top
    encode_scale = top / amax
    return unit, np.stack([amax, encode_scale, one / encode_scale], axis=1)


def _to_device(array: Any, device: torch.device | str) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).to(device).view(torch.bfloat16)
    return torch.from_numpy(array).to(device)
