"""A checkpoint in MLX's spelling, halfbyte's or that of ``mlx_lm.convert``, seen as the original one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from halfbyte.checkpoint import Inventory, Reader, TensorInfo, nbytes
from halfbyte.checkpoint.foreign import Fields
from halfbyte.dialects.mlx_names import Model, stack_of
from halfbyte.dialects.outputs import Array
from halfbyte.dialects.quantization_config import quantization_config_of
from halfbyte.dialects.spelling import check_codes
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.formats import Format, get_format
from halfbyte.models import Weight

_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    "language_model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)
_ORDER = ("gate", "up", "down")
# words per scale of the modes whose scales are bytes, from which older readers tell them
_MODES = {2: ("nvfp4", 16, 4), 4: ("mxfp4", 32, 4), 8: ("mxfp8", 32, 8)}


class StoredWeight(NamedTuple):
    """The tensors that hold an unquantized weight, and how their slices become its values, [..., N, K]."""

    names: tuple[str, ...]
    restore: Callable[[list[Array]], Array]


def settings_of(inventory: Inventory) -> dict[str, Any]:
    """MLX's settings of a checkpoint, {} where there are none."""
    for settings in (inventory.config.get("quantization"), quantization_config_of(inventory)):
        if isinstance(settings, dict) and {"bits", "group_size"} <= set(settings) and "quant_method" not in settings:
            return settings
    return {}


def parameters(fmt: Format) -> dict[str, Any]:
    """Group size, bits and mode of a format, in MLX's words."""
    if fmt.offset is not None:
        return {"group_size": fmt.block[1], "bits": fmt.bits, "mode": "affine"}
    values = {"group_size": fmt.block[1], "bits": fmt.bits, "mode": fmt.name.split("_")[0]}
    return values | ({"global_scale": True} if fmt.name == "nvfp4" else {})


