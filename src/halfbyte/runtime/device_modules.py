"""Packed modules on a GPU: their products run there by the kernels of ``halfbyte.gpu``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from halfbyte.errors import FormatError
from halfbyte.formats import QuantizedTensor
from halfbyte.gpu.device_products import available, has_product
from halfbyte.kernels.linear import PackedExperts, PackedWeight
from halfbyte.kernels.linear_native import ACTIVATIONS
from halfbyte.runtime.ops import handle_of, run_linear
from halfbyte.runtime.packed import NoKernelError, pack_linear
from halfbyte.runtime.products import Mode, PackedMatrix, PackedStack, SharedProduct


class DeviceMatrix:
    """The weight [N, K] of one module on a GPU, as ``PackedMatrix`` is one on the CPU."""

    def __init__(self, product: Any) -> None:
        self.product, self.shape, self.device = product, (product.n, product.k), product.weight.device
        self.handle = handle_of(product)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + bias."""
        if torch.compiler.is_compiling():
            result: torch.Tensor = torch.ops.halfbyte.linear(x, self.handle, self.product.n, "exact")
            return result
        return run_linear(x, self.product)

    def tensor(self) -> QuantizedTensor:
        """Return the quantized weight, byte for byte."""
        return self.product.unpack()

    def rows(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of the weight, as an embedding looks them up."""
        from halfbyte.gpu.device_rows import rows_of_weight

        return rows_of_weight(self.product.weight, indices, dtype)


class DeviceStack:
    """The weights [E, N, K] of a mixture of experts on a GPU."""

    def __init__(self, packed: PackedWeight, device: torch.device) -> None:
        # the file's bytes stay where they are: the mixture on the device has its own
        self.weight, self.shape, self.device = packed, packed.shape, device

    def tensor(self) -> QuantizedTensor:
        """Return the quantized weights, byte for byte."""
        return self.weight.unpack()

    def matrix(self, index: int) -> QuantizedTensor:
        """Return the weight of one expert."""
        return self.weight.matrix(index)


def place_module(module: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Bring the products of a packed module to a device, for activations of a type.

    False where they have none there; they are then where they were, or on the CPU. Modules that share a weight share
    it there too.
    """
    held = module._packed
    if not available() or not all(has_product(_format_of(packed), dtype) for packed in held.values()):
        return False
    there = device_of(module)
    if there == device:
        return True
    if there is not None:
        return_module(module)
    mixture: PackedExperts | None = module.__dict__.get("_mixture")
    try:
        if mixture is not None:
            moved = _experts_on(mixture, device)
            module.__dict__.update(_mixture=moved, _handle=handle_of(moved), _cpu_mixture=mixture)
            placed: dict[str, Any] = {name: DeviceStack(packed.weight, device) for name, packed in held.items()}
        elif all(isinstance(packed, PackedMatrix) for packed in held.values()):
            placed = {name: _matrix_on(module, packed, device) for name, packed in held.items()}
        else:
            return False
    except (NoKernelError, FormatError):
        return False
    held.update(placed)
    return True


def device_of(module: Any) -> torch.device | None:
    """Return the device to which ``place_module`` brought the products of a packed module; None for the CPU's own."""
    placed = (packed for packed in module._packed.values() if isinstance(packed, DeviceMatrix | DeviceStack))
    return next((packed.device for packed in placed), None)


def return_module(module: Any) -> None:
    """Bring the products of a module back to the CPU."""
    state = module.__dict__
    mixture = state.pop("_cpu_mixture", None)
    if mixture is not None:
        state["_mixture"], state["_handle"] = mixture, handle_of(mixture)
    for name, packed in module._packed.items():
        if isinstance(packed, DeviceStack):
            module._packed[name] = PackedStack(packed.weight)
        elif isinstance(packed, DeviceMatrix):
            bias = packed.product.bias
            product = pack_linear([packed.tensor()], None if bias is None else bias.float().cpu().numpy())
            module._packed[name] = PackedMatrix(SharedProduct(product, [packed.shape[0]], Mode()), 0)


def _format_of(packed: Any) -> Any:
    if isinstance(packed, PackedStack | DeviceStack):
        return packed.weight.format
    if isinstance(packed, DeviceMatrix):
        return packed.product.weight.format
    product = packed.shared.product
    return (product.products[packed.part] if hasattr(product, "products") else product).weight.format


def _matrix_on(module: Any, packed: PackedMatrix, device: torch.device) -> DeviceMatrix:
    from halfbyte.gpu.device_linear import DeviceLinear

    places: dict[Any, DeviceMatrix] = packed.__dict__.setdefault("_placed", {})
    bias = _bias_of(packed)
    if device not in places:
        places[device] = DeviceMatrix(
            DeviceLinear(packed.tensor(), None if bias is None else torch.from_numpy(bias), device)
        )
    return places[device]


def _bias_of(packed: PackedMatrix) -> Any:
    """The bias that is part of a matrix's product."""
    product = packed.shared.product
    if hasattr(product, "products"):
        return product.products[packed.part].weight.bias
    bias = product.weight.bias
    return None if bias is None else np.ascontiguousarray(bias[slice(*packed.shared.ranges[packed.part])])


def _experts_on(mixture: PackedExperts, device: torch.device) -> Any:
    from halfbyte.gpu.device_experts import DeviceExperts

    settings = dict(mixture._settings)
    names = {number: name for name, number in ACTIVATIONS.items()}
    biases = [mixture.gate_up.bias, mixture.down.bias]
    return DeviceExperts(
        mixture.gate_up.unpack(),
        mixture.down.unpack(),
        *(None if bias is None else torch.from_numpy(bias) for bias in biases),
        activation=names[int(settings["activation"])],
        gated=bool(settings["gated"]),
        interleaved=bool(settings["interleaved"]),
        limit=float(settings["limit"]),
        alpha=float(settings["alpha"]),
        device=device,
    )
