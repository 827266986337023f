"""A quantized weight in panels of 16 rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import FormatError
from halfbyte.formats import QuantizedTensor
from halfbyte.kernels.linear_layout import SCALE_KINDS_BY_DTYPE, describe_weight
from halfbyte.kernels.linear_native import aligned
from halfbyte.kernels.linear_runtime import NoKernelError, native_library


class PackedWeight:
    """The arrays of a quantized weight [..., N, K] in panels of 16 rows; ``native`` describes them."""

    def __init__(self, tensor: QuantizedTensor, bias: NDArray[Any] | None = None) -> None:
        library, _ = native_library()
        native = describe_weight(tensor.format)
        if native is None or len(tensor.shape) not in (2, 3):
            shape = list(tensor.shape)
            raise NoKernelError(f"there is no compiled product for a weight of format {tensor.format.name}, {shape}")
        self.format, self.shape = tensor.format, tuple(tensor.shape)
        self.native = native
        self._library = library
        native.lead = int(np.prod(self.shape[:-2], dtype=np.int64))
        native.n, native.k = self.shape[-2:]
        arrays = self._checked(tensor)
        self._has_inverse = tensor.global_scale_inv is not None
        self._keep(arrays, tensor, bias)
        sizes = library.packed_bytes(native)
        self._codes, self._scales, self._offsets = (aligned(size) for size in sizes)
        for name, memory in (("codes", self._codes), ("scales", self._scales), ("offsets", self._offsets)):
            setattr(native, name, memory.ctypes.data)
        library.repack(native, arrays["codes"], arrays["scales"], arrays.get("offsets"))

    def _checked(self, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        arrays = {}
        for name, (dtype, shape) in tensor.format.parts(self.shape).items():
            array = getattr(tensor, name)
            if name == "global_scale" and tensor.global_scale_inv is not None:
                array = tensor.global_scale_inv
            if name == "rotation" and array is None:
                continue
            if name == "scales" and array is not None and np.dtype(dtype).name in SCALE_KINDS_BY_DTYPE:
                array = self._wide_scales(array, np.dtype(dtype))
                dtype = array.dtype
            if array is None or array.shape != shape or array.dtype != dtype:
                held = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
                raise FormatError(
                    f"{name} of a {tensor.format.name} weight {list(self.shape)} must be {np.dtype(dtype)} "
                    f"{list(shape)}, not {held}"
                )
            arrays[name] = np.require(array, requirements=("C", "A"))
        self._scale_type = arrays["scales"].dtype
        return arrays

    def _wide_scales(self, scales: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Scales in the type of their file, which need not be the format's where that is no byte."""
        if scales.dtype == dtype:
            return scales
        if scales.dtype.itemsize == 1 or self.native.block_rows != 1:
            return scales.astype(np.float32)
        self.native.scale_kind = SCALE_KINDS_BY_DTYPE.get(scales.dtype.name, self.native.scale_kind)
        return scales

    def _keep(self, arrays: dict[str, NDArray[Any]], tensor: QuantizedTensor, bias: NDArray[Any] | None) -> None:
        native = self.native
        scale = arrays.get("global_scale")
        self._global = None if scale is None else scale.reshape(-1).copy()
        native.divide = self._has_inverse
        native.global_scale = None if self._global is None else self._global.ctypes.data
        self._swaps = arrays["rotation"].copy() if "rotation" in arrays else None
        if self._swaps is not None:
            native.swaps = self._swaps.ctypes.data
        elif native.swap_steps:
            native.swap_steps = 0  # no steps are stored: the Hadamard matrix alone
        self.bias = None if bias is None else np.array(bias, dtype=np.float32)
        if self.bias is not None:
            wanted = (*self.shape[:-2], self.shape[-2])
            if self.bias.shape != wanted:
                raise FormatError(f"the bias of a weight {list(self.shape)} must be {list(wanted)}")
            native.row_bias = self.bias.ctypes.data

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that stay in memory."""
        arrays = (self._codes, self._scales, self._offsets, self._global, self._swaps, self.bias)
        return sum(a.nbytes for a in arrays if a is not None)

    def unpack(self) -> QuantizedTensor:
        """The quantized tensor that was packed, byte for byte."""
        parts = self.format.parts(self.shape)
        arrays: dict[str, Any] = {
            name: np.empty(size, dtype=self._scale_type if name == "scales" else dtype)
            for name, (dtype, size) in parts.items()
            if name in ("codes", "scales", "offsets")
        }
        self._library.unpack(self.native, arrays["codes"], arrays["scales"], arrays.get("offsets"))
        return self._tensor(self.shape, arrays)

    def matrix(self, index: int) -> QuantizedTensor:
        """One matrix [N, K] of a stack, byte for byte."""
        whole, shape = self.format.parts(self.shape[-2:]), self.shape[-2:]
        if self.native.block_rows != 1:
            return _matrix_of(self.unpack(), index)
        arrays: dict[str, Any] = {
            name: np.empty(size, dtype=self._scale_type if name == "scales" else dtype)
            for name, (dtype, size) in whole.items()
            if name in ("codes", "scales", "offsets")
        }
        chosen = np.arange(shape[0], dtype=np.int64)
        parts = (arrays["codes"], arrays["scales"], arrays.get("offsets"))
        self._library.unpack_rows(self.native, index, chosen, *parts)
        return _matrix_of(self._tensor(self.shape, arrays), index, packed=True)

    def rows(self, indices: NDArray[Any], dtype: Any = np.float32) -> NDArray[Any]:
        """Rows of a matrix [N, K] as their codes decode them, rounded to ``dtype``: [..., K] for integers [...].

        IndexError for an index that is no row's.
        """
        chosen = np.ascontiguousarray(indices, dtype=np.int64).reshape(-1)
        if len(self.shape) != 2:
            raise FormatError(f"rows are looked up in a matrix, not in a weight of shape {list(self.shape)}")
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < self.shape[0]:
            raise IndexError(
                f"a weight {list(self.shape)} has no row {chosen[(chosen < 0) | (chosen >= self.shape[0])][0]}"
            )
        out = np.empty((chosen.size, self.shape[1]), dtype=dtype)
        # rows that share scales with others are decoded one by one, each with its own copy of them
        step = max(1, chosen.size) if self.native.block_rows == 1 else 1
        for first in range(0, chosen.size, step):
            out[first : first + step] = self._some_rows(chosen[first : first + step]).decode(dtype)
        return out.reshape(*np.shape(indices), self.shape[1])

    def _some_rows(self, chosen: NDArray[np.int64]) -> QuantizedTensor:
        shape = (chosen.size, self.shape[1])
        parts = self.format.parts(shape)
        arrays: dict[str, Any] = {
            name: np.empty(size, dtype=self._scale_type if name == "scales" else dtype)
            for name, (dtype, size) in parts.items()
            if name in ("codes", "scales", "offsets")
        }
        self._library.unpack_rows(self.native, 0, chosen, arrays["codes"], arrays["scales"], arrays.get("offsets"))
        return self._tensor(shape, arrays)

    def _tensor(self, shape: tuple[int, ...], arrays: dict[str, Any]) -> QuantizedTensor:
        scale = None if self._global is None else self._global.reshape(shape[:-2]).copy()
        if scale is not None and self._has_inverse:
            arrays["global_scale_inv"], scale = scale, np.asarray(np.float32(1) / scale)
        arrays["global_scale"] = scale
        arrays["rotation"] = None if self._swaps is None else self._swaps.copy()
        return QuantizedTensor(self.format, shape, **arrays)

    def __reduce__(self) -> Any:
        raise TypeError("packed weights hold addresses and cannot be pickled; pickle what unpack() gives")


def _matrix_of(stack: QuantizedTensor, index: int, packed: bool = False) -> QuantizedTensor:
    """One matrix of a stack; ``packed``: codes, scales and offsets are those of this matrix already."""
    alone = ("codes", "scales", "offsets") if packed else ()
    names = ("codes", "scales", "offsets", "global_scale", "global_scale_inv", "rotation")
    arrays = {name: getattr(stack, name) for name in names if getattr(stack, name) is not None}
    parts: dict[str, Any] = {name: a if name in alone else np.asarray(a[index]) for name, a in arrays.items()}
    return replace(stack, shape=stack.shape[1:], **parts)
