"""Where the weights of a checkpoint are in its transformers model."""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from halfbyte.models import Weight


def places(model: Any, weights: list[Weight]) -> dict[str, str]:
    """The model's parameter that each weight became (several may share one), by the weight's name.

    Weights that the model has no parameter for (multi-token prediction, vision) are left out.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    expected = dict.fromkeys(_parameters(model))
    parameters = {}
    for weight in weights:
        for name in (weight.sources[0], weight.name):
            target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
            if target in expected:
                parameters[weight.name] = target
                break
    return parameters


def _parameters(model: Any) -> list[str]:
    """Names of parameters, whether they are dense or decoded when read."""
    names = list(model.state_dict())
    for path, module in model.named_modules():
        names += [f"{path}.{name}" for name in getattr(module, "_decoders", ())]
    return names
