"""transformers' quantizer of packed models: which weights of a checkpoint are packed, and packing them.

transformers loads the tensors that are kept. Quantized weights never pass through it: they are read by halfbyte, from
any dialect, after the rest is there, and packed matrix by matrix.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from halfbyte.checkpoint import Reader
from halfbyte.dialects import UnequalScalesError
from halfbyte.dialects.halfbyte import suffix
from halfbyte.errors import FormatError, HalfbyteError
from halfbyte.formats import QuantizedTensor
from halfbyte.kernels.linear import PackedWeight
from halfbyte.models import Weight
from halfbyte.runtime.decode import to_torch
from halfbyte.runtime.kept_modules import speed_up_kept, undo_kept
from halfbyte.runtime.packed import NoKernelError, has_kernel, pack_linear
from halfbyte.runtime.packed_experts import IMPLEMENTATION, pack_mixture
from halfbyte.runtime.packed_modules import (
    PackedWeights,
    decode_module,
    pack_parameter,
    reserve_parameter,
    share_parameter,
)
from halfbyte.runtime.products import Mode, PackedMatrix, PackedStack, SharedProduct
from halfbyte.runtime.remote.halfbyte_modules import PARTS, TiedWeight
from halfbyte.runtime.remote.halfbyte_quantizer import METHOD, HalfbyteQuantizer
from halfbyte.source.checkpoint import Checkpoint

logger = logging.getLogger("halfbyte")


class Place(NamedTuple):
    """A weight of the checkpoint, and the parameter of a module that it becomes."""

    weight: Weight
    module: Any
    name: str


class Packing:
    """What is packed of a checkpoint; ``tensors``: the dense ones that transformers is given, less what is packed."""

    def __init__(self, checkpoint: Checkpoint, mode: Mode, tensors: dict[str, Any] | None = None) -> None:
        self.checkpoint, self.mode, self.tensors = checkpoint, mode, tensors
        self.weights = {w.name: w for w in checkpoint.weights if w.name in checkpoint.formats}
        self.places: list[Place] = []

    def can_pack(self, name: str) -> bool:
        """Whether there is a product for a weight's format."""
        return name in self.weights and has_kernel(self.checkpoint.formats[name])

    def stated(self) -> dict[str, Any]:
        """The formats, and which weights have which, as the dialect halfbyte states them."""
        names: dict[str, list[str]] = defaultdict(list)
        for name in self.weights:
            names[self.checkpoint.formats[name].name].append(f"re:{re.escape(name)}$")
        formats = {fmt.name: fmt.describe() for fmt in self.checkpoint.formats.values()}
        return {"formats": formats, "weights": dict(names)}


_NOTHING: Any = object()
_PACKING: ContextVar[Any] = ContextVar("halfbyte_packing", default=_NOTHING)


@contextlib.contextmanager
def packing_of(packing: Packing | None) -> Iterator[None]:
    """Within this context ``from_pretrained`` packs weights of this checkpoint, of any dialect; None: it packs none."""
    token = _PACKING.set(packing)
    try:
        yield
    finally:
        _PACKING.reset(token)


