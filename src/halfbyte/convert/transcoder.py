"""Weights that are quantized already, carried over to another spelling without decoding them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from halfbyte.checkpoint import Reader
from halfbyte.dialects import UnequalScalesError
from halfbyte.errors import FormatError, UnconvertibleError
from halfbyte.formats import QuantizedTensor
from halfbyte.formats.transcode import top_exponent, transcode
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.shards import Item
from halfbyte.source.checkpoint import Checkpoint

Cuts = Sequence[tuple[int, int]]


@dataclass
class TranscodedSlice:
    """A slice before and after. ``exact``: every value is known to be identical without decoding."""

    before: QuantizedTensor
    tensor: QuantizedTensor
    exact: bool


class Transcoder:
    """Carries the quantized weights of a unit over.

    ``ready`` is False where matrices that share a global scale cannot all be carried: then all are requantized.
    """

    def __init__(self, plan: Plan, unit: Sequence[Item], cuts: Sequence[Cuts], reader: Reader) -> None:
        self.checkpoint: Checkpoint = plan.checkpoint
        self.global_scale_inv = plan.dialect.spelling.global_scale_inv
        self.reader = reader
        self._top: NDArray[np.int32] | None = None
        chosen = [(item, some) for item, some in zip(unit, cuts, strict=True) if item.action == "transcode"]
        self.ready = bool(chosen) and self._agree([item for item, _ in chosen], [some for _, some in chosen])

    def slices(self, item: Item, first: int, stop: int) -> Iterator[tuple[int, int, TranscodedSlice | None]]:
        """Leading indices (or rows) first..stop, or expert by expert; None for what has to be encoded."""
        if not self.ready or item.action != "transcode":
            yield first, stop, None
            return
        carried = self._carry(item, first, stop)
        if carried is None and stop - first > 1 and len(item.weight.shape) > 2:
            for expert in range(first, stop):
                yield expert, expert + 1, self._carry(item, expert, expert + 1)
        else:
            yield first, stop, carried

    def _carry(self, item: Item, first: int, stop: int) -> TranscodedSlice | None:
        try:
            before = self.checkpoint.read_quantized(self.reader, item.weight, first, stop)
        except UnequalScalesError:
            return None
        _check_finite(before, item.weight.name)
        assert item.format is not None
        tensor = transcode(before, item.format, self._top)
        if tensor is None:
            return None
        try:
            after = respell(tensor, self.global_scale_inv)
        except FormatError as error:
            raise UnconvertibleError(
                f"{item.weight.name}: {error}, and the dialect stores reciprocals; repair the source, or drop the "
                "tensor by a rule"
            ) from error
        return TranscodedSlice(before, after, after is tensor or _same_scales(after, tensor))

    def _agree(self, items: Sequence[Item], cuts: Sequence[Cuts]) -> bool:
        """Whether all matrices can have one global scale; experts of a stack have one each."""
        fmt, first = items[0].format, items[0].weight
        if len(first.shape) > 2 or not (fmt and fmt.shares_scale):
            return True
        before = {self.checkpoint.formats[item.weight.name] for item in items}
        if len(before) > 1:
            return False
        if before == {fmt}:
            ends = [self.checkpoint.read_quantized(self.reader, item.weight, 0, 1) for item in items]
            scales = [t.scales if t.global_scale is None else t.global_scale for t in ends]
            return all(np.array_equal(scale, scales[0]) for scale in scales)
        slices = [(item.weight, cut) for item, some in zip(items, cuts, strict=True) for cut in some]
        self._top = np.max([top_exponent(self.checkpoint.read_quantized(self.reader, w, *c)) for w, c in slices])
        assert fmt is not None
        return all(
            transcode(self.checkpoint.read_quantized(self.reader, w, *c), fmt, self._top) is not None for w, c in slices
        )


def respell(tensor: QuantizedTensor, global_scale_inv: bool) -> QuantizedTensor:
    """The same tensor with its global scale as a multiplier or as a divisor; the very same where it is so already."""
    if tensor.global_scale is None or (tensor.global_scale_inv is not None) == global_scale_inv:
        return tensor
    one = np.float32(1)
    with np.errstate(divide="ignore", over="ignore"):
        reciprocal = np.asarray(one / tensor.global_scale) if global_scale_inv else None
        scale = tensor.global_scale if reciprocal is None else np.asarray(one / reciprocal)
    if not all(np.isfinite(part).all() for part in (scale, reciprocal) if part is not None):
        raise FormatError("its global scale is zero or so small that its reciprocal is infinite")
    return replace(tensor, global_scale=scale, global_scale_inv=reciprocal)


def _same_scales(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether a multiplier and a divisor make the same of every scale code, as powers of two do."""
    codes = 1 << a.format.scale.bits if a.format.scale else 256  # selector bits lie above
    factors = [t.format.scale_factors(t)[..., :codes] for t in (a, b)]
    return np.array_equal(factors[0], factors[1], equal_nan=True)


def _check_finite(tensor: QuantizedTensor, name: str) -> None:
    """As decoding would find it, without decoding where the scales tell."""
    if not tensor.format.is_finite(tensor):
        raise UnconvertibleError(
            f"{name} decodes to a NaN or an infinity; repair the source, or drop the tensor by a rule"
        )
