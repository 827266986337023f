"""Modules of transformers whose weights stay packed: their classes get a forward that calls the compiled products.

A packed module is an instance of a subclass of its own class. Where other code reads its parameter, it is decoded;
that of an embedding, or of a class with a forward of its own, is a ``PackedParameter``, which matrix products and
lookups take as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from halfbyte.dialects.halfbyte import stored_arrays
from halfbyte.errors import HalfbyteError
from halfbyte.runtime.decode import decode, to_torch
from halfbyte.runtime.device_modules import DeviceMatrix, DeviceStack, device_of, place_module, return_module
from halfbyte.runtime.products import PackedMatrix, PackedStack
from halfbyte.runtime.remote.halfbyte_modules import ExpertStack, QuantizedWeights, quantize_module

logger = logging.getLogger("halfbyte")
Packed = PackedMatrix | PackedStack | DeviceMatrix | DeviceStack


class PackedWeights(QuantizedWeights):
    """Mixed into a module's class: parameters that lie packed beside the module; decoded when other code reads them."""

    _packed: dict[str, Packed]

    def decoded(self, name: str, index: Any = None) -> torch.Tensor:
        """The parameter ``name``, or one expert of it, in the model's dtype."""
        packed = self._packed[name]
        one = index is not None and isinstance(packed, PackedStack | DeviceStack)
        values = decode(packed.matrix(int(index)) if one else packed.tensor(), self._dtype)  # type: ignore[union-attr]
        values = values.transpose(-1, -2) if name in self._transposed else values
        values = values.to(device_of(self) or values.device)
        return values if index is None or one else values[index]

    def train(self, mode: bool = True) -> PackedWeights:
        """Only eval mode: packed weights have no gradients."""
        if mode:
            raise HalfbyteError(
                "a model with packed weights cannot be trained; load it with dequantize=True or call dequantize()"
            )
        return super().train(False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        there = device_of(self)
        example = fn(torch.empty(0, dtype=self._dtype, device=there))
        stays_placed = example.device == there or example.device.type == "cuda"
        if stays_placed and place_module(self, example.device, example.dtype):
            self._dtype = example.dtype
            return nn.Module._apply(self, fn, recurse)
        if there is not None:
            return_module(self)
        if example.device.type != "cpu":
            unpack_module(self)
            _say_moved(example.device.type)
            return self._apply(fn, recurse)
        self._dtype = example.dtype
        return nn.Module._apply(self, fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, packed in () if self.__dict__.get("_is_shared") else self._packed.items():
            for part, array in stored_arrays(packed.tensor()).items():
                destination[f"{prefix}{name}_{part}"] = to_torch(array)


class PackedParameter:
    """Stands for a packed matrix: products and lookups use it as it is, anything else decodes it."""

    def __init__(self, module: PackedWeights, name: str) -> None:
        self.module, self.name = module, name

    @property
    def packed(self) -> PackedMatrix | DeviceMatrix:
        """The matrix."""
        packed = self.module._packed[self.name]
        assert isinstance(packed, PackedMatrix | DeviceMatrix)
        return packed

    @property
    def dtype(self) -> torch.dtype:
        """What it is decoded to."""
        return self.module._dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return device_of(self.module) or torch.device("cpu")

    @property
    def shape(self) -> torch.Size:
        """Rows and columns."""
        return torch.Size(self.packed.shape)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.module.decoded(self.name), attribute)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.module.decoded(self.name)[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if len(args) > 1 and isinstance(args[1], cls) and not isinstance(args[0], cls):
            weight = args[1]
            if func is nn.functional.embedding:
                return weight.packed.rows(args[0], weight.dtype)
            if func is nn.functional.linear:
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                result = weight.packed.run(args[0])
                return result if bias is None else result + bias

        def whole(value: Any) -> Any:
            return value.module.decoded(value.name) if isinstance(value, cls) else value

        return func(*tree_map(whole, args), **tree_map(whole, kwargs))


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module._packed["weight"].run(x)
    return result


def _embedding(module: Any, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module._packed["weight"].rows(ids, module._dtype)
    return result


@cache
def _packed_class(base: type, names: tuple[str, ...], stacks: tuple[str, ...]) -> type:
    """A subclass of a module's class with packed parameters ``names``, those in ``stacks`` mixtures of experts."""
    forward = getattr(base, "forward", None)
    body: dict[str, Any] = {}
    if forward is nn.Linear.forward:
        body["forward"] = _linear
    elif forward is nn.Embedding.forward:
        body["forward"] = _embedding
    plain = forward is nn.Linear.forward

    def reader(name: str) -> property:
        kind = ExpertStack if name in stacks else PackedParameter
        return property(lambda self: self.decoded(name) if plain else kind(self, name))

    body |= {name: reader(name) for name in names}
    return type(f"Packed{base.__name__}", (PackedWeights, base), body)


def reserve_parameter(
    module: nn.Module, name: str, description: dict[str, Any], shape: tuple[int, ...], stored_transposed: bool = False
) -> None:
    """Take a parameter away, whose packed weight ``pack_parameter`` will bring; ValueError for another shape.

    ``stored_transposed``: the family's unquantized stacks lie as [E, K, N]; a module that says how its own lie is
    believed.
    """
    parameter = module._parameters[name]
    assert parameter is not None
    # Llama 4's experts lie as [E, K, N] without saying so
    transposed = len(shape) == 3 and getattr(module, "is_transposed", stored_transposed)
    wanted = tuple(parameter.transpose(-1, -2).shape) if transposed else tuple(parameter.shape)
    if tuple(shape) != wanted:
        raise ValueError(f"{name} of {type(module).__name__} has shape {list(wanted)}, the checkpoint {list(shape)}")
    state = module.__dict__
    state.setdefault("_decoders", {})[name] = description
    state.setdefault("_transposed", set()).update({name} if transposed else ())
    state.setdefault("_dtype", parameter.dtype)
    state.setdefault("_dense_class", type(module))
    del module._parameters[name]
    # some classes initialise the weights of their children, as T5's
    state[name] = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    state[name]._is_hf_initialized = True
    state["_is_hf_initialized"] = True
    # code of transformers that initialises weights may look at it meanwhile
    state[name] = torch.empty(shape, dtype=parameter.dtype, device="meta")
    state[name]._is_hf_initialized = True


def pack_parameter(module: Any, name: str, packed: Packed) -> None:
    """Give a module the packed weight of a parameter that ``reserve_parameter`` took."""
    module.__dict__.pop(name, None)
    module.__dict__.setdefault("_packed", {})[name] = packed
    names = tuple(sorted(module._packed))
    stacks = tuple(n for n in names if isinstance(module._packed[n], PackedStack | DeviceStack))
    module.__class__ = _packed_class(module._dense_class, names, stacks)


def share_parameter(module: Any, name: str, source: Any, other: str) -> None:
    """Let a parameter be the packed one of another module, as a head's is the embedding's."""
    module.__dict__.update(
        _decoders={name: source._decoders[other]}, _transposed=set(), _dtype=source._dtype, _dense_class=type(module)
    )
    module.__dict__["_is_shared"] = True
    module._parameters.pop(name, None)
    pack_parameter(module, name, source._packed[other])


def unpack_module(module: Any) -> None:
    """Turn a packed module into one whose codes and scales lie in buffers, for devices without compiled products."""
    tensors = {name: packed.tensor() for name, packed in module._packed.items()}
    transposed = module._transposed
    module.__class__ = module._dense_class
    dtype = module._dtype
    _forget(module)
    for name, tensor in tensors.items():
        shape = (*tensor.shape[:-2], *tensor.shape[:-3:-1]) if name in transposed else tensor.shape
        module.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), False))
        parts = {part: to_torch(array) for part, array in stored_arrays(tensor).items()}
        quantize_module(module, name, tensor.format.describe(), parts)


def decode_module(module: Any, dtype: torch.dtype | None = None) -> None:
    """Turn a packed module back into what it was, with ordinary parameters."""
    dense = {name: module.decoded(name).contiguous() for name in module._packed}
    module.__class__ = module._dense_class
    _forget(module)
    for name, values in dense.items():
        module.register_parameter(name, nn.Parameter(values.to(dtype or values.dtype), requires_grad=False))


def _forget(module: Any) -> None:
    names = ("_packed", "_decoders", "_transposed", "_dtype", "_dense_class", "_mixture", "_cpu_mixture", "_is_shared")
    for attribute in names:
        module.__dict__.pop(attribute, None)


@cache
def _say_moved(device: str) -> None:
    logger.warning(
        "there are no compiled products for %s: weights stay in 4 bit there and are decoded at every call, which is "
        "slow; dequantize() makes them dense",
        device,
    )
