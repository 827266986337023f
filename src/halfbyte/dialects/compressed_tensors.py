"""compressed-tensors: what vLLM, SGLang and transformers load (formats of that library, version 0.20)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halfbyte.checkpoint import Inventory
from halfbyte.dialects.capabilities import ActivationScales
from halfbyte.dialects.compressed_tensors_config import (
    CACHE,
    SCHEMES,
    activation_arguments,
    quantization_config,
)
from halfbyte.dialects.compressed_tensors_spelling import CompressedTensorsSpelling, schemes
from halfbyte.dialects.declared import Declared
from halfbyte.dialects.dialect import Dialect, register_dialect
from halfbyte.dialects.module_patterns import spaces
from halfbyte.dialects.modules import is_linear, modules, scaled_modules
from halfbyte.dialects.outputs import CacheScales, InputScale
from halfbyte.dialects.quantization_config import quantization_config_of, quantization_fields
from halfbyte.formats import Format
from halfbyte.models import Weight
from halfbyte.models.regex import Patterns


class CompressedTensorsActivations(ActivationScales):
    """Inputs as the library's schemes quantize them."""

    endings = (".input_global_scale", ".input_scale")

    def scale(self, fmt: Format) -> InputScale | None:
        """Return a reciprocal beside NVFP4, a multiplier beside FP8."""
        if fmt.rotation:
            return None
        if fmt.name == "nvfp4":
            return InputScale(".input_global_scale", True, (1,))
        return InputScale(".input_scale", False, (1,)) if fmt.name in ("fp8_tensor", "fp8_channel") else None

    def problem(self, fmt: Format, kind: str) -> str | None:
        """Refuse pairs that engines have no kernels for."""
        kinds = SCHEMES[fmt.plain.name].activations
        if kind == "static" and fmt.rotation:
            return f"scales of rotated activations ({fmt.name}) are not calibrated; use dynamic ones or none"
        if kind in kinds:
            return None
        return f"engines take no {kind} activations beside {fmt.name} in compressed-tensors, only {' or '.join(kinds)}"

    def stated(self, inventory: Inventory, weight: Weight) -> dict[str, Any] | None:
        """Return ``input_activations`` of the weight's group."""
        return schemes(inventory).inputs_of(next(modules(weight, one_expert=True)).name)

    def takes_scales(self, inventory: Inventory) -> Callable[[Weight, Format, str], bool]:
        """Ask the module's group: calibrated inputs are not found at run time, or only their blocks are."""
        groups = schemes(inventory)

        def takes(weight: Weight, fmt: Format, module: str) -> bool:
            inputs = groups.inputs_of(module) if self.scale(fmt) else {}
            return bool(inputs) and inputs.get("dynamic") in (False, "local")

        return takes


class CompressedTensorsDialect(Dialect):
    """NVFP4, MixFP4, MXFP4, INT4, FP8 and MXFP8, and mixtures of them."""

    name = "compressed-tensors"
    about = "vLLM, SGLang, transformers"
    spelling = CompressedTensorsSpelling()
    activations = CompressedTensorsActivations()
    cache_scales = CacheScales((".k_scale", ".v_scale"), "BF16", (1,), CACHE)

    def claims(self, inventory: Inventory) -> bool:
        """Recognise a checkpoint by its ``quant_method``."""
        return quantization_config_of(inventory).get("quant_method") == self.name

    def declared(self, inventory: Inventory) -> Declared:
        """Return the ignore list, and the targets where they name modules and not a class."""
        settings = quantization_fields(inventory)
        targets = [t for _, group in settings.fields("config_groups").members() for t in group.texts("targets")]
        named = None if "Linear" in targets else Patterns(targets, "the targets of config.json")
        return Declared(tuple(settings.texts("ignore")), named, None, False)

    def config(
        self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight], activations: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return config groups with unanchored patterns, and the ignore list."""
        static = scaled_modules(kept, self.activations.endings)
        by_format: dict[tuple[str, str], list[str]] = {}
        # transformers takes the first pattern that contains "experts", which those of shared experts may do
        for weight, fmt in sorted(quantized, key=lambda pair: len(pair[0].shape) == 2):
            names = [m.name for m in modules(weight, one_expert=True)]
            inputs = activation_arguments(fmt.name, activations.get(weight.name), names[0] in static)
            by_format.setdefault((fmt.name, json.dumps(inputs, sort_keys=True)), []).extend(names)
        groups = [(name, json.loads(inputs), members) for (name, inputs), members in by_format.items()]
        taken = spaces(w for w, _ in quantized)
        whole = sorted(spaces(kept) - taken)
        apart = tuple(f"{space}." for space in whole)
        linear = [w for w in kept if is_linear(w) and not w.name.removeprefix("model.").startswith(apart)]
        ignored = [m.name for weight in linear for m in modules(weight, one_expert=True)]
        return quantization_config(groups, ignored, whole, sorted(taken))

    def notes(self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight]) -> list[str]:
        """List what engines that are out now do not load, or load wrongly."""
        stacks: dict[str, list[Format]] = {}
        for weight, fmt in quantized:
            if len(weight.shape) == 3:
                stacks.setdefault(weight.name.rpartition(".")[0], []).append(fmt)
        notes = []
        if any(len(formats) < 2 or len(set(formats)) > 1 for formats in stacks.values()):
            notes.append("vLLM wants all projections of a layer's experts in one format; here some differ or are kept")
        if any(fmt.has_global_scale for formats in stacks.values() for fmt in formats):
            notes.append(
                "transformers (to 5.23) ignores the global scales of experts in compressed-tensors; vLLM does not"
            )
        if any(fmt.rotation for _, fmt in quantized):
            notes.append(
                "transformers (to 5.23) ignores transform_config and computes nonsense; vLLM has kernels for it on GPUs"
            )
        if any(fmt.plain.name == "mixfp4" for _, fmt in quantized):
            notes.append(
                "compressed-tensors (to 0.20) does not know mixfp4-pack-quantized; engines need MixFP4 support"
            )
        return notes


COMPRESSED_TENSORS = register_dialect(CompressedTensorsDialect())
