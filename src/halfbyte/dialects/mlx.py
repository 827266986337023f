"""MLX (0.32): what mlx-lm, mlx-vlm and programs built on them load.

Per module P: ``P.weight`` (U32 words, first code in the lowest bits), ``P.scales`` and, for affine formats,
``P.biases``. Experts are one stack per projection; in NVFP4 with ``P.global_scale`` (F32 [E]; a value is
table x scale x global_scale / 2688), which MLX has for experts only. Other weights keep their original names and
layouts, which the engines rename, transpose and shift (norms of Qwen3.5) while loading.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from halfbyte.checkpoint import Inventory, Reader, TensorInfo
from halfbyte.dialects.dialect import Dialect, register_dialect
from halfbyte.dialects.mlx_names import BIASES, Model, config_for_mlx, is_stack, original_config
from halfbyte.dialects.mlx_source import Source, parameters, settings_of
from halfbyte.dialects.outputs import Array, OutputChunk, OutputTensor
from halfbyte.errors import PlanError
from halfbyte.formats import AffineFormat, BlockFormat, Format, get_format
from halfbyte.models import Weight

_BLOCK_FORMATS = ("mxfp4", "mxfp8", "nvfp4", "nvfp4_unscaled")
_TOP = np.float32(2688)  # 6 * 448: global_scale is the amax that this global scale maps to the largest value
_INTERVAL = 4  # mlx-lm's default


class MlxDialect(Dialect):
    """Affine formats of 2 to 8 bits, MXFP4, MXFP8 and NVFP4, and mixtures of them."""

    name = "mlx"
    about = "mlx-lm, mlx-vlm, LM Studio"
    power_of_two = True

    def __init__(self, model: Model | None = None, source: Source | None = None) -> None:
        self.model = model or Model()
        self.source = source

    def for_model(self, inventory: Inventory) -> Dialect:
        """Bound to the model type, on which names depend, and to what a checkpoint in this dialect spells otherwise."""
        model = Model.of(inventory.config)
        return MlxDialect(model, Source(inventory, model) if self.claims(inventory) else None)

    def format_for(self, weight: Weight, fmt: Format) -> Format:
        """Only experts have a global scale."""
        return fmt if fmt.name != "nvfp4" or is_stack(weight) else get_format("nvfp4_unscaled")

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Formats that MLX has no kernels for, and weights that it does not quantize."""
        if not (isinstance(fmt, AffineFormat) and fmt.offset == "bias") and fmt.name not in _BLOCK_FORMATS:
            return f"MLX has no mode for {fmt.name}; choose affine4, mxfp4, nvfp4 or another format of its list"
        if weight.role.startswith("mtp."):
            return f"{weight.name} predicts further tokens, and MLX programs read such weights unquantized; keep it"
        if len(weight.shape) != 2 and not is_stack(weight):
            return f"MLX quantizes matrices and stacks of experts, and {weight.name} has the shape {list(weight.shape)}"
        if len(weight.shape) == 2 and not weight.name.endswith(".weight"):
            return f"MLX stores modules, and {weight.name} is not the weight of one"
        if self.model.tied and weight.role == "lm_head":
            return "the embeddings are tied, and mlx-lm then wants no lm_head; drop it by a rule"
        return None

    def unfit(self, weight: Weight, fmt: Format) -> str | None:
        """MLX's own limit for NVFP4 on CPUs."""
        if fmt.name.startswith("nvfp4") and weight.shape[-1] % 32:
            return f"K = {weight.shape[-1]} is not a multiple of 32, which MLX on CPUs needs for nvfp4"
        return None

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """Per module, in MLX's names."""
        if len(weight.shape) == 2:
            return list(_outputs(weight.name.removesuffix(".weight"), weight.shape, None, fmt))
        experts, _, k = weight.shape
        found: list[OutputTensor] = []
        for module, rows, n in self.model.projections(weight):
            found += _outputs(module, (experts, n, k), rows, fmt)
        return found

    def stored(self, weight: Weight, fmt: Format, tensors: Mapping[str, TensorInfo]) -> list[OutputTensor]:
        """Under the names that a checkpoint has, which may be those of the modules."""
        return [o._replace(name=self._stored_name(o.name, tensors)) for o in self.outputs(weight, fmt)]

    def pack(self, output: OutputTensor, part: Array, fmt: Format) -> Array:
        """Codes as words; the global scale times 2688, which is exact for powers of two."""
        if output.part == "codes":
            return np.ascontiguousarray(part).view("<u4")
        return _global_scale(part) if output.part == "global_scale" else part

    def unpack(self, output: OutputTensor, stored: Array, fmt: Format, shape: tuple[int, ...]) -> Array:
        """The inverse."""
        if output.part == "codes":
            return np.ascontiguousarray(stored).view(np.uint8).reshape(shape)
        return np.asarray((stored / _TOP if output.part == "global_scale" else stored).reshape(shape))

    def config(self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight]) -> dict[str, Any]:
        """The parameters of most modules, and those of each module that has others."""
        modules = [
            (self.model.path(o.name.removesuffix(".weight")), parameters(fmt))
            for weight, fmt in quantized
            for o in self.outputs(weight, fmt)
            if o.part == "codes"
        ]
        most = Counter(tuple(p.items()) for _, p in modules if "global_scale" not in p).most_common(1)
        # a default cannot hold global_scale, which layers do not take
        default = dict(most[0][0]) if most else {k: v for k, v in modules[0][1].items() if k != "global_scale"}
        return {**default, **{module: p for module, p in modules if p != default}}

    def complete(self, config: dict[str, Any]) -> dict[str, Any]:
        """``quantization`` beside ``quantization_config``, in mlx-lm's names; PlanError if it would misread them."""
        _check_intervals(config, self.model)
        settings = config.pop("quantization_config")
        return {**config_for_mlx(config), "quantization": settings, "quantization_config": settings}

    def original_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse."""
        return original_config(config)

    def notes(self, quantized: Sequence[tuple[Weight, Format]]) -> list[str]:
        """Where NVFP4 loses accuracy, and where it does not run."""
        notes = []
        if any(fmt.name == "nvfp4_unscaled" for _, fmt in quantized):
            notes.append(
                "MLX's layers have no global scale for nvfp4, so weights below about 0.1 lose accuracy; mxfp4 or "
                "affine4 do not"
            )
        if any(fmt.name == "nvfp4" for _, fmt in quantized):
            notes.append(
                "experts in nvfp4 have a global_scale, which needs mlx 0.32 and a GPU; nvfp4_unscaled, less exact, "
                "also runs on CPUs"
            )
        return notes

    def notes_on_kept(self, kept: Sequence[Weight]) -> list[str]:
        """What mlx-lm ignores."""
        spaces = {"vision": "the vision tower", "mtp": "multi-token prediction"}
        found = [said for space, said in spaces.items() if any(w.role.startswith(f"{space}.") for w in kept)]
        return [f"mlx-lm ignores {' and '.join(found)}; mlx-vlm reads what it ignores"] if found else []

    def left_out(self, weight: Weight) -> str | None:
        """The copy of a tied embedding."""
        if self.model.tied and weight.role == "lm_head":
            return "the embeddings are tied, and mlx-lm takes no lm_head beside them"
        return None

    def kept(self, weight: Weight, outputs: list[OutputTensor]) -> list[OutputTensor]:
        """Stacks of experts by projection, biases of gpt-oss likewise; all else as it is."""
        if is_stack(weight):
            experts, _, k = weight.shape
            return [
                OutputTensor(f"{module}.weight", weight.dtype, (experts, n, k), "values", None, rows)
                for module, rows, n in self.model.projections(weight)
            ]
        if self.model.kind == "gpt_oss" and weight.name.endswith(BIASES):
            base, _, last = weight.name.rpartition(".")
            experts, n = weight.shape
            if last.startswith("down"):
                return [OutputTensor(f"{base}.down_proj.bias", weight.dtype, (experts, n), "values")]
            return [
                OutputTensor(f"{base}.{part}_proj.bias", weight.dtype, (experts, n // 2), "values", None, (i, n, 2))
                for i, part in enumerate(("gate", "up"))
            ]
        return outputs

    def spell(self, outputs: Sequence[OutputTensor], values: Array, first: int) -> Iterator[OutputChunk]:
        """Projections are ranges of the second axis."""
        if outputs[0].part != "values" or outputs[0].rows is None:
            yield from super().spell(outputs, values, first)
            return
        for output in outputs:
            assert output.rows is not None
            begin, stop, step = output.rows
            part = np.ascontiguousarray(values[:, begin:stop:step])
            yield OutputChunk(output, first * math.prod(output.shape[1:]), part)

    def read_kept(self, reader: Reader, weight: Weight, first: int, stop: int) -> Array | None:
        """As the original checkpoint has it."""
        return self.source.read(reader, weight, first, stop) if self.source else None

    def kept_names(self, weight: Weight) -> list[str]:
        """Those of a checkpoint in this dialect."""
        return self.source.names(weight) if self.source else list(weight.sources)

    def claims(self, inventory: Inventory) -> bool:
        """By ``quantization``, or ``quantization_config`` without ``quant_method``, with bits and group size."""
        return bool(settings_of(inventory))

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Original names, experts fused, layouts as before MLX's conversion."""
        source = self.source or Source(inventory, Model.of(inventory.config))
        return source.tensors, source.formats

    def _stored_name(self, name: str, tensors: Mapping[str, TensorInfo]) -> str:
        module, _, last = name.rpartition(".")
        return name if name in tensors else f"{self.model.path(module)}.{last}"


