"""Search by the local Hessian: scale and table of a block chosen by e H e, H the block's own part of the Hessian.

The objective is that of NVIDIA's Model-Optimizer (its local-Hessian calibration for NVFP4), here for every format
with blocks along K and with every search's candidates. Blocks do not touch each other, unlike in GPTQ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from halfbyte.formats import BlockFormat, Format, QuantizedTensor, get_format
from halfbyte.kernels import ErrorStats
from halfbyte.search.gptq import Prepared, check, gptq, local_factors, lower
from halfbyte.search.gptq_reference import Rounding
from halfbyte.search.hessian import checked
from halfbyte.search.rotated_space import in_rotated_space

Codes = Literal["nearest", "feedback"]


def encode_local(
    weight: ArrayLike,
    format: str | Format,
    search: str,
    hessian: ArrayLike,
    *,
    codes: Codes = "nearest",
    damping: float = 0.01,
    global_scale: ArrayLike | None = None,
    global_scale_inv: ArrayLike | None = None,
    amax: ArrayLike | None = None,
    power_of_two: bool = False,
    stats: ErrorStats | None = None,
) -> QuantizedTensor:
    """Quantize ``weight`` [..., N, K], each block's scale and table chosen by its part of the Hessian.

    ``hessian`` [K, K] or [..., K, K] as in ``halfbyte.search.gptq``; only its blocks along the diagonal count.
    ``codes``: "nearest" rounds every weight to its nearest value; "feedback" takes each error out of the columns
    that follow in the block, which lowers e H e further, and judges the candidates so too.
    """
    fmt, k = get_format(format), np.shape(weight)[-1]
    given = np.asarray(hessian)
    if given.ndim < 2 or given.shape[-2:] != (k, k):
        checked(given, k)
    scales: dict[str, Any] = {"global_scale": global_scale, "global_scale_inv": global_scale_inv, "amax": amax}
    if isinstance(fmt, BlockFormat) and fmt.rotation:
        turned, own, swaps = in_rotated_space(weight, fmt, given)
        scales |= {"codes": codes, "damping": damping, "power_of_two": power_of_two, "stats": stats}
        return replace(encode_local(turned, fmt.plain, search, own, **scales), format=fmt, rotation=swaps)
    each = [given] if given.ndim == 2 else given.reshape(-1, k, k)
    prepared = [prepare_local(one, fmt, codes=codes, damping=damping) for one in each]
    return gptq(weight, fmt, search, prepared, power_of_two=power_of_two, stats=stats, **scales)


def prepare_local(
    hessian: ArrayLike, format: str | Format, *, codes: Codes = "nearest", damping: float = 0.01
) -> Prepared:
    """The blocks of a Hessian [K, K], factored; ``halfbyte.search.gptq.gptq`` takes it as its Hessian."""
    fmt = get_format(format)
    check(fmt, "local_hessian", "none")
    h = checked(hessian, np.shape(hessian)[-1] if np.ndim(hessian) else 0)
    fmt.check((1, len(h)))
    factors = local_factors(h, fmt.block[1], damping)
    gain = np.ascontiguousarray((factors.gain / factors.gain.mean()).reshape(-1), dtype=np.float32)
    if codes == "feedback":
        inner = lower(factors.feedback)
        rounding = Rounding(gain, inner, True, inner)
    else:
        rounding = Rounding(gain, lower(factors.unfold))
    return Prepared(fmt, "local_hessian", "none", rounding, None, factors.damping)
