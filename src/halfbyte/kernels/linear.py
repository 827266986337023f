"""Products of activations with weights that stay in 4 or 8 bits: y = x W^T + bias, and mixtures of experts.

A weight is packed once into panels of 16 rows, of as many bytes as its file has, and unpacked into the file's bytes
again. ``mode="exact"`` multiplies FP32 activations with the weight's exact values (BF16 ones too, with the
processor's BF16 products where it has them); ``mode="int8"`` rounds activations to int8 in groups of 32, except for
formats whose values are no integers times a scale (FP8, NF4), which it runs like ``exact``; ``mode="auto"`` is
``exact`` for mixtures of experts and up to 8 rows of activations, else ``int8``. A result does not depend on the
number of threads, nor, in one mode, on the other rows of the batch. The library has threads of its own; Python's lock
is released meanwhile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import FormatError
from halfbyte.formats import QuantizedTensor
from halfbyte.kernels.linear_experts import PackedExperts
from halfbyte.kernels.linear_layout import NativeDense, NativeProduct
from halfbyte.kernels.linear_native import TYPES
from halfbyte.kernels.linear_runtime import (
    NoKernelError,
    has_kernel,
    isa,
    isas,
    native_library,
    product_of,
    product_on_arrays,
    set_threads,
    threads,
    use_isa,
)
from halfbyte.kernels.linear_weight import PackedWeight

__all__ = [
    "NoKernelError",
    "PackedDense",
    "PackedExperts",
    "PackedLinear",
    "PackedWeight",
    "has_kernel",
    "isa",
    "isas",
    "product_of",
    "set_threads",
    "threads",
    "use_isa",
]


class PackedLinear:
    """y = x W^T + bias with a quantized weight [N, K] that stays packed.

    ``bias`` [N] or None. NoKernelError where the format has no compiled product here, FormatError where the tensor's
    arrays are not what its format says.
    """

    def __init__(self, tensor: QuantizedTensor, bias: NDArray[Any] | None = None) -> None:
        if len(tensor.shape) != 2:
            raise NoKernelError(f"a linear layer needs a matrix, not a weight of shape {list(tensor.shape)}")
        self.weight = PackedWeight(tensor, bias)
        self.n, self.k = self.weight.shape

    def __call__(self, x: NDArray[Any], mode: str = "exact", dtype: Any = np.float32) -> NDArray[Any]:
        """The product with x [..., K] in FP32, FP16 or BF16 (or uint16: bits of BF16), as ``dtype`` [..., N]."""
        library, name = native_library()
        product, y, _kept = product_on_arrays(x, self.k, self.n, mode, dtype)
        library.linear(name, self.weight.native, 0, product)
        return y

    def run(self, product: NativeProduct) -> None:
        """The same on raw addresses, which are not checked: see ``product_of``."""
        library, name = native_library()
        library.linear(name, self.weight.native, 0, product)

    def rows(self, indices: NDArray[Any], dtype: Any = np.float32) -> NDArray[Any]:
        """Rows of the weight, as an embedding looks them up: [..., K] in ``dtype`` for integers [...].

        They are what ``unpack().decode(dtype)`` has there. IndexError for an index that is no row's.
        """
        return self.weight.rows(indices, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.weight.nbytes

    def unpack(self) -> QuantizedTensor:
        """The quantized tensor that was packed, byte for byte."""
        return self.weight.unpack()


class PackedDense:
    """y = x W^T + bias with a matrix [N, K] of BF16, FP16 or FP32, used as it is and not copied.

    It is meant for kept layers and few rows of activations, where reading the matrix takes the time.
    """

    def __init__(self, values: NDArray[Any], bias: NDArray[Any] | None = None) -> None:
        native_library()
        if values.ndim != 2 or values.dtype.name not in TYPES:
            raise NoKernelError(f"there is no compiled product for a matrix of {values.dtype} {list(values.shape)}")
        if values.strides[1] != values.itemsize or values.strides[0] % values.itemsize or values.strides[0] < 0:
            raise NoKernelError("the rows of a matrix must be contiguous to be multiplied")
        self.values = values
        self.n, self.k = values.shape
        self.bias = None if bias is None else np.array(bias, dtype=np.float32)
        if self.bias is not None and self.bias.shape != (self.n,):
            raise FormatError(f"the bias of a matrix {list(values.shape)} must be [{self.n}]")
        self.native = NativeDense(values.ctypes.data, TYPES[values.dtype.name], self.n, self.k)
        self.native.stride = values.strides[0] // values.itemsize
        self.native.row_bias = None if self.bias is None else self.bias.ctypes.data

    def __call__(self, x: NDArray[Any], dtype: Any = np.float32) -> NDArray[Any]:
        """The product with x [..., K], as ``dtype`` [..., N]; sums are FP32."""
        library, name = native_library()
        product, y, _kept = product_on_arrays(x, self.k, self.n, "exact", dtype)
        library.dense(name, self.native, product)
        return y

    def run(self, product: NativeProduct) -> None:
        """The same on raw addresses, which are not checked: see ``product_of``."""
        library, name = native_library()
        library.dense(name, self.native, product)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix and its bias."""
        return self.values.nbytes + (0 if self.bias is None else self.bias.nbytes)