def _outputs(
    module: str, shape: tuple[int, ...], rows: tuple[int, int, int] | None, fmt: Format
) -> Iterator[OutputTensor]:
    parts = fmt.parts(shape)
    words = (*shape[:-1], parts["codes"][1][-1] // 4)
    yield OutputTensor(f"{module}.weight", "U32", words, "codes", None, rows)
    wide = isinstance(fmt, AffineFormat)
    yield OutputTensor(f"{module}.scales", "BF16" if wide else "U8", parts["scales"][1], "scales", None, rows)
    if wide:
        yield OutputTensor(f"{module}.biases", "BF16", parts["offsets"][1], "offsets", None, rows)
    if isinstance(fmt, BlockFormat) and fmt.has_global_scale:
        yield OutputTensor(f"{module}.global_scale", "F32", shape[:-2], "global_scale", None, None, 0)


def _global_scale(scale: Array) -> Array:
    """What gives the global scale again when MLX divides it by 2688; there is one for every scale that MLX stored."""
    found = np.asarray(scale, dtype=np.float32) * _TOP
    for near in (np.nextafter(found, np.float32(0)), np.nextafter(found, np.float32(np.inf))):
        found = np.where((found / _TOP != scale) & (near / _TOP == scale), near, found)
    return np.asarray(found, dtype=np.float32)


def _check_intervals(config: Mapping[str, Any], model: Model) -> None:
    """mlx-lm derives the kind of each layer of Qwen3.5 from one number."""
    text = config.get("text_config") if model.nested else config
    if model.kind not in ("qwen3_5", "qwen3_5_moe") or not isinstance(text, Mapping):
        return
    types = text.get("layer_types")
    if not isinstance(types, list):
        return
    interval = text.get("full_attention_interval") or _INTERVAL
    wanted = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(len(types))]
    if types != wanted:
        raise PlanError(
            f"mlx-lm gives every {interval}th layer full attention, but layer_types in config.json says otherwise; "
            "state the right full_attention_interval there"
        )


MLX = register_dialect(MlxDialect())
