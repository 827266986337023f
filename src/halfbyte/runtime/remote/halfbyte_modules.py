"""Modules whose weights stay in 4 bit and are decoded where they are used. Needs torch only.

Every format is read from its description in ``quantization_config``; nothing about a format is known here but how
scales are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .halfbyte_rotation import unrotated

PARTS = ("codes", "scales", "tensor_scale", "offsets", "rotation")
CHUNK = 1 << 22  # values decoded at a time


def _small_float(code: int, mantissa_bits: int, bias: int) -> float:
    field = code >> mantissa_bits
    mantissa = (code & ((1 << mantissa_bits) - 1)) + ((1 << mantissa_bits) if field else 0)
    return math.ldexp(mantissa, max(field, 1) - bias - mantissa_bits)


def _e4m3(code: int) -> float:
    if code & 127 == 127:
        return math.nan
    return math.copysign(_small_float(code & 127, 3, 7), -1 if code & 128 else 1)


BYTE_SCALES: dict[str, Callable[[int], float]] = {
    "e4m3": _e4m3,
    "e8m0": lambda code: math.ldexp(1, code - 127) if code < 255 else math.nan,
    "e3m3": lambda code: _small_float(code & 63, 3, 3),
    "e6m2": lambda code: math.ldexp(4 + (code & 3), (code >> 2) - 50),
}

BYTE_TABLES: dict[str, Callable[[int], float]] = {"e4m3": _e4m3, "int8": lambda code: code - (code & 128) * 2}


class Decoder:
    """FP32 values of codes and scales, bit for bit those of halfbyte's reference, by a format's ``description``."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.rows, self.columns = description["block"]
        self.bits: int = description["bits"]
        self.scale: str = description["scale"]
        self.offset: str | None = description.get("offset")
        # bits of the scale's code: the selector lies above them in the same byte
        self.shift = int(description["selector"].split(">>")[1]) if description.get("selector") else None
        self.rotation: dict[str, Any] | None = description.get("rotation")
        tables = description.get("table_values") or [_table(self.bits, *description.get("tables", ()))]
        self._values = _constant([_per_byte(table) for table in tables]).flatten(0, 1)
        value = BYTE_SCALES.get("e6m2" if self.scale == "hif4" else self.scale)
        mask = 255 if self.shift is None else (1 << self.shift) - 1
        self._scales = _constant([value(code & mask) for code in range(256)] if value else [])

    def __call__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        tensor_scale: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
        rotation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Values [..., N, K] of codes [..., N, K*bits/8], scales, tensor_scale [...], offsets and rotation."""
        values = self._decoded(codes, scales, tensor_scale, offsets)
        return unrotated(values, self.rotation["size"], rotation) if self.rotation else values

    def _decoded(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        tensor_scale: torch.Tensor | None,
        offsets: torch.Tensor | None,
    ) -> torch.Tensor:
        if self._values.device != codes.device:
            self._values, self._scales = self._values.to(codes.device), self._scales.to(codes.device)
        shape = (*codes.shape[:-1], codes.shape[-1] * 8 // self.bits)
        if self.bits not in (4, 8):
            codes = _bytes_of(codes, self.bits)
        index = codes.int()
        if self.shift is not None:
            chosen = (scales >> self.shift).int() * 256
            index = (index.view(*scales.shape, -1) + chosen[..., None]).view(codes.shape)
        values = nn.functional.embedding(index, self._values).flatten(-2)
        if self.scale == "hif4":
            return (values.view(*scales.shape, 16, 4) * self._three_levels(scales)[..., None]).view(shape)
        wide = self._scales[scales.int()] if len(self._scales) else scales.float()
        if tensor_scale is not None:
            wide = wide * tensor_scale[..., None, None]
        if offsets is not None:
            grouped, wide, shift = values.view(*scales.shape, -1), wide[..., None], offsets.float()[..., None]
            return (grouped * wide + shift if self.offset == "bias" else (grouped - shift) * wide).view(shape)
        if self.rows > 1:
            wide = wide.repeat_interleave(self.rows, -2)[..., : shape[-2], :]
            wide = wide.repeat_interleave(self.columns, -1)[..., : shape[-1]]
        elif self.columns > 0:
            return (values.view(*scales.shape, -1) * wide[..., None]).view(shape)
        return values * wide

    def _three_levels(self, scales: torch.Tensor) -> torch.Tensor:
        """HiF4: E6M2 in the low byte, then an exponent bit for each 8 and for each 4 elements; [..., K/64, 16]."""
        words = scales.view(torch.int32)[..., None]
        bit = torch.arange(16, device=scales.device, dtype=torch.int32)
        exponents = ((words >> (8 + bit // 2)) & 1) + ((words >> (16 + bit)) & 1)
        return self._scales[words & 255] * (1 << exponents).float()


def _table(bits: int, name: str | None = None) -> list[float]:
    """What codes stand for in the table of this name; without one they are numbers. All but 4 bits are in bytes."""
    number = BYTE_TABLES[name] if name else float
    return [number(code) for code in range(16 if bits == 4 else 256)]


def _per_byte(table: list[float]) -> list[tuple[float, ...]]:
    """The values that a byte of codes stands for: two of a table of 16, the even element in the low nibble."""
    if len(table) == 16:
        return [(table[byte & 15], table[byte >> 4]) for byte in range(256)]
    return [(value,) for value in table]


def _bytes_of(stream: torch.Tensor, bits: int) -> torch.Tensor:
    """A byte per code of an unbroken stream of codes, 8 of which fill ``bits`` bytes."""
    groups = stream.unflatten(-1, (-1, bits)).long()
    words = (groups << torch.arange(0, 8 * bits, 8, device=stream.device)).sum(-1, keepdim=True)
    codes = (words >> torch.arange(0, 8 * bits, bits, device=stream.device)) & ((1 << bits) - 1)
    return codes.flatten(-2).to(torch.uint8)


def _constant(values: list[Any]) -> torch.Tensor:
    # models are built under a meta-device context, which must not catch the tables
    return torch.tensor(values, dtype=torch.float32, device="cpu")


class QuantizedWeights(nn.Module):
    """Mixed into a module's class: parameters that lie in buffers of codes and scales and are decoded when read."""

    _decoders: dict[str, Decoder]
    _transposed: set[str]
    _dtype: torch.dtype
    _dense_class: type

    def decoded(self, name: str, index: Any = None) -> torch.Tensor:
        """The parameter ``name``, or what ``index`` selects of its leading axis, in the model's dtype."""
        decoder = self._decoders[name]
        stored = {part: self._buffers.get(f"{name}_{part}") for part in PARTS}
        parts = {
            part: tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor
            for part, tensor in stored.items()
            if tensor is not None
        }
        if index is not None:
            parts = {part: tensor[index] for part, tensor in parts.items()}
        values = _in_chunks(decoder, parts, self._dtype)
        return values.transpose(-1, -2) if name in self._transposed else values

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedWeights:
        # the device may change, and the dtype that weights are decoded to, but never the stored numbers
        names = {f"{name}_{part}" for name in self._decoders for part in PARTS} & self._buffers.keys()
        stored = {name: self._buffers[name] for name in names}
        device = next(iter(stored.values())).device
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=device)).dtype
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            moved = self._buffers[name]
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self


