"""Targets of rounding become codes: what a calibration that quantizes as it goes hands to the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from halfbyte.calibration import Activations
from halfbyte.calibration.importance import Floats
from halfbyte.convert.encode_slice import encode_slice, not_finite
from halfbyte.convert.hessian_cache import prepare_for
from halfbyte.errors import FormatError, UnconvertibleError
from halfbyte.formats import QuantizedTensor
from halfbyte.kernels import ErrorStats
from halfbyte.kernels import amax as largest
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.shards import Item
from halfbyte.search.output_metric import prepare_output
from halfbyte.search.prepared import Prepared
from halfbyte.search.rotated_space import hessian_in_block_space


@dataclass
class InputHessian:
    """The mean of x̂ x̂ᵀ, FP32 [K, K], factored once for each way in which weights that read x̂ are rounded."""

    values: Floats
    _prepared: dict[tuple[object, ...], Prepared] = field(default_factory=dict)

    def prepared(self, item: Item) -> Prepared:
        """Factor it for the format and method of an item, in rotated space where the format is."""
        assert item.format is not None and item.method is not None
        key = item.format.name, item.method
        if key not in self._prepared:
            hessian, _ = hessian_in_block_space(self.values, item.format, ())
            self._prepared[key] = prepare_for(hessian, item.format.plain, item.method)
        return self._prepared[key]


@dataclass(frozen=True)
class Target:
    """What the codes of a weight are to come close to: FP32 [N, K] of a matrix or of one expert of a stack.

    ``hessian`` is that of its inputs; None: rounded by the search alone. ``output`` FP32 [N, N] is the sum of gᵀg over
    the gradients at its outputs, which weighs its rows; None: all weigh the same.
    """

    item: Item
    values: Floats
    hessian: InputHessian | None
    output: Floats | None = None


def encode_targets(plan: Plan, targets: Sequence[Target]) -> list[QuantizedTensor]:
    """Encode matrices that share one global scale, or one expert [1, N, K]; one tensor for each target.

    UnconvertibleError names the weight that its format cannot hold.
    """
    arrays, steps = [], []
    for target in targets:
        item = target.item
        assert item.format is not None
        values = target.values[None] if len(item.weight.shape) > 2 else target.values
        rotation = None
        if item.format.rotation and target.hessian is not None:
            _, rotation = hessian_in_block_space(target.hessian.values, item.format, values.shape[:-2])
        try:
            arrays.append(item.format.rotate(np.ascontiguousarray(values, np.float32), rotation)[0])
        except FormatError as error:
            raise not_finite(item.weight.name) from error
        steps.append(rotation)
    largests = []
    for target, array in zip(targets, arrays, strict=True):
        value, finite = largest(array)
        if not finite:
            raise not_finite(target.item.weight.name)
        largests.append(value)
    shared = np.max(largests) if len(targets) > 1 else largests[0]
    encoded = []
    for target, array, rotation in zip(targets, arrays, steps, strict=True):
        prepared, outputs = None, None
        method = target.item.method
        if target.hessian is not None and method is not None:
            try:
                prepared = [target.hessian.prepared(target.item)]
                if target.output is not None:
                    outputs = [prepare_output(target.output, refine=method.refine is not None)]
            except FormatError as error:
                name = target.item.weight.name
                raise UnconvertibleError(f"{name}: {error}", {name: str(error)}) from error
        amax = np.asarray(shared, np.float32)
        known = Activations(None, prepared, rotation, outputs)
        encoded.append(encode_slice(plan, target.item, array, amax, [ErrorStats()], known))
    return encoded
