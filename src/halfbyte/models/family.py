"""Architecture families: which weight of a checkpoint plays which role, as data in `families/*.yaml`."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Protocol

from halfbyte.checkpoint.config import text_parts
from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.models import family_schema as schema
from halfbyte.models.classify import Classifier, Kind
from halfbyte.models.gather import Gather, TensorLike
from halfbyte.models.name_templates import normalise, split_numbers
from halfbyte.models.weight import Piece, Weight

_PLAIN_DTYPES = frozenset({"BF16", "F16", "F32", "F64"})
_EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")


class InventoryLike(Protocol):
    """What `Family.weights` needs of an inventory."""

    @property
    def tensors(self) -> Mapping[str, TensorLike]:
        """Header entries by name, in source order."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Return the content of config.json."""


class Family:
    """One architecture family: classifies tensor names and gathers weights.

    `transposed` says that its unquantized stacks of experts lie as `[E, K, N]`.
    `is_generic` is True for the fallback; `note` then says in a sentence what that means, else it is "".
    """

    def __init__(self, data: schema.FamilyFile, note: str = "") -> None:
        self.name = data.name
        self.model_types = data.model_types
        self.architectures = data.architectures
        self.is_generic = data.name == "generic"
        self.transposed = data.transposed
        self.note = note
        self._data = data
        self._classifier = Classifier(data)
        self._kinds: dict[str, Kind] = {}

    def __repr__(self) -> str:
        return f"Family({self.name!r})"

    @property
    def data(self) -> schema.FamilyFile:
        """What the family's file says, completed by the files that it extends."""
        return self._data

    def role(self, name: str) -> str:
        """The role of a tensor's name alone; its shape, its dtype and the config may still change it."""
        return self._kind(normalise(name)).role

    def weights(self, inventory: InventoryLike) -> list[Weight]:
        """All weights of the checkpoint in source order; every source tensor is in exactly one of them.

        Per-expert tensors become one fused weight; `CheckpointError` if some of them are missing or differ.
        """
        enabled = gc.isenabled()
        gc.disable()  # 200,000 small objects without cycles: collections would only cost time
        try:
            return self._weights(inventory)
        finally:
            if enabled:
                gc.enable()

    def _weights(self, inventory: InventoryLike) -> list[Weight]:
        config = inventory.config
        mtp_from = _number(config, self._data.mtp_from_layer) if self._data.mtp_from_layer else None
        result: list[Weight | None] = []
        drafts: list[tuple[int, TensorLike, str, int | None, str | None]] = []
        members: Counter[str | None] = Counter()
        gathers: dict[tuple[str, int | None], tuple[int, Gather]] = {}
        kinds = self._kinds
        for name, tensor in inventory.tensors.items():
            parts = split_numbers(name)
            key = "#".join(parts[::2])
            kind = kinds.get(key) or self._kind(key)
            layer = None if kind.layer is None else int(parts[2 * kind.layer + 1])
            in_mtp = mtp_from is not None and layer is not None and layer >= mtp_from
            plain = tensor.dtype in _PLAIN_DTYPES
            role = kind.role_for(plain, len(tensor.shape), in_mtp)
            if not plain or len(tensor.shape) < 2:
                result.append(Weight(name, role, layer, tuple(tensor.shape), tensor.dtype, (Piece(name),)))
            elif kind.fused is not None and kind.expert is not None:
                gathered = gathers.get((kind.fused, layer))
                if gathered is None:
                    gathered = gathers[kind.fused, layer] = (len(result), _gather(kind, role, layer))
                    result.append(None)
                gathered[1].sources[int(parts[2 * kind.expert + 1]), kind.part] = tensor
            elif kind.is_stack:
                result.append(self._stack(tensor, role, layer, config))
            else:
                # a group is named as the module that engines make of it: model.layers.3.self_attn.qkv_proj
                group = f"{name.rsplit('.', 2)[0]}.{kind.group}" if kind.group else None
                members[group] += 1
                drafts.append((len(result), tensor, role, layer, group))
                result.append(None)
        for index, tensor, role, layer, group in drafts:
            shape, pieces = tuple(tensor.shape), (Piece(tensor.name),)
            shared = group if members[group] > 1 else None
            result[index] = Weight(tensor.name, role, layer, shape, tensor.dtype, pieces, shared)
        expected = _expert_count(config)
        for index, gather in gathers.values():
            if gather.name in inventory.tensors:
                raise CheckpointError(f"{gather.name} is there twice: fused, and as one tensor per expert")
            result[index] = gather.weight(expected)
        return [weight for weight in result if weight is not None]

    def _kind(self, normalised: str) -> Kind:
        kind = self._kinds.get(normalised)
        if kind is None:
            kind = self._kinds[normalised] = self._classifier.kind(normalised)
        return kind

    def _stack(self, tensor: TensorLike, role: str, layer: int | None, config: Mapping[str, Any]) -> Weight:
        """A weight whose source already holds several projections or experts in one tensor."""
        shape = tuple(tensor.shape)
        transposed = len(shape) == 3 and self._is_transposed(role, shape, config)
        parts: tuple[tuple[str, int, int], ...] = ()
        if role.endswith(".gate_up"):
            half = shape[-1 if transposed else -2] // 2
            parts = (("gate", 0, half), ("up", half, 2 * half))
        interleaved = self._data.interleaved and bool(parts)
        return Weight(
            name=tensor.name,
            role=role,
            layer=layer,
            shape=shape,
            dtype=tensor.dtype,
            pieces=(Piece(tensor.name),),
            row_parts=parts,
            interleaved=interleaved,
            transposed=transposed,
        )

    def _is_transposed(self, role: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
        """Whether experts lie as `[E, K, N]`: by the hidden size where it decides, else as the family says."""
        hidden = _number(config, "moe_latent_size") or _number(config, "hidden_size")
        rows, columns = shape[-2:]
        if hidden is None or rows == columns or hidden not in (rows, columns):
            return self._data.transposed
        return (rows == hidden) != role.endswith("down")


def family_for(config: Mapping[str, Any], names: Iterable[str] = ()) -> Family:
    """The family of a checkpoint by its config's `model_type` (also the text model's) or `architectures`.

    An unknown architecture gets a generic family whose `note` says so and how many of `names` it recognises.
    """
    registry = _registry()
    parts = text_parts(config)
    model_types = [part.get("model_type") for part in parts]
    architectures = [name for part in parts for name in part.get("architectures") or ()]
    for key in (*model_types, *architectures):
        if isinstance(key, str) and key in registry:
            return _family(registry[key])
    return _generic(next((key for key in (*model_types, *architectures) if key), None), names)


def families() -> list[Family]:
    """All families but the generic one, sorted by name."""
    return [_family(name) for name in schema.names() if name != "generic"]


def register_family(text: str) -> Family:
    """Add a family, given as YAML (docs/architectures.md has the keys).

    HalfbyteError where it is not valid, or its name, a `model_type` or an architecture belongs to another one.
    """
    data = schema.parse(text, "of a plugin")
    for key in (*data.model_types, *data.architectures):
        if key in _registry():
            raise HalfbyteError(f"{key} belongs to the family {_registry()[key]} already; leave it out of {data.name}")
    schema.add(text)
    _registry.cache_clear()
    return _family(data.name)


@cache
def _family(name: str) -> Family:
    return Family(schema.read(name))


@cache
def _registry() -> dict[str, str]:
    """Family name by every `model_type` and architecture."""
    registry: dict[str, str] = {}
    for name in schema.names():
        data = schema.read(name)
        for key in (*data.model_types, *data.architectures):
            if registry.setdefault(key, name) != name:
                raise ValueError(f"{key} is claimed by both families {registry[key]} and {name}")
    return registry


def _generic(what: str | None, names: Iterable[str]) -> Family:
    names = list(names)
    family = Family(schema.read("generic"))
    subject = f"the architecture {what!r} is unknown" if what else "the config names no architecture"
    note = f"{subject}: weights are recognised by their usual names, and all others are kept as they are"
    if names:
        known = sum(1 for name in names if not family.role(name).endswith("other"))
        note += f"; {known} of {len(names)} tensors are recognised"
    family.note = note + "."
    return family


def _gather(kind: Kind, role: str, layer: int | None) -> Gather:
    def spell(pattern: str) -> str:
        return pattern.replace("{layer}", str(layer))

    spellings = tuple(spell(pattern) for pattern in kind.spellings)
    return Gather(spell(kind.fused or ""), role, layer, kind.parts, spellings)


def _number(config: Mapping[str, Any], key: str) -> int | None:
    for part in reversed(text_parts(config)):
        if isinstance(part.get(key), int):
            return int(part[key])
    return None


def _expert_count(config: Mapping[str, Any]) -> int | None:
    for key in _EXPERT_COUNTS:
        count = _number(config, key)
        if count:
            return count
    return None
