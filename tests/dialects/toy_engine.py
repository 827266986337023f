"""An engine that nobody has: what it takes to add one that stores modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.checkpoint import Inventory
from halfbyte.dialects import Dialect, ModulePart, ModuleSpelling, quantization_config_of
from halfbyte.formats import Format
from halfbyte.models import Weight


class ToyDialect(Dialect):
    """NVFP4 and FP8 per channel."""

    name = "toy"
    about = "an engine in a test"
    spelling = ModuleSpelling(
        "toy",
        {
            "nvfp4": {
                "codes": ModulePart(".qweight", "I32"),
                "scales": (".qscale", "F8_E4M3"),
                "global_scale": ".qmax",
            },
            "fp8_channel": {"codes": (".weight", "F8_E4M3"), "scales": (".weight_scale", "F32")},
        },
    )

    def claims(self, inventory: Inventory) -> bool:
        """Recognise a checkpoint by its ``quant_method``."""
        return quantization_config_of(inventory).get("quant_method") == self.name

    def config(
        self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight], activations: Mapping[str, Any]
    ) -> dict[str, Any]:
        """State the name alone: the tensors of a module tell its format."""
        return {"quant_method": self.name}
