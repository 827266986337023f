"""Products of activations with weights that stay in 4 or 8 bits: y = x W^T + bias, and mixtures of experts.

A weight is packed once into panels of 16 rows, of as many bytes as its file has, and unpacked into the file's bytes
again. ``mode="exact"`` multiplies FP32 activations with the weight's exact values (BF16 ones too, with the
processor's BF16 products where it has them); ``mode="int8"`` rounds activations to int8 in groups of 32, except for
formats whose values are no integers times a scale (FP8, NF4), which it runs like ``exact``. A result does not depend
on the number of threads, nor on the other rows of the batch. The library has threads of its own; Python's lock is
released meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte import kernels
from halfbyte.errors import FormatError, HalfbyteError
from halfbyte.formats import Format, QuantizedTensor
from halfbyte.kernels.linear_layout import NativeDense, NativeMixture, NativeProduct, describe_weight
from halfbyte.kernels.linear_native import (
    ACTIVATIONS,
    BFLOAT16,
    ISAS,
    MODES,
    TYPES,
    LinearNative,
    address_of,
    aligned,
    load,
)

__all__ = [
    "NoKernelError",
    "PackedDense",
    "PackedExperts",
    "PackedLinear",
    "has_kernel",
    "isa",
    "isas",
    "product_of",
    "set_threads",
    "threads",
    "use_isa",
]

_ALLOWED = {
    "avx512": tuple(ISAS),
    "avx2": ("avxvnni", "avx2"),
    "baseline": ("dotprod", "baseline"),
    "reference": (),
}
_forced: str | None = None


class NoKernelError(HalfbyteError):
    """There is no compiled product for a weight: its format, its shape or this installation has none.

    Callers decode the weight instead.
    """


def isas() -> tuple[str, ...]:
    """What this machine can run, the fastest first; empty without compiled kernels."""
    native = load()
    return native.isas if native else ()


def isa() -> str | None:
    """The instruction set that runs: the fastest that ``kernels.backend()`` allows, or what ``use_isa`` names."""
    if _forced is not None:
        return _forced
    allowed = _ALLOWED.get(kernels.backend(), ())
    return next((name for name in isas() if name in allowed), None)


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Use one of ``isas()`` within a ``with`` statement, in all threads (tests and benchmarks do)."""
    global _forced
    if name not in isas():
        raise ValueError(f"the instruction set {name!r} cannot run here; there are {', '.join(isas())}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def set_threads(count: int) -> None:
    """Let each call use so many threads of the library's own, the calling one among them (1 at first)."""
    if count < 1:
        raise ValueError(f"{count} threads cannot do anything; ask for 1 or more")
    native = load()
    if native:
        native.set_threads(count)


def threads() -> int:
    """Threads that a call may use."""
    native = load()
    return native.threads if native else 1


def has_kernel(fmt: Format) -> bool:
    """Whether there is a compiled product for weights of a format here."""
    return isa() is not None and describe_weight(fmt) is not None


def _native() -> tuple[LinearNative, str]:
    native, name = load(), isa()
    if native is None or name is None:
        raise NoKernelError("there are no compiled kernels here, so weights must be decoded to be multiplied")
    return native, name


class PackedWeight:
    """The arrays of a quantized weight [..., N, K] in panels of 16 rows; ``native`` describes them."""

    def __init__(self, tensor: QuantizedTensor, bias: NDArray[Any] | None = None) -> None:
        library, _ = _native()
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
        found = {}
        for name, (dtype, shape) in tensor.format.parts(self.shape).items():
            array = getattr(tensor, name)
            if name == "global_scale" and tensor.global_scale_inv is not None:
                array = tensor.global_scale_inv
            if name == "rotation" and array is None:
                continue
            if array is None or array.shape != shape or array.dtype != dtype:
                held = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
                raise FormatError(
                    f"{name} of a {tensor.format.name} weight {list(self.shape)} must be {np.dtype(dtype)} "
                    f"{list(shape)}, not {held}"
                )
            found[name] = np.require(array, requirements=("C", "A"))
        return found

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
            name: np.empty(size, dtype=dtype)
            for name, (dtype, size) in parts.items()
            if name in ("codes", "scales", "offsets")
        }
        self._library.unpack(self.native, arrays["codes"], arrays["scales"], arrays.get("offsets"))
        scale = None if self._global is None else self._global.reshape(self.shape[:-2]).copy()
        arrays["global_scale_inv" if self._has_inverse else "global_scale"] = scale
        arrays["rotation"] = None if self._swaps is None else self._swaps.copy()
        return QuantizedTensor(self.format, self.shape, **arrays)

    def __reduce__(self) -> Any:
        raise TypeError("packed weights hold addresses and cannot be pickled; pickle what unpack() gives")


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
        library, name = _native()
        product, y, _kept = _product(x, self.k, self.n, mode, dtype)
        library.linear(name, self.weight.native, 0, product)
        return y

    def run(self, product: NativeProduct) -> None:
        """The same on raw addresses, which are not checked: see ``product_of``."""
        library, name = _native()
        library.linear(name, self.weight.native, 0, product)

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
        _native()
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
        library, name = _native()
        product, y, _kept = _product(x, self.k, self.n, "exact", dtype)
        library.dense(name, self.native, product)
        return y

    def run(self, product: NativeProduct) -> None:
        """The same on raw addresses, which are not checked: see ``product_of``."""
        library, name = _native()
        library.dense(name, self.native, product)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix and its bias."""
        return self.values.nbytes + (0 if self.bias is None else self.bias.nbytes)


class PackedExperts:
    """A mixture of experts: for each row the sum over its slots of weight * down(activation(gate, up)).

    ``gate_up`` [E, 2W, K] holds all gates first, or gate and up in turn where ``interleaved``; not ``gated``: [E, W,
    K]. ``down`` [E, N, W]. ``activation``: "silu", "gelu_tanh", "clamped_swiglu" (gpt-oss: gates at most ``limit``,
    up within it, (up + 1) * gate * sigmoid(alpha * gate)), "relu2" or "identity". Biases [E, 2W] and [E, N]. Slots
    are added in their order, so results do not depend on which experts other rows chose.
    """

    def __init__(
        self,
        gate_up: QuantizedTensor,
        down: QuantizedTensor,
        gate_up_bias: NDArray[Any] | None = None,
        down_bias: NDArray[Any] | None = None,
        *,
        activation: str = "silu",
        gated: bool = True,
        interleaved: bool = False,
        limit: float = 7.0,
        alpha: float = 1.702,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise FormatError(f"unknown activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
        if len(gate_up.shape) != 3 or len(down.shape) != 3:
            raise NoKernelError("experts need stacks of matrices [experts, rows, columns]")
        width = gate_up.shape[1] // 2 if gated else gate_up.shape[1]
        fits = gate_up.shape[0] == down.shape[0] and down.shape[2] == width and (not gated or gate_up.shape[1] % 2 == 0)
        if not fits:
            shapes = f"{list(gate_up.shape)} and {list(down.shape)}"
            raise FormatError(f"gate_up and down of shapes {shapes} are not of the same experts")
        self.gate_up, self.down = PackedWeight(gate_up, gate_up_bias), PackedWeight(down, down_bias)
        self.count, self.n, self.k = gate_up.shape[0], down.shape[1], gate_up.shape[2]
        self._settings = {
            "activation": ACTIVATIONS[activation],
            "gated": gated,
            "interleaved": interleaved,
            "limit": limit,
            "alpha": alpha,
        }

    def __call__(
        self,
        x: NDArray[Any],
        experts: NDArray[Any],
        weights: NDArray[Any],
        mode: str = "exact",
        dtype: Any = np.float32,
    ) -> NDArray[Any]:
        """The sum for x [T, K], ``experts`` [T, slots] and their ``weights`` [T, slots], as ``dtype`` [T, N].

        Slots whose number is no expert's add nothing.
        """
        library, name = _native()
        chosen = np.ascontiguousarray(experts, dtype=np.int64)
        shares = np.ascontiguousarray(weights, dtype=np.float32)
        if x.ndim != 2 or chosen.ndim != 2 or chosen.shape != shares.shape or len(chosen) != len(x):
            shapes = f"{list(x.shape)}, {list(chosen.shape)} and {list(shares.shape)}"
            raise FormatError(f"x, experts and weights must be [T, K], [T, slots] and [T, slots], not {shapes}")
        product, y, _kept = _product(x, self.k, self.n, mode, dtype)
        mixture = self.mixture(chosen.ctypes.data, shares.ctypes.data, chosen.shape[1])
        library.experts(name, mixture, product)
        return y

    def mixture(self, experts: int, weights: int, slots: int) -> NativeMixture:
        """The structure of a call: addresses of int64 and FP32 [T, slots], which are not checked."""
        pair = (address_of(self.gate_up.native), address_of(self.down.native))
        return NativeMixture(*pair, experts, weights, slots, **self._settings)

    def run(self, mixture: NativeMixture, product: NativeProduct) -> None:
        """The same on raw addresses: see ``mixture`` and ``product_of``."""
        library, name = _native()
        library.experts(name, mixture, product)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.gate_up.nbytes + self.down.nbytes


def product_of(
    x: int, x_type: str, rows: int, y: int, y_type: str, k: int, n: int, mode: str = "exact"
) -> NativeProduct:
    """A product on contiguous memory: addresses and types ("float32", "float16", "bfloat16") of x [rows, k], y."""
    return NativeProduct(x, TYPES[x_type], rows, k, y, TYPES[y_type], n, MODES[mode])


def _product(x: NDArray[Any], k: int, n: int, mode: str, dtype: Any) -> tuple[NativeProduct, NDArray[Any], Any]:
    """The structure of a call, its result, and an array that must live until the call is over."""
    if mode not in MODES:
        raise FormatError(f"unknown mode {mode!r}; there are {', '.join(MODES)}")
    if x.dtype == np.uint16:
        x = x.view(BFLOAT16)
    if x.dtype.name not in TYPES or np.dtype(dtype).name not in TYPES:
        raise FormatError(f"activations and results are FP32, FP16 or BF16, not {x.dtype} and {np.dtype(dtype)}")
    if x.ndim == 0 or x.shape[-1] != k:
        raise FormatError(f"activations of shape {list(x.shape)} do not fit a weight with {k} columns")
    x = np.require(x, requirements=("C", "A"))
    y = np.empty((*x.shape[:-1], n), dtype=dtype)
    rows = x.size // k
    kept = x
    if rows == 0:
        kept = np.zeros((1, k), dtype=x.dtype)
    product = product_of(kept.ctypes.data, x.dtype.name, rows, y.ctypes.data, y.dtype.name, k, n, mode)
    return product, y, kept
