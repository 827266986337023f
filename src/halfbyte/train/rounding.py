"""Masters to values: NumPy arrays in, codes, scales and decoded values out, and which gradients are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from halfbyte.convert.encode_slice import encode_slice
from halfbyte.formats import Format, QuantizedTensor
from halfbyte.kernels import ErrorStats, fake_quantize
from halfbyte.kernels import amax as largest
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.resources import shares_amax
from halfbyte.plan.shards import Item

Floats = NDArray[np.float32]


@dataclass
class Rounded:
    """A master's codes and scales, the FP32 values [..., N, K] that they stand for, and where gradients pass.

    ``passes`` bool [..., N, K] in the space of the blocks: the master is between both ends of its block.
    """

    tensor: QuantizedTensor
    values: Floats
    passes: NDArray[np.bool_]


def round_given(tensor: QuantizedTensor, master: Floats) -> Rounded:
    """Round a master, which lies in the space of the blocks, to the scales of a tensor."""
    native = fake_quantize.round_given(tensor.format.to_plain(tensor), master)
    if native is not None:
        rounded = replace(tensor, codes=native[0].codes)
        values = native[1] if tensor.format.rotation is None else rounded.decode()
        return Rounded(rounded, values, native[2])
    rounded = tensor.format.round_to(tensor, master)
    return Rounded(rounded, rounded.decode(), _between_the_ends(rounded, master))


def round_searched(plan: Plan, item: Item, master: Floats, group: Sequence[Floats]) -> Rounded:
    """Round a master as a conversion by this plan's item does; ``group``: all masters that share the global scale."""
    fmt = item.format
    assert fmt is not None
    shared = shares_amax([item])
    amax = np.max([largest(m)[0] for m in group]) if shared else largest(master)[0]
    stats = [ErrorStats() for _ in range(len(master) if master.ndim > 2 else 1)]
    tensor = encode_slice(plan, replace(item, method=None, weighted=False), master, amax, stats)
    return Rounded(tensor, tensor.decode(), _between_the_ends(tensor, master))


def unrotated_gradient(rounded: Rounded, gradient: Floats) -> Floats:
    """The gradient of a master from that of its values, in the space in which the master lies."""
    in_blocks = in_block_space(rounded.tensor, gradient)
    return np.asarray(np.where(rounded.passes, in_blocks, np.float32(0)))


def in_block_space(tensor: QuantizedTensor, values: Floats) -> Floats:
    """A weight, or its gradient, as the blocks of a tensor see it: rotated where its format is that of rotated ones."""
    fmt: Format = tensor.format
    return np.asarray(fmt.in_block_space(tensor, values)[1])


def _between_the_ends(tensor: QuantizedTensor, master: Floats) -> NDArray[np.bool_]:
    first, last = tensor.format.value_range(tensor)
    return (np.minimum(first, last) <= master) & (master <= np.maximum(first, last))
