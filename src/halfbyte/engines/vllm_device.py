"""Products for the device that vLLM runs on: the compiled ones on a CPU, those of ``halfbyte.gpu`` on CUDA devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from halfbyte.formats import Format, QuantizedTensor
from halfbyte.gpu.device_products import DeviceRows, available, has_product
from halfbyte.runtime import packed


def keeps_packed_on(device: str) -> bool:
    """Whether layers on a type of device can keep their weights packed: a CPU, or a CUDA device with Triton."""
    return device == "cpu" or (device == "cuda" and available())


def multiplies(fmt: Format, device: str) -> bool:
    """Whether weights of a format are multiplied as they are on a type of device."""
    return packed.has_kernel(fmt) if device == "cpu" else has_product(fmt)


def linear_product(tensors: Sequence[QuantizedTensor], device: torch.device) -> Any:
    """Pack matrices that take the same activations into one product on a device.

    NoKernelError where there is none.
    """
    if device.type == "cpu":
        return packed.pack_linear(tensors)
    return products_on(tensors, device)


def products_on(tensors: Sequence[QuantizedTensor], device: torch.device) -> Any:
    """One product of ``halfbyte.gpu`` where the matrices can be one, else several side by side."""
    from halfbyte.gpu.device_linear import DeviceLinear

    whole = packed.join_rows(tensors)
    if whole is not None:
        return DeviceLinear(whole, device=device)
    return DeviceRows([DeviceLinear(tensor, device=device) for tensor in tensors])


def experts_product(up: QuantizedTensor, down: QuantizedTensor, device: torch.device, **settings: Any) -> Any:
    """Pack a mixture of experts for a device; ``settings`` as in ``pack_experts``, biases as NumPy arrays."""
    if device.type == "cpu":
        return packed.pack_experts(up, down, **settings)
    return mixture_on(up, down, device, **settings)


def mixture_on(up: QuantizedTensor, down: QuantizedTensor, device: torch.device, **settings: Any) -> Any:
    """A mixture of ``halfbyte.gpu`` on a device."""
    from halfbyte.gpu.device_experts import DeviceExperts

    biases = {name: settings.pop(name, None) for name in ("gate_up_bias", "down_bias")}
    tensors: dict[str, Any] = {name: None if bias is None else torch.from_numpy(bias) for name, bias in biases.items()}
    return DeviceExperts(up, down, **tensors, **settings, device=device)


def has_mixture(activation: str, gated: bool, width: int, device: str) -> bool:
    """Whether experts of an activation and a width are multiplied as they are on a type of device."""
    if device == "cpu":
        return True
    from halfbyte.gpu.device_experts import ACTIVATIONS

    return gated and activation in ACTIVATIONS and width % 16 == 0
