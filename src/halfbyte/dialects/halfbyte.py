"""halfbyte's own dialect: every format, arrays as they are in memory, fused experts stay fused.

A weight T becomes ``T_codes``, ``T_scales`` and, where the format has them, ``T_tensor_scale`` (a multiplier),
``T_offsets`` and ``T_rotation``. The configuration states each format in full, so that no reader has to guess a
convention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from halfbyte.checkpoint import Inventory, TensorInfo, safetensors_name
from halfbyte.dialects.dialect import Dialect, register_dialect
from halfbyte.dialects.module_patterns import compact, spaces
from halfbyte.dialects.outputs import Array, OutputTensor
from halfbyte.dialects.quantization_config import quantization_config_of, quantization_fields
from halfbyte.dialects.spelling import Spelling
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.formats import Format, QuantizedTensor, get_format
from halfbyte.models import Weight
from halfbyte.models.regex import Patterns

VERSION = 1
# what files have called an array since version 1, where that is not its name here
_SUFFIXES = {"global_scale": "tensor_scale"}


class HalfbyteSpelling(Spelling):
    """Every format, one tensor per array."""

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Refuse nothing: every format can be spelled."""
        return None

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """List one tensor per array of the format."""
        rows = fmt.block[0]
        return [
            OutputTensor(
                f"{weight.name}_{suffix(part)}",
                safetensors_name(np.dtype(kind)),
                shape,
                part,
                rows_per_row=1 if part == "codes" else 0 if part in ("global_scale", "rotation") or rows < 0 else rows,
            )
            for part, (kind, shape) in fmt.parts(weight.shape).items()
        ]

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Replace each group of ``T_*`` tensors by T."""
        settings = quantization_fields(inventory)
        if settings.count("version") != VERSION:
            raise CheckpointError(
                f"{inventory.source} is written in version {settings.count('version')} of the halfbyte dialect, but "
                f"this release reads version {VERSION}; install a matching release"
            )
        for name, stated in settings.fields("formats").members():
            check_description(name, stated.values)
        weights = settings.fields("weights")
        where = f"the weights of quantization_config in {inventory.source}"
        patterns = [
            (_format(name), Patterns([f"re:{p.removeprefix('re:')}" for p in weights.texts(name)], where))
            for name in weights.values
        ]
        tensors: dict[str, TensorInfo] = {}
        formats: dict[str, Format] = {}
        for name, info in inventory.tensors.items():
            weight, _, part = name.rpartition("_codes")
            if weight and not part:
                formats[weight] = fmt = _format_of(weight, patterns)
                if not info.shape:
                    raise CheckpointError(f"{name} in {inventory.source} is a scalar; the checkpoint is damaged")
                shape = (*info.shape[:-1], info.shape[-1] * 256 // fmt.parts((2, 256))["codes"][1][-1])
                tensors[weight] = TensorInfo(weight, "BF16", shape, info.file, info.offset, info.nbytes)
        companions = {f"{w}_{suffix(part)}" for w, fmt in formats.items() for part in fmt.parts((128, 256))}
        for name, info in inventory.tensors.items():
            if name not in companions:
                tensors[name] = info
        missing = sorted(companions - set(inventory.tensors))
        if missing:
            raise CheckpointError(f"{inventory.source} lacks the tensor {missing[0]}; the checkpoint is incomplete")
        return tensors, formats


class HalfbyteDialect(Dialect):
    """All formats; loaded by ``halfbyte.load`` and, after ``import halfbyte.transformers``, by transformers."""

    name = "halfbyte"
    about = "every format; for halfbyte.load and transformers"
    spelling = HalfbyteSpelling()

    def claims(self, inventory: Inventory) -> bool:
        """Recognise a checkpoint by its ``quant_method``."""
        return bool(quantization_config_of(inventory).get("quant_method") == self.name)

    def config(
        self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight], activations: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return formats in full, and which weights (patterns over their names) have which."""
        names: dict[str, list[str]] = {}
        for weight, fmt in quantized:
            names.setdefault(fmt.name, []).append(weight.name)
        everything = {name for members in names.values() for name in members} | {w.name for w in kept}
        apart = sorted(spaces([*kept, *(weight for weight, _ in quantized)]))
        return {
            "quant_method": self.name,
            "version": VERSION,
            "formats": {name: get_format(name).describe() for name in names},
            "weights": {name: compact(members, everything - set(members), apart) for name, members in names.items()},
        }


def suffix(part: str) -> str:
    """What follows a weight's name in the name of the tensor that holds an array of it."""
    return _SUFFIXES.get(part, part)


def stored_arrays(tensor: QuantizedTensor) -> dict[str, Array]:
    """The arrays of a tensor by the suffixes under which they are stored."""
    return {suffix(part): np.asarray(getattr(tensor, part)) for part in tensor.format.parts(tensor.shape)}


def check_description(name: str, stated: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose format is not what this release means by the name."""
    for key, value in _format(name).describe().items():
        if key in stated and stated[key] != value:
            raise CheckpointError(
                f"the checkpoint's format {name} says {key} = {str(stated[key])[:80]}, but this release means {value}; "
                "convert the checkpoint with the release that wrote it"
            )


def _format(name: str) -> Format:
    try:
        return get_format(name)
    except FormatError as error:
        raise CheckpointError(f"the checkpoint uses a format that this release does not know: {error}") from error


def _format_of(weight: str, patterns: list[tuple[Format, Patterns]]) -> Format:
    for fmt, names in patterns:
        if names.match(weight):
            return fmt
    raise CheckpointError(f"quantization_config does not say which format {weight} has; the checkpoint is damaged")


HALFBYTE = register_dialect(HalfbyteDialect())