class Source:
    """``tensors`` and ``formats`` as ``Dialect.dense`` gives them; unquantized weights in their original layout."""

    def __init__(self, inventory: Inventory, model: Model) -> None:
        self.inventory = inventory
        self.model = model
        self.settings = settings_of(inventory)
        self.tensors: dict[str, TensorInfo] = {}
        self.formats: dict[str, Format] = {}
        self._unquantized: dict[str, StoredWeight] = {}
        every = inventory.tensors
        # Qwen3.5 as converted by MLX: transposed convolutions come with norms that have 1 added
        self._converted = model.kind in ("qwen3_5", "qwen3_5_moe") and not any(
            name.endswith("conv1d.weight") and info.shape[-1] != 1 for name, info in every.items()
        )
        quantized = {
            name.removesuffix(".scales") for name in every if name.endswith(".scales") and _is_packed(name, every)
        }
        companions = {f"{m}.{part}" for m in quantized for part in ("weight", "scales", "biases", "global_scale")}
        stacks: dict[str, dict[str, str]] = {}
        for name in every:
            module, _, last = name.rpartition(".")
            original = model.original(name)
            stack = stack_of(original.rpartition(".")[0])
            if stack and last in ("weight", "bias") and len(every[name].shape) == (3 if last == "weight" else 2):
                stacks.setdefault(stack[0] + ("" if last == "weight" else "_bias"), {})[stack[1]] = name
            elif name in companions:
                if last == "weight":
                    self._add_matrix(original, name, module)
            else:
                self._add_plain(original, every[name])
        for original, names in stacks.items():
            self._add_stack(original, [names[part] for part in _ORDER if part in names], quantized)

    def read(self, reader: Reader, weight: Weight, first: int, stop: int) -> Array | None:
        """Leading indices of an unquantized weight in its original layout, as [..., N, K]; None where it lies so."""
        stored = self._unquantized.get(weight.sources[0])
        if stored is None:
            return None
        bounds = (first, stop) if weight.shape else ()
        return np.ascontiguousarray(stored.restore([reader.read(name, *bounds) for name in stored.names]))

    def names(self, weight: Weight) -> list[str]:
        """The file's tensors that hold an unquantized weight."""
        stored = self._unquantized.get(weight.sources[0])
        return list(stored.names) if stored else list(weight.sources)

    def _add_matrix(self, original: str, name: str, module: str) -> None:
        info = self.inventory.tensors[name]
        check_codes(info, self.inventory.source)
        self.formats[original] = fmt = self._format(module)
        shape = (*info.shape[:-1], _columns(info, fmt))
        self.tensors[original] = replace(info, name=original, dtype="BF16", shape=shape)

    def _add_stack(self, original: str, names: list[str], quantized: set[str]) -> None:
        """One projection, or gate and up, which are fused in the original."""
        infos = [self.inventory.tensors[name] for name in names]
        wanted = 1 if "down_proj" in original else 2
        if len(infos) != wanted or len({i.shape[:1] + i.shape[2:] for i in infos}) > 1:
            raise CheckpointError(f"{names[0]} and the other projections of its experts do not fit each other")
        info = infos[0]
        interleaved = self.model.kind == "gpt_oss"
        if original.endswith("_bias"):
            shape: tuple[int, ...] = (info.shape[0], sum(i.shape[1] for i in infos))
            fuse = _alternate if interleaved else _join
            self._add_unquantized(original, info, shape, StoredWeight(tuple(names), fuse))
            return
        shape = (info.shape[0], sum(i.shape[1] for i in infos), info.shape[2])
        modules = [name.removesuffix(".weight") for name in names]
        if not quantized.intersection(modules):
            stored = StoredWeight(tuple(names), _alternate if interleaved else _join)
            # the original stacks of gpt-oss lie as [E, K, N]
            self._add_unquantized(original, info, (shape[0], shape[2], shape[1]) if interleaved else shape, stored)
            return
        if not quantized.issuperset(modules):
            raise CheckpointError(f"{names[0]} and {names[-1]} are not both quantized; they cannot be read as one")
        formats = {self._format(module) for module in modules}
        if len(formats) > 1:
            names_of_formats = " and ".join(sorted(f.name for f in formats))
            raise CheckpointError(
                f"{modules[0]} and {modules[1]} have the formats {names_of_formats}; they cannot be read as one"
            )
        self.formats[original] = fmt = formats.pop()
        shape = (*shape[:2], _columns(info, fmt))
        self.tensors[original] = replace(info, name=original, dtype="BF16", shape=shape)

    def _add_plain(self, original: str, info: TensorInfo) -> None:
        shape, dtype, restore = info.shape, info.dtype, _same
        outside = original.startswith("mtp.")
        if self._converted and not outside and original.endswith("conv1d.weight"):
            shape, restore = (shape[0], shape[2], shape[1]), _transposed
        elif self._converted and not outside and original.endswith(_NORMS) and len(shape) == 1:
            dtype, restore = "F32", _minus_one
        elif len(shape) == 5 and info.name.startswith("vision_tower.") and shape[-1] < shape[1]:
            shape, restore = (shape[0], shape[4], *shape[1:4]), _channels_first
        if restore is _same and original == info.name:
            self.tensors[original] = info
        else:
            self._add_unquantized(original, info, shape, StoredWeight((info.name,), restore), dtype)

    def _add_unquantized(
        self, original: str, info: TensorInfo, shape: tuple[int, ...], stored: StoredWeight, dtype: str = ""
    ) -> None:
        kind = dtype or info.dtype
        self._unquantized[original] = stored
        self.tensors[original] = replace(info, name=original, dtype=kind, shape=shape, nbytes=nbytes(kind, shape))

    def _format(self, module: str) -> Format:
        """From the settings of a module where they fit its arrays, else from the arrays, as mlx-lm does."""
        tensors = self.inventory.tensors
        weight, scales = tensors[f"{module}.weight"], tensors[f"{module}.scales"]
        stated = self.settings.get(self.model.path(self.model.original(module)), self.settings.get(module))
        if not weight.shape or not scales.shape or 0 in (*weight.shape, *scales.shape):
            raise CheckpointError(f"{module}.weight or {module}.scales in {self.inventory.source} holds no values")
        settings = Fields(stated if isinstance(stated, dict) else self.settings, "config.json", "quantization")
        words, groups = weight.shape[-1], scales.shape[-1]
        if scales.dtype == "U8":
            mode, group, bits = _MODES.get(words // groups, ("", 0, 0))
            scaled = f"{module}.global_scale" in tensors
            name = mode if mode != "nvfp4" or scaled else "nvfp4_unscaled"
        else:
            group, bits = settings.count("group_size", 64) or 0, settings.count("bits", 4) or 0
            name = f"affine{bits}_g{group}"
        if not group or words * 32 != groups * group * bits:
            raise CheckpointError(
                f"{module} in {self.inventory.source} holds {words} words and {groups} scales a row, which does not "
                f"fit {bits} bits in groups of {group}; its entry in quantization is wrong or missing"
            )
        try:
            return get_format(name)
        except FormatError as error:
            raise CheckpointError(f"{module} in {self.inventory.source} has the format {name}, unknown here") from error


def _is_packed(scales: str, tensors: Mapping[str, TensorInfo]) -> bool:
    weight = tensors.get(f"{scales.removesuffix('.scales')}.weight")
    return weight is not None and weight.dtype == "U32"


def _columns(info: TensorInfo, fmt: Format) -> int:
    bits = int(parameters(fmt)["bits"])
    return info.shape[-1] * 32 // bits


def _same(parts: list[Array]) -> Array:
    return parts[0]


def _join(parts: list[Array]) -> Array:
    return np.concatenate(parts, axis=1)


def _alternate(parts: list[Array]) -> Array:
    return np.stack(parts, axis=2).reshape(parts[0].shape[0], -1, *parts[0].shape[2:])


def _transposed(parts: list[Array]) -> Array:
    return np.swapaxes(parts[0], 1, 2)


def _channels_first(parts: list[Array]) -> Array:
    return np.moveaxis(parts[0], -1, 1)


def _minus_one(parts: list[Array]) -> Array:
    # exact in FP32, not always in BF16
    return parts[0].astype(np.float32) - np.float32(1)