class PackedQuantizer(HalfbyteQuantizer):
    """Packs weights that have a compiled product; others lie as they did, and are decoded at every call."""

    packing: Packing | None = None

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        given = _PACKING.get()
        self.packing = packing_of_files(checkpoint_files) if given is _NOTHING else given
        return super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)

    def _stored(self, checkpoint_files: list[str] | None) -> dict[str, torch.Tensor]:
        if self.packing is None or self.packing.tensors is None:
            return super()._stored(checkpoint_files)
        stored = {}
        for name, weight in self.packing.weights.items():
            if self.packing.can_pack(name):
                parts = self.packing.checkpoint.formats[name].parts(weight.untransposed().shape)
                for part, (kind, shape) in parts.items():
                    empty = to_torch(np.empty(0, kind))
                    stored[f"{name}_{suffix(part)}"] = torch.empty(shape, dtype=empty.dtype, device="meta")
        return stored

    def _install(self, module: Any, name: str, weight: str, parts: dict[str, torch.Tensor]) -> None:
        packing = self.packing
        if packing is None or not packing.can_pack(weight):
            name_of = packing.checkpoint.formats[weight].name if packing and weight in packing.weights else weight
            _say_once("%s has no compiled product here: it is decoded at every call, which is slow", name_of)
            super()._install(module, name, weight, parts)
            return
        codes, fmt = parts["codes"], packing.checkpoint.formats[weight]
        shape = (*codes.shape[:-1], codes.shape[-1] * 8 // fmt.bits)
        reserve_parameter(module, name, fmt.describe(), shape, packing.checkpoint.family.transposed)
        packing.places.append(Place(packing.weights[weight], module, name))
        if packing.tensors is not None:
            for source in packing.weights[weight].sources:
                packing.tensors.pop(source, None)

    def _refuse_converted(self, weight: str, model: Any) -> None:
        if self.packing is None or self.packing.tensors is None:
            super()._refuse_converted(weight, model)
        _say_once(
            "%s joins weights of the checkpoint: they are decoded while loading, in full size", type(model).__name__
        )

    def _elsewhere(self, places: dict[str, tuple[str, str | None]]) -> set[str]:
        packed = {place.weight.name for place in self.packing.places} if self.packing else set()
        names = {name for weight in packed for name in (weight, places[weight][0])}
        return {f"{name}_{part}" for name in names for part in PARTS}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        if self.packing is not None and self.packing.places:
            pack(model, self.packing)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        undo_kept(model)
        for module in list(model.modules()):
            if isinstance(module, PackedWeights):
                decode_module(module, dtype)
        return super()._dequantize(model, dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Raise HalfbyteError: the checkpoint itself is the thing to copy."""
        where = f" {self.packing.checkpoint.inventory.source}" if self.packing else ""
        raise HalfbyteError(
            f"a model with packed weights is saved by copying its checkpoint{where}; `halfbyte convert` writes it for "
            "other engines, and dequantize() makes a dense model, which can be saved"
        )


def packing_of_files(files: list[str] | None) -> Packing | None:
    """What is packed of the checkpoint that these files are of; None for no files, ValueError for unreadable ones."""
    if not files or not Path(files[0]).is_file():
        return None
    try:
        checkpoint = Checkpoint.open(Path(files[0]).parent)
    except HalfbyteError as error:
        raise ValueError(str(error)) from error
    return Packing(checkpoint, Mode())


def pack(model: Any, packing: Packing) -> None:
    """Read the weights that have a place, and pack them; kept layers get compiled products too."""
    with Reader(packing.checkpoint.inventory) as reader:
        for places in _together(model, packing.places):
            try:
                tensors = [packing.checkpoint.read_quantized(reader, place.weight) for place in places]
                (_pack_stacks if len(tensors[0].shape) == 3 else _pack_matrices)(places, tensors, packing.mode)
            except (UnequalScalesError, NoKernelError, FormatError) as error:
                logger.warning("%s is decoded while loading, in full size: %s", places[0].weight.name, error)
                for place in places:
                    _decode(packing, reader, place)
    _share_ties(model)
    speed_up_kept(model)
    if any("_mixture" in module.__dict__ for module in model.modules()):
        model.set_experts_implementation(IMPLEMENTATION)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    packing.places.clear()


def _together(model: Any, places: list[Place]) -> Iterator[list[Place]]:
    """Weights that take the same activations, in the order of their modules; the two stacks of a mixture."""
    order = {id(module): number for number, module in enumerate(model.modules())}
    groups: dict[Any, list[Place]] = defaultdict(list)
    for place in sorted(places, key=lambda place: order[id(place.module)]):
        stacked = len(place.weight.shape) == 3
        shared = place.weight.group if isinstance(place.module, nn.Linear) else None
        key = id(place.module) if stacked else (shared or (id(place.module), place.name))
        groups[key].append(place)
    yield from groups.values()


def _pack_matrices(places: list[Place], tensors: list[QuantizedTensor], mode: Mode) -> None:
    biases = [_bias_of(place.module) for place in places]
    bias = None
    if any(b is not None for b in biases):
        zeros = [np.zeros(tensor.shape[0], np.float32) for tensor in tensors]
        bias = np.concatenate([zero if b is None else b for b, zero in zip(biases, zeros, strict=True)])
    shared = SharedProduct(pack_linear(tensors, bias), [tensor.shape[0] for tensor in tensors], mode)
    for part, place in enumerate(places):
        pack_parameter(place.module, place.name, PackedMatrix(shared, part))


def _bias_of(module: Any) -> Any:
    """The bias that is part of a layer's product; classes with a forward of their own add theirs."""
    bias = module._parameters.get("bias") if module._dense_class.forward is nn.Linear.forward else None
    return None if bias is None else bias.detach().float().numpy()


def _pack_stacks(places: list[Place], tensors: list[QuantizedTensor], mode: Mode) -> None:
    by_name = {place.name: tensor for place, tensor in zip(places, tensors, strict=True)}
    module = places[0].module
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    try:
        if by_name.keys() != {first, "down_proj"}:
            raise NoKernelError(f"{type(module).__name__} has other weights than {first} and down_proj")
        pack_mixture(module, by_name[first], by_name["down_proj"], mode)
    except (NoKernelError, FormatError) as error:
        _say_once("%s: its experts are decoded one by one at every call, which is slow", str(error))
        for name, tensor in by_name.items():
            pack_parameter(module, name, PackedStack(PackedWeight(tensor)))


def _decode(packing: Packing, reader: Reader, place: Place) -> None:
    """Make an ordinary parameter of a weight that cannot be packed."""
    module, weight = place.module, place.weight
    values = torch.empty(weight.untransposed().shape, dtype=module._dtype)
    for first in range(len(values)):
        values[first] = torch.from_numpy(packing.checkpoint.read(reader, weight, first, first + 1)[0])
    values = values.transpose(-1, -2).contiguous() if place.name in module._transposed else values
    module.__dict__.pop(place.name, None)
    module.register_parameter(place.name, nn.Parameter(values, requires_grad=False))


def _share_ties(model: Any) -> None:
    """Heads whose weight is a packed embedding's, or the other way round, use the packed one."""
    for module in list(model.modules()):
        if isinstance(module, TiedWeight):
            (name, other), source = module._tied_names, module._tied_source[0]
            if isinstance(source, PackedWeights):
                module.__class__ = module._dense_class
                for attribute in ("_tied_source", "_tied_names", "_dense_class"):
                    delattr(module, attribute)
                share_parameter(module, name, source, other)


@cache
def _say_once(text: str, *values: str) -> None:
    logger.warning(text, *values)


AUTO_QUANTIZER_MAPPING[METHOD] = PackedQuantizer
