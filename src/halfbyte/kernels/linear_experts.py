"""Mixtures of experts whose weights stay packed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import FormatError
from halfbyte.formats import QuantizedTensor
from halfbyte.kernels.linear_layout import NativeMixture, NativeProduct
from halfbyte.kernels.linear_native import ACTIVATIONS, address_of
from halfbyte.kernels.linear_runtime import NoKernelError, native_library, product_on_arrays
from halfbyte.kernels.linear_weight import PackedWeight


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
        library, name = native_library()
        chosen = np.ascontiguousarray(experts, dtype=np.int64)
        shares = np.ascontiguousarray(weights, dtype=np.float32)
        if x.ndim != 2 or chosen.ndim != 2 or chosen.shape != shares.shape or len(chosen) != len(x):
            shapes = f"{list(x.shape)}, {list(chosen.shape)} and {list(shares.shape)}"
            raise FormatError(f"x, experts and weights must be [T, K], [T, slots] and [T, slots], not {shapes}")
        product, y, _kept = product_on_arrays(x, self.k, self.n, mode, dtype)
        mixture = self.mixture(chosen.ctypes.data, shares.ctypes.data, chosen.shape[1])
        library.experts(name, mixture, product)
        return y

    def mixture(self, experts: int, weights: int, slots: int) -> NativeMixture:
        """The structure of a call: addresses of int64 and FP32 [T, slots], which are not checked."""
        pair = (address_of(self.gate_up.native), address_of(self.down.native))
        return NativeMixture(*pair, experts, weights, slots, **self._settings)

    def run(self, mixture: NativeMixture, product: NativeProduct) -> None:
        """The same on raw addresses: see ``mixture`` and ``product_of``."""
        library, name = native_library()
        library.experts(name, mixture, product)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.gate_up.nbytes + self.down.nbytes
