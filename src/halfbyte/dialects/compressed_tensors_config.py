"""``quantization_config`` of compressed-tensors: schemes per format, targets, ignore list; and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from halfbyte.checkpoint.foreign import Fields
from halfbyte.dialects.module_patterns import compact
from halfbyte.errors import CheckpointError
from halfbyte.formats import Format, get_format, rotated
from halfbyte.models.regex import Patterns

# the library version whose configuration this is; its loaders read the field but do not compare it
VERSION = "0.20.0"


def _float4(group: int, strategy: str, scale_dtype: str) -> dict[str, Any]:
    return {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group,
        "dynamic": False,
        "scale_dtype": scale_dtype,
    }


def _int4(group: int, symmetric: bool) -> dict[str, Any]:
    return {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }


def _float8(strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False, **more}


_TENSOR = _float8("tensor")
_TOKEN = {**_float8("token"), "dynamic": True}
_BLOCK = {**_float8("group", group_size=128), "dynamic": True}
_NVFP4 = _float4(16, "tensor_group", "torch.float8_e4m3fn")
_MXFP4 = _float4(32, "group", "torch.uint8")
_MXFP8 = _float8("group", group_size=32, scale_dtype="torch.uint8")
CACHE = _TENSOR
"""The scheme of an FP8 KV cache."""


class Scheme(NamedTuple):
    """A format's compressor, the arguments of its weights, and those of activations by kind, the usual kind first."""

    compressor: str
    weights: dict[str, Any]
    activations: dict[str, dict[str, Any] | None]


_FP8_INPUTS = {"dynamic": _TOKEN, "static": _TENSOR, "none": None}
SCHEMES = {
    # block scales of activations are found at run time, under a calibrated global scale
    "nvfp4": Scheme("nvfp4-pack-quantized", _NVFP4, {"none": None, "static": {**_NVFP4, "dynamic": "local"}}),
    "mixfp4": Scheme("mixfp4-pack-quantized", _NVFP4, {"none": None}),
    "mxfp4": Scheme("mxfp4-pack-quantized", _MXFP4, {"none": None, "dynamic": {**_MXFP4, "dynamic": True}}),
    **{f"int4_g{g}": Scheme("pack-quantized", _int4(g, True), {"none": None}) for g in (16, 32, 64, 128)},
    **{f"int4_asym_g{g}": Scheme("pack-quantized", _int4(g, False), {"none": None}) for g in (16, 32, 64, 128)},
    "fp8_channel": Scheme("float-quantized", _float8("channel"), _FP8_INPUTS),
    "fp8_tensor": Scheme("float-quantized", _float8("tensor"), _FP8_INPUTS),
    "fp8_block128": Scheme(
        "float-quantized", _float8("block", block_structure=[128, 128]), {"dynamic": _BLOCK, "none": None}
    ),
    "mxfp8": Scheme("mxfp8-quantized", _MXFP8, {"none": None, "dynamic": {**_MXFP8, "dynamic": True}}),
}
"""The scheme of each format, without its rotation."""


def transform_name(size: int) -> str:
    """What the Hadamard matrix of a size is called in ``transform_config``."""
    return f"hadamard{size}"


