"""``prepare``: a transformers model becomes a student, whose weights are rounded as a plan or a checkpoint says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from halfbyte.checkpoint import Reader
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.emulated_activations import round_activations
from halfbyte.formats import QuantizedTensor
from halfbyte.models import Weight
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.shards import Item
from halfbyte.runtime.decode import to_torch
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.train.masters import STARTS, Start, master_of
from halfbyte.train.parameter_map import Place, find_places
from halfbyte.train.rounding import round_searched
from halfbyte.train.start import Origin, origin_of
from halfbyte.train.straight_through import StoredType, TrainedWeight, as_array

Kept = Literal["frozen", "norms", "all"]
ATTRIBUTE = "halfbyte_student"
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass
class Student:
    """What ``prepare`` did to a model: the trained weights by name, kept ones that are trained, and their origin."""

    origin: Origin
    weights: dict[str, TrainedWeight] = field(default_factory=dict)
    kept: dict[str, StoredType] = field(default_factory=dict)

    @property
    def masters(self) -> Iterator[torch.Tensor]:
        """All that is trained."""
        parts: list[TrainedWeight | StoredType] = [*self.weights.values(), *self.kept.values()]
        yield from (part.master for part in parts if part.master.requires_grad)


def student_of(model: Any) -> Student:
    """What ``prepare`` noted of a model; HalfbyteError where it was never prepared."""
    student: Student | None = getattr(model, ATTRIBUTE, None)
    if student is None:
        raise HalfbyteError("this model is no student; prepare it first (halfbyte.prepare)")
    return student


@contextlib.contextmanager
def rounded_once(model: Any) -> Iterator[None]:
    """Within this context, for measurements, no gradients are kept and each weight is rounded only once."""
    weights = student_of(model).weights.values() if hasattr(model, ATTRIBUTE) else ()
    with torch.no_grad():
        try:
            for weight in weights:
                weight.fixed = [weight(weight.master)]
            yield
        finally:
            for weight in weights:
                weight.fixed = []


def prepare(
    model: Any,
    start: str | Path | Plan | Checkpoint,
    scales: Literal["frozen", "dynamic"] = "frozen",
    master: Start | None = None,
    activations: str | None = None,
    kept: Kept = "frozen",
    search: str = "sweep",
) -> Any:
    """Make a student of a transformers model, in place, and return it: its forward pass is that of the output.

    ``start`` is a quantized checkpoint (any dialect) or a plan; each of its weights is rounded in every forward pass,
    to its ``frozen`` scales or to ``dynamic`` ones that follow the master (of a checkpoint by this ``search``), and
    gradients pass straight through. ``master``: "cell" (default for a checkpoint; the model's own weights, pulled into
    the cells of their codes), "decoded" or "original" (default for a plan). Masters are FP32, the model keeps its
    dtype. Step 0 of a checkpoint with masters "cell" or "decoded" has the logits of
    ``halfbyte.load(start, dequantize=True)`` in that dtype, bit for bit. ``activations``: "nvfp4", "mxfp4" or "fp8":
    inputs of quantized layers are rounded too. ``kept``: what else is trained, "frozen" (nothing), "norms" or "all";
    it is rounded to its stored type. HalfbyteError where model and start do not belong together.
    """
    origin = origin_of(start)
    chosen: Start = master or ("original" if origin.plan else "cell")
    _check(model, origin, scales, chosen, kept)
    student = Student(origin)
    places = find_places(model, origin.checkpoint, {item.weight.name for item in origin.items.values()})
    if activations is not None:
        _round_inputs(model, origin, activations)
    with Reader(origin.checkpoint.inventory) as reader:
        if origin.plan is None:
            _take_kept(model, origin.checkpoint, reader, places.kept)
        tensors = dict(_tensors(model, origin, reader, places.trained, search))
        for name, place in places.trained.items():
            original = _original(model, place) if chosen != "decoded" else None
            start_of = master_of(name, tensors[name], original, chosen)
            how = (origin.export_plan, origin.searched(name, search)) if scales == "dynamic" else None
            student.weights[name] = install(model, place, tensors.pop(name), start_of, how)
    _share_scales(student)
    for parameter in model.parameters():
        if not any(parameter is trained for trained in student.masters):
            parameter.requires_grad_(False)
    for name, place in places.kept.items():
        if kept == "all" or (kept == "norms" and place.weight.role.endswith("norm")):
            student.kept[name] = _train_kept(model, place)
    setattr(model, ATTRIBUTE, student)
    return model


def _check(model: Any, origin: Origin, scales: str, master: str, kept: str) -> None:
    """Refuse words that mean nothing, models that were prepared before, and what has no original weights."""
    for value, known, what in (
        (scales, ("frozen", "dynamic"), "scales"),
        (master, STARTS, "master"),
        (kept, ("frozen", "norms", "all"), "kept"),
    ):
        if value not in known:
            raise HalfbyteError(f"{what} cannot be {value!r}; there are {', '.join(known)}")
    if getattr(model, ATTRIBUTE, None) is not None:
        raise HalfbyteError("this model is a student already; prepare a model that was just loaded")
    if scales == "dynamic" and master == "cell":
        raise HalfbyteError("dynamic scales do not keep the codes of cells; take master original or decoded")
    if master != "decoded" and origin.smoothed:
        raise HalfbyteError(
            f"the weights of {origin.name} were smoothed (AWQ), so they are not those of the model; start from "
            "decoded values (master decoded)"
        )


def _round_inputs(model: Any, origin: Origin, activations: str) -> None:
    """Round the inputs of quantized layers as engines with 4-bit arithmetic do; gradients pass straight through."""
    if origin.plan is not None:
        raise HalfbyteError("rounded activations need a quantized checkpoint to start from; carry the plan out first")
    round_activations(model, origin.checkpoint, activations, lambda how: lambda x: x + (how(x.detach()) - x.detach()))


def _take_kept(model: Any, checkpoint: Checkpoint, reader: Reader, places: dict[str, Place]) -> None:
    """Give the model the kept weights of the checkpoint, which may differ from its own."""
    for place in places.values():
        values = to_torch(checkpoint.read(reader, place.weight))
        parameter = place.tensor(model)
        with torch.no_grad():
            parameter.copy_((values.transpose(-1, -2) if place.transposed else values).to(parameter.dtype))


def _tensors(
    model: Any, origin: Origin, reader: Reader, places: dict[str, Place], search: str
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Codes and scales that training starts with: those of the checkpoint, or those that the plan gives."""
    if origin.plan is None:
        for name, place in places.items():
            yield name, origin.checkpoint.read_quantized(reader, place.weight)
        return
    groups: dict[str, list[str]] = {}
    for name, place in places.items():
        groups.setdefault(place.weight.group or name, []).append(name)
    for names in groups.values():
        masters = [_original(model, places[name]) for name in names]
        items = [origin.items[name] for name in names]
        in_blocks = [np.asarray(i.format.rotate(m)[0]) for i, m in zip(items, masters, strict=True) if i.format]
        for name, item, master in zip(names, items, in_blocks, strict=True):
            yield name, round_searched(origin.export_plan, item, master, in_blocks).tensor