def _in_chunks(decoder: Decoder, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Decode a large matrix a few thousand rows at a time, so that FP32 values of all of it never exist."""
    codes = parts["codes"]
    step = max(CHUNK // codes.shape[-1] // 128, 1) * 128
    if codes.dim() != 2 or codes.shape[0] <= step or decoder.rows < 0:
        return decoder(**parts).to(dtype)

    def cut(part: str, tensor: torch.Tensor, start: int) -> torch.Tensor:
        rows = 1 if part == "codes" else decoder.rows
        return tensor if part in ("tensor_scale", "rotation") else tensor[start // rows : -(-(start + step) // rows)]

    starts = range(0, codes.shape[0], step)
    pieces = ({part: cut(part, tensor, start) for part, tensor in parts.items()} for start in starts)
    return torch.cat([decoder(**piece).to(dtype) for piece in pieces])


class ExpertStack:
    """A stack of experts of which only the ones asked for are decoded; any other use decodes all of them."""

    def __init__(self, module: QuantizedWeights, name: str) -> None:
        self.module, self.name = module, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(index, tuple):
            return self.module.decoded(self.name)[index]
        return self.module.decoded(self.name, index)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.module.decoded(self.name), attribute)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def whole(value: Any) -> Any:
            return value.module.decoded(value.name) if isinstance(value, cls) else value

        return func(*tree_map(whole, args), **tree_map(whole, kwargs or {}))


@cache
def _quantized_class(base: type, names: tuple[str, ...], stacks: tuple[str, ...]) -> type:
    """A subclass of a module's class whose parameters ``names`` are decoded, those in ``stacks`` expert by expert."""

    def reader(name: str) -> property:
        return property(lambda self: ExpertStack(self, name) if name in stacks else self.decoded(name))

    body: dict[str, Any] = {name: reader(name) for name in names}
    eager = getattr(getattr(base, "forward", None), "__wrapped__", None)
    if stacks and eager is not None:
        # transformers' other implementations want all experts at once; the class's own loop takes them one by one
        body["forward"] = eager
    return type(f"Quantized{base.__name__}", (QuantizedWeights, base), body)


def quantize_module(module: nn.Module, name: str, description: dict[str, Any], parts: dict[str, torch.Tensor]) -> None:
    """Replace the parameter ``name`` by buffers ``<name>_codes``, ``<name>_scales`` ..., decoded when it is read."""
    parameter, decoder = module._parameters[name], Decoder(description)
    shape = (*parts["codes"].shape[:-1], parts["codes"].shape[-1] * 8 // decoder.bits)
    transposed = len(shape) == 3 and getattr(module, "is_transposed", False)
    wanted = tuple(parameter.transpose(-1, -2).shape) if transposed else tuple(parameter.shape)
    if shape != wanted:
        raise ValueError(f"{name} of {type(module).__name__} has shape {list(wanted)}, the checkpoint {list(shape)}")
    if not isinstance(module, QuantizedWeights):
        module._decoders, module._transposed, module._dtype = {}, set(), parameter.dtype
        module._dense_class = type(module)
    module._decoders[name] = decoder
    module._transposed |= {name} if transposed else set()
    del module._parameters[name]
    for part, tensor in parts.items():
        module.register_buffer(f"{name}_{part}", tensor)
    names = tuple(sorted(module._decoders))
    stacks = tuple(n for n in names if module._buffers[f"{n}_codes"].dim() == 3)
    module.__class__ = _quantized_class(module._dense_class, names, stacks)
    module._is_hf_initialized = True


def dequantize_module(module: QuantizedWeights, dtype: torch.dtype | None = None) -> None:
    """Turn the module back into what it was, with ordinary parameters."""
    dense = {name: module.decoded(name).contiguous() for name in module._decoders}
    for name in dense:
        for part in PARTS:
            module._buffers.pop(f"{name}_{part}", None)
    module.__class__ = module._dense_class
    for name, values in dense.items():
        module.register_parameter(name, nn.Parameter(values.to(dtype or values.dtype), requires_grad=False))
    for attribute in ("_decoders", "_transposed", "_dtype", "_dense_class"):
        delattr(module, attribute)


class TiedWeight(nn.Module):
    """Mixed into the class of a module whose weight is another module's quantized one."""

    _tied_source: list[nn.Module]
    _tied_names: tuple[str, str]
    _dense_class: type


def tie_module(module: nn.Module, tied: str, source: nn.Module, name: str) -> None:
    """Let the parameter ``tied`` of a module be read from the quantized parameter ``name`` of ``source``."""
    base = type(module)
    del module._parameters[tied]
    # in a list, so that it does not become a submodule
    module._tied_source, module._tied_names, module._dense_class = [source], (tied, name), base
    body = {tied: property(lambda self: getattr(self._tied_source[0], name))}
    module.__class__ = type(f"Tied{base.__name__}", (TiedWeight, base), body)
    module._is_hf_initialized = True


def untie_module(module: TiedWeight) -> None:
    """Undo ``tie_module``; the parameter is then that of the other module, which is dense by now."""
    (tied, name), source = module._tied_names, module._tied_source[0]
    module.__class__ = module._dense_class
    for attribute in ("_tied_source", "_tied_names", "_dense_class"):
        delattr(module, attribute)
    module.register_parameter(tied, source.get_parameter(name))
