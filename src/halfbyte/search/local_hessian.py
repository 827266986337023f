"""Search by the local Hessian: scale and codebook of a block chosen by e H e, H the block's own part of the Hessian.

The objective is that of NVIDIA's Model-Optimizer (its local-Hessian calibration for NVFP4), here for every format
with blocks along K and with every search's candidates. Blocks do not touch each other, unlike in GPTQ.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from halfbyte.formats import Format, get_format
from halfbyte.search.gptq_reference import Rounding
from halfbyte.search.hessian import checked
from halfbyte.search.prepared import Prepared, check, local_factors, lower

Codes = Literal["nearest", "feedback"]


def prepare_local(
    hessian: ArrayLike, format: str | Format, *, codes: Codes = "nearest", damping: float = 0.01
) -> Prepared:
    """The blocks of a Hessian [K, K], factored; ``halfbyte.search.gptq.gptq`` takes it as its Hessian.

    Only the blocks along the diagonal count. ``codes``: "nearest" rounds every weight to its nearest value; "feedback"
    takes each error out of the columns that follow in the block, which lowers e H e further, and judges the candidates
    so too.
    """
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