def _original(model: Any, place: Place) -> Any:
    """The model's own weight as FP32 [..., N, K]."""
    values = place.tensor(model)
    return as_array(values.transpose(-1, -2) if place.transposed else values)


def install(
    model: Any, place: Place, tensor: QuantizedTensor, master: Any, search: tuple[Plan, Item] | None
) -> TrainedWeight:
    """Put a master in the place of a parameter; the module gets the rounded values whenever it asks for it."""
    module, name = place.module(model)
    parameter = place.tensor(model)
    trained = TrainedWeight(place.weight.name, tensor, parameter.dtype, place.transposed, search)
    _parametrize(module, name, torch.from_numpy(np.ascontiguousarray(master)), parameter, trained)
    trained.keep_while(module)
    return trained


def _train_kept(model: Any, place: Place) -> StoredType:
    module, name = place.module(model)
    parameter = place.tensor(model)
    stored = _STORED.get(place.weight.dtype, parameter.dtype)
    trained = StoredType(place.weight.name, stored, parameter.dtype)
    _parametrize(module, name, parameter.detach().float(), parameter, trained)
    trained.master.requires_grad_(True)
    return trained


def _parametrize(
    module: nn.Module, name: str, master: torch.Tensor, old: torch.Tensor, trained: TrainedWeight | StoredType
) -> None:
    setattr(module, name, nn.Parameter(master.to(old.device), requires_grad=old.requires_grad))
    parametrize.register_parametrization(module, name, trained, unsafe=True)
    trained.home.append(module.parametrizations[name])


def _share_scales(student: Student) -> None:
    """Weights that engines fuse share their global scale, as the plan says."""
    groups: dict[str, list[TrainedWeight]] = {}
    for name, trained in student.weights.items():
        weight: Weight = student.origin.items[name].weight
        if weight.group and len(weight.shape) < 3:
            groups.setdefault(weight.group, []).append(trained)
    for members in groups.values():
        for member in members:
            member.group = members
