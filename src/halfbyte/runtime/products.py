"""Products of modules: who shares one, and the weights that they hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any
from weakref import ref

import numpy as np
import torch

from halfbyte.formats import QuantizedTensor
from halfbyte.kernels.linear import PackedWeight
from halfbyte.runtime.ops import handle_of, run_linear
from halfbyte.runtime.packed import PackedRows, rows_of

_NUMPY: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float16: np.float16}


class Mode:
    """How the products of a model treat activations: "exact", "int8" or "auto"; all its modules share one."""

    def __init__(self, name: str = "exact") -> None:
        self.name = name


class SharedProduct:
    """One product of several modules that take the same activations, such as query, key and value.

    The first module that is called computes the results of all of them; the others, called with the very same tensor,
    take theirs.
    """

    def __init__(self, product: Any, sizes: Sequence[int], mode: Mode) -> None:
        self.product, self.mode = product, mode
        ends = list(accumulate(sizes))
        self.ranges = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.handle = handle_of(product)
        self._waiting: tuple[Any, torch.Tensor, set[int]] | None = None

    def run(self, x: torch.Tensor, part: int) -> torch.Tensor:
        """Return the results of module number ``part``."""
        if torch.compiler.is_compiling():
            y: torch.Tensor = torch.ops.halfbyte.linear(x, self.handle, self.product.n, self.mode.name)
            return y if len(self.ranges) == 1 else y[..., slice(*self.ranges[part])]
        if len(self.ranges) == 1:
            return run_linear(x, self.product, self.mode.name)
        waiting = self._waiting
        # a part takes a result once, so that a module which is called again computes again
        if waiting is not None and waiting[0]() is x and part in waiting[2]:
            y, left = waiting[1], waiting[2] - {part}
        else:
            y, left = run_linear(x, self.product, self.mode.name), set(range(len(self.ranges))) - {part}
        self._waiting = (ref(x), y, left) if left else None
        return y[..., slice(*self.ranges[part])]


class PackedMatrix:
    """The weight [N, K] of one module: part of a product."""

    def __init__(self, shared: SharedProduct, part: int) -> None:
        self.shared, self.part = shared, part
        first, stop = shared.ranges[part]
        self.shape = (stop - first, shared.product.k)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + bias."""
        return self.shared.run(x, self.part)

    def tensor(self) -> QuantizedTensor:
        """Return the quantized weight, byte for byte."""
        product = self.shared.product
        if isinstance(product, PackedRows):
            return product.products[self.part].unpack()
        whole = product.unpack()
        return whole if len(self.shared.ranges) == 1 else rows_of(whole, *self.shared.ranges[self.part])

    def rows(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of the weight, as an embedding looks them up: [..., K] for integers [...]."""
        product, numbers = self.shared.product, indices.numpy()
        if isinstance(product, PackedRows):
            product = product.products[self.part]
        else:
            numbers = numbers + self.shared.ranges[self.part][0]
        return torch.from_numpy(product.rows(numbers, _NUMPY.get(dtype, np.float32))).to(dtype)


class PackedStack:
    """The weights [E, N, K] of a mixture of experts."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight, self.shape = weight, weight.shape

    def tensor(self) -> QuantizedTensor:
        """Return the quantized weights, byte for byte."""
        return self.weight.unpack()

    def matrix(self, index: int) -> QuantizedTensor:
        """Return the weight of one expert."""
        return self.weight.matrix(index)
