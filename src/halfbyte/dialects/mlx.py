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

from halfbyte.checkpoint import Inventory, Reader
from halfbyte.dialects.capabilities import Package, UnquantizedLayout
from halfbyte.dialects.dialect import Dialect, register_dialect
from halfbyte.dialects.mlx_names import BIASES, Model, config_for_mlx, is_stack, original_config
from halfbyte.dialects.mlx_source import Source, parameters, settings_of
from halfbyte.dialects.mlx_spelling import MlxSpelling
from halfbyte.dialects.outputs import Array, OutputChunk, OutputTensor
from halfbyte.errors import PlanError
from halfbyte.formats import Format
from halfbyte.models import Weight

_INTERVAL = 4  # mlx-lm's default


class MlxLayout(UnquantizedLayout):
    """Unquantized weights under their original names, but for experts, which MLX has by projection."""

    def __init__(self, model: Model, source: Source | None) -> None:
        self.model = model
        self.source = source

    def omitted(self, weight: Weight) -> str | None:
        """Leave out the copy of a tied embedding."""
        if self.model.tied and weight.role == "lm_head":
            return "the embeddings are tied, and mlx-lm takes no lm_head beside them"
        return None

    def outputs(self, weight: Weight, outputs: list[OutputTensor]) -> list[OutputTensor]:
        """List stacks of experts by projection, biases of gpt-oss likewise, and all else as it is."""
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

    def write(self, outputs: Sequence[OutputTensor], values: Array, first: int) -> Iterator[OutputChunk]:
        """Cut projections, which are ranges of the second axis, out of a stack."""
        if outputs[0].part != "values" or outputs[0].rows is None:
            yield from super().write(outputs, values, first)
            return
        for output in outputs:
            assert output.rows is not None
            begin, stop, step = output.rows
            part = np.ascontiguousarray(values[:, begin:stop:step])
            yield OutputChunk(output, first * math.prod(output.shape[1:]), part)

    def read(self, reader: Reader, weight: Weight, first: int, stop: int) -> Array | None:
        """Read values as the original checkpoint has them."""
        return self.source.read(reader, weight, first, stop) if self.source else None

    def names(self, weight: Weight) -> list[str]:
        """List the tensors of a checkpoint in this dialect."""
        return self.source.names(weight) if self.source else list(weight.sources)


class MlxPackage(Package):
    """A config.json that mlx-lm understands, beside the usual files."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def config_json(self, config: dict[str, Any]) -> dict[str, Any]:
        """Add ``quantization``, in mlx-lm's names; PlanError if it would misread the configuration."""
        _check_intervals(config, self.model)
        settings = config.pop("quantization_config")
        return {**config_for_mlx(config), "quantization": settings, "quantization_config": settings}

    def original_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the source's config.json from mlx-lm's words."""
        return original_config(config)


class MlxDialect(Dialect):
    """Affine formats of 2 to 8 bits, MXFP4, MXFP8 and NVFP4, and mixtures of them."""

    name = "mlx"
    about = "mlx-lm, mlx-vlm, LM Studio"

    def __init__(self, model: Model | None = None, source: Source | None = None) -> None:
        self.model = model or Model()
        self.spelling = MlxSpelling(self.model, source)
        self.unquantized = MlxLayout(self.model, source)
        self.package = MlxPackage(self.model)

    def for_model(self, inventory: Inventory) -> Dialect:
        """Bind to the model type, on which names depend, and to what a checkpoint in this dialect spells otherwise."""
        model = Model.of(inventory.config)
        return MlxDialect(model, Source(inventory, model) if self.claims(inventory) else None)

    def claims(self, inventory: Inventory) -> bool:
        """Recognise ``quantization``, or ``quantization_config`` without ``quant_method``, with bits and group size."""
        return bool(settings_of(inventory))

    def config(
        self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight], activations: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the parameters of most modules, and those of each module that has others."""
        modules = [
            (self.model.path(o.name.removesuffix(".weight")), parameters(fmt))
            for weight, fmt in quantized
            for o in self.spelling.outputs(weight, fmt)
            if o.part == "codes"
        ]
        most = Counter(tuple(p.items()) for _, p in modules if "global_scale" not in p).most_common(1)
        # a default cannot hold global_scale, which layers do not take
        default = dict(most[0][0]) if most else {k: v for k, v in modules[0][1].items() if k != "global_scale"}
        return {**default, **{module: p for module, p in modules if p != default}}

    def notes(self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight]) -> list[str]:
        """List where NVFP4 loses accuracy or does not run, and what mlx-lm ignores."""
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
        spaces = {"vision": "the vision tower", "audio": "the audio tower", "mtp": "multi-token prediction"}
        ignored = [name for space, name in spaces.items() if any(w.role.startswith(f"{space}.") for w in kept)]
        if ignored:
            notes.append(f"mlx-lm ignores {' and '.join(ignored)}; mlx-vlm reads what it ignores")
        return notes


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
