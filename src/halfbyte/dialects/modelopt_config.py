"""ModelOpt's configuration, which stands in config.json and in hf_quant_config.json; and back to formats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.checkpoint import Inventory
from halfbyte.checkpoint.files import parse_object
from halfbyte.checkpoint.foreign import Fields, check_plain
from halfbyte.dialects.quantization_config import quantization_fields
from halfbyte.errors import CheckpointError
from halfbyte.formats import Format, get_format

FILE = "hf_quant_config.json"

# readers recognise the layout by this name; the version is the one whose layout it is
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}

CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
"""The scheme of an FP8 KV cache."""

FORMATS = {
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "W4A8_NVFP4_FP8": "nvfp4",
    "FP8": "fp8_tensor",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_channel",
    "FP8_PB_WO": "fp8_block128",
    "MXFP8": "mxfp8",
    "MXFP4": "mxfp4",
    "W4A8_MXFP4_FP8": "mxfp4",
}
"""Algorithm (upper case) -> format of the weights."""

_GROUPS = {"nvfp4": 16, "mxfp8": 32}


def quantization_config(layers: Mapping[tuple[str, bool], Sequence[str]], excluded: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    ``layers``: modules by format and by whether their activations have calibrated scales.
    """
    groups = {
        f"group_{i}": {**_scheme(name, static), "targets": sorted(modules) if len(layers) > 1 else ["Linear"]}
        for i, ((name, static), modules) in enumerate(layers.items())
    }
    config: dict[str, Any] = {"config_groups": groups}
    if len(layers) > 1:
        config["quantized_layers"] = {
            module: _layer(name, static) for (name, static), modules in layers.items() for module in modules
        }
        config["quant_algo"] = "MIXED_PRECISION"
    else:
        config |= _layer(*next(iter(layers)))
    return {**config, "ignore": list(excluded), "producer": _PRODUCER, "quant_method": "modelopt"}


def config_file(config: Mapping[str, Any]) -> bytes:
    """Return the content of hf_quant_config.json for a ``quantization_config``."""
    quantization = {key: config[key] for key in ("quant_algo", "group_size", "quantized_layers") if key in config}
    cache = config.get("kv_cache_scheme")
    quantization["kv_cache_quant_algo"] = "FP8" if isinstance(cache, dict) else cache
    quantization["exclude_modules"] = config["ignore"]
    return (json.dumps({"producer": config["producer"], "quantization": quantization}, indent=2) + "\n").encode()


def settings_of(inventory: Inventory) -> dict[str, Any]:
    """ModelOpt's settings of a checkpoint, {} where there are none; older ones have only the extra file."""
    return dict(settings_fields(inventory).values)


def settings_fields(inventory: Inventory) -> Fields:
    """Return the fields of the settings by type."""
    config = quantization_fields(inventory)
    if config:
        inner = config.fields("quantization")
        return (inner or config) if config.text("quant_method").startswith("modelopt") else Fields(None, config.file)
    where = f"{FILE} in {inventory.source}"
    if FILE not in inventory.side_files:
        return Fields(None, where)
    content = parse_object(inventory.store.read_small(FILE), where, strict=False)
    check_plain(content, where)
    settings = Fields(content, where).fields("quantization")
    return settings if settings.text("quant_algo") else Fields(None, where)


class Algorithms:
    """Which format each module of a ModelOpt checkpoint has."""

    def __init__(self, settings: Fields, source: str) -> None:
        self.source = source
        self.algorithm = settings.text("quant_algo")
        self.layers = settings.fields("quantized_layers") if "quantized_layers" in settings else None

    def format_of(self, module: str) -> Format:
        """The format of a module that is stored quantized."""
        stated = self.algorithm
        if self.layers is not None:
            if module not in self.layers:
                raise CheckpointError(f"{module} in {self.source} is quantized, but quantized_layers does not name it")
            stated = self.layers.fields(module).text("quant_algo")
        name = FORMATS.get(stated.upper())
        if name is None:
            raise CheckpointError(
                f"{module} in {self.source} has the algorithm {stated[:80]!r}, which is not supported"
            )
        return get_format(name)


def _layer(name: str, static: bool) -> dict[str, Any]:
    algorithm = {
        "nvfp4": "NVFP4" if static else "W4A16_NVFP4",
        **{fmt: algorithm for algorithm, fmt in FORMATS.items() if fmt != "nvfp4"},
    }[name]
    return {"quant_algo": algorithm, **({"group_size": _GROUPS[name]} if name in _GROUPS else {})}


def _scheme(name: str, static: bool) -> dict[str, Any]:
    """Weights and activations in the words of compressed-tensors, as modelopt repeats them."""
    bits = 4 if name == "nvfp4" else 8
    common = {"dynamic": False, "num_bits": bits, "type": "float"}
    group = {"group_size": _GROUPS[name]} if name in _GROUPS else {}
    weights = {**common, **group, **({"strategy": "channel"} if name == "fp8_channel" else {})}
    if name == "fp8_block128":
        return {"quant_algo": "FP8_PB_WO"}
    inputs = None if name == "nvfp4" and not static else {**common, **group}
    return {"input_activations": inputs, "weights": weights}
