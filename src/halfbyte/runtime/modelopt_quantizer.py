"""ModelOpt's checkpoints in transformers, which has no quantizer of that name: dense models, packed."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.runtime.packed_quantizer import PackedQuantizer, Packing, packing_of, packing_of_files

METHOD = "modelopt"


class ModeloptConfig(QuantizationConfigMixin):
    """``quantization_config`` of ModelOpt, which is read from the checkpoint instead."""

    def __init__(self, **stated: Any) -> None:
        self.quant_method = METHOD
        self.stated = stated


class ModeloptQuantizer(PackedQuantizer):
    """Packs the weights of a ModelOpt checkpoint; ValueError where ``halfbyte.load`` is needed."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        packing = packing_of_files(checkpoint_files)
        lacking = None if packing is None else next((n for n in packing.weights if not _fits(packing, n)), None)
        if packing is None or lacking:
            what = lacking or "the weights"
            raise ValueError(f"from_pretrained cannot load {what} of this ModelOpt checkpoint; use halfbyte.load")
        packing.tensors = {}
        with packing_of(packing):
            return super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)

    def _refuse_converted(self, weight: str, model: Any) -> None:
        raise ValueError(f"{type(model).__name__} joins {weight} with others; use halfbyte.load")

    def _elsewhere(self, places: dict[str, tuple[str, str | None]]) -> set[str]:
        names = super()._elsewhere(places)
        if self.packing is None:
            return names
        for place in self.packing.places:
            target = places[place.weight.name][0].removesuffix("weight")
            for stored in self.packing.checkpoint.tensors_of(place.weight):
                names |= {stored, target + stored.rpartition(".")[2]}
            names |= {target + "input_scale"}
        return names


def _fits(packing: Packing, name: str) -> bool:
    return packing.can_pack(name) and len(packing.weights[name].shape) == 2


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(ModeloptConfig)
    register_quantizer(METHOD)(ModeloptQuantizer)