def transform_config(rotated: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    """``transform_config`` for targets by the size of the blocks whose inputs are rotated."""
    if not rotated:
        return {}
    groups = {}
    for size, targets in rotated.items():
        places = (("input", False), ("weight_input", True))
        groups[transform_name(size)] = {
            "type": "hadamard",
            "apply": [
                {"targets": list(targets), "location": place, "inverse": inverse, "ignore": []}
                for place, inverse in places
            ],
            "randomize": False,
            "requires_grad": False,
            "head_dim": size,
            "precision": "torch.float32",
        }
    return {"config_groups": groups}


def activation_arguments(name: str, kind: Any, calibrated: bool) -> dict[str, Any] | None:
    """``input_activations`` beside weights in a format.

    ``kind``: none, dynamic or static, arguments as a source states them ({} for none), or None for the usual ones;
    ``calibrated``: the modules have calibrated scales.
    """
    if isinstance(kind, dict):
        return kind or None
    kinds = SCHEMES[get_format(name).plain.name].activations
    return kinds[kind or ("static" if calibrated and "static" in kinds else next(iter(kinds)))]


def quantization_config(
    groups: Sequence[tuple[str, dict[str, Any] | None, Sequence[str]]],
    ignored: Sequence[str],
    whole: Sequence[str],
    mixed: Sequence[str],
) -> dict[str, Any]:
    """Config groups: (format, ``input_activations``, modules).

    ``ignored`` are the Linear modules that stay as they are.
    ``whole``: the spaces (``mtp``, ``visual``) that stay as they are with everything in them; ``mixed``: those
    that hold quantized modules.
    """
    everything = {name for _, _, members in groups for name in members} | set(ignored)
    by_name: dict[str, dict[str, Any]] = {}
    rotated: dict[int, list[str]] = {}
    for i, (name, inputs, members) in enumerate(groups):
        fmt = get_format(name)
        scheme = SCHEMES[fmt.plain.name]
        by_name[f"group_{i}"] = {
            "targets": compact(members, everything - set(members), mixed),
            "weights": scheme.weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": scheme.compressor,
        }
        if fmt.rotation:
            rotated.setdefault(fmt.block[1], []).extend(by_name[f"group_{i}"]["targets"])
    compressors = {group["format"] for group in by_name.values()}
    # engines ignore before they look for a target, so the targets of the main model may match these too
    apart = [r"re:^(model\.)?mtp.*" if space == "mtp" else f"re:.*{re.escape(space)}.*" for space in whole]
    return {
        "quant_method": "compressed-tensors",
        "format": compressors.pop() if len(compressors) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": by_name,
        "ignore": apart + compact(ignored, everything - set(ignored), mixed),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": transform_config(rotated),
        "version": VERSION,
    }


class Schemes:
    """Which format each module of a compressed-tensors checkpoint has."""

    def __init__(self, config: Fields, source: str) -> None:
        self.source = source
        if config.fields("sparsity_config").text("format", "dense") != "dense":
            raise CheckpointError(f"the weights of {source} are sparse (sparsity_config), which cannot be read")
        self.rotated = _rotated_inputs(config.fields("transform_config"), source)
        self.groups: list[tuple[Patterns, Format, dict[str, Any]]] = []
        for key, group in config.fields("config_groups").members():
            weights = group.fields("weights")
            name = _format_name(weights.values, group.text("format") or config.text("format"))
            if name is None:
                raise CheckpointError(
                    f"{source} holds the compressed-tensors scheme {str(dict(weights.values))[:300]} ({key}), which is "
                    "not supported"
                )
            inputs = dict(group.fields("input_activations").values)
            self.groups.append((_targets(group, source), get_format(name), inputs))

    def format_of(self, module: str) -> Format:
        """The format of a module's weight."""
        fmt = self._group(module)[0]
        sizes = {size for targets, size in self.rotated if targets.match(module)}
        if sizes and sizes != {fmt.block[1]}:
            raise CheckpointError(
                f"{module} of {self.source} is rotated in blocks of {sorted(sizes)} columns, which are not those of "
                f"{fmt.name}; this cannot be read"
            )
        return rotated(fmt, "hadamard") if sizes else fmt

    def inputs_of(self, module: str) -> dict[str, Any]:
        """``input_activations`` of a module, {} where they are not quantized."""
        return self._group(module)[1]

    def _group(self, module: str) -> tuple[Format, dict[str, Any]]:
        """By target pattern or name, then by the class ``Linear``; as the library does it."""
        for targets, fmt, inputs in self.groups:
            if targets.match(module):
                return fmt, inputs
        for targets, fmt, inputs in self.groups:
            if "Linear" in targets.exact:
                return fmt, inputs
        raise CheckpointError(f"no config group of {self.source} has {module} as a target; its scheme is unknown")


def _rotated_inputs(config: Fields, source: str) -> list[tuple[Patterns, int]]:
    """Targets and block sizes of the Hadamard rotations of inputs; CheckpointError for all other transforms."""
    rotations = []
    for _, scheme in config.fields("config_groups").members():
        places = {place.text("location"): place for place in scheme.objects("apply")}
        targets = [place.texts("targets") for place in places.values()]
        size = scheme.count("head_dim")
        if (
            scheme.text("type") != "hadamard"
            or scheme.flag("randomize")
            or size is None
            or set(places) != {"input", "weight_input"}
            or targets[0] != targets[1]
            or any(place.texts("ignore") for place in places.values())
        ):
            raise CheckpointError(
                f"the weights of {source} are rotated (transform_config) otherwise than by Hadamard matrices of their "
                "inputs' blocks, which cannot be read"
            )
        rotations.append((_targets(places["input"], source), size))
    return rotations


def _targets(group: Fields, source: str) -> Patterns:
    return Patterns(group.texts("targets"), f"the targets of a group in config.json of {source}")


def _format_name(weights: Mapping[str, Any], compressor: str) -> str | None:
    """The format whose arguments agree with these, or None."""
    keys = ("num_bits", "type", "strategy", "group_size", "symmetric")
    stated = {"symmetric": True, **{k: v for k, v in weights.items() if k in keys and v is not None}}
    for name, scheme in SCHEMES.items():
        wanted = {k: v for k, v in scheme.weights.items() if k in keys}
        # NVFP4 and MixFP4 have the same arguments: only the compressor tells them apart
        if stated == wanted and ("mixfp4" in compressor) == ("mixfp4" in scheme.compressor):
            return name
    return None
