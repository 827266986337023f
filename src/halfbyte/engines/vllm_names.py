"""The quantized weights of a checkpoint by the modules of vLLM's models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.engines.vllm_claims import keeps_packed
from halfbyte.models import Weight
from halfbyte.source.checkpoint import Checkpoint

# read as they are by attention that multiplies with them in other ways
_READ_BY_ATTENTION = (".kv_b_proj",)
# cut for tensor parallelism by rules of their own
_CUT_BY_MODEL = (".mixer.in_proj",)
DENSE_MODE = "auto"
"""The mode of products in models without experts."""


def open_checkpoint(model: str, revision: str | None, cache: str | None) -> Checkpoint:
    """Open the checkpoint on this machine; vLLM has fetched its configuration already where it is a hub id."""
    if Path(model).is_dir():
        return Checkpoint.open(model)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json"]
    return Checkpoint.open(snapshot_download(model, revision=revision, cache_dir=cache, allow_patterns=wanted))


class QuantizedModules:
    """Names of modules, as vLLM calls them, and the quantized weight of each.

    There are none in a drafter, which names its own modules like the model's, and in models whose classes in vLLM may
    turn rows when they load them. ``mode`` is that of products: rounded activations turn too many routers.
    """

    def __init__(self, checkpoint: Checkpoint, config: Any) -> None:
        self.checkpoint = checkpoint
        self._named: dict[str, Weight] = {}
        quantized = [weight for weight in checkpoint.weights if weight.name in checkpoint.formats]
        self.mode = "exact" if any(len(weight.shape) == 3 for weight in checkpoint.weights) else DENSE_MODE
        if is_drafter(checkpoint, config) or not keeps_packed(checkpoint.inventory.config.get("architectures")):
            return
        self._named = {weight.name: weight for weight in quantized if weight.role.split(".")[0] != "mtp"}

    def rename(self, mapper: Any) -> None:
        """Rename all modules as a model class does with the names of its checkpoints."""
        renamed = ((mapper.map_name(name), weight) for name, weight in self._named.items())
        self._named = {name: weight for name, weight in renamed if name is not None}

    def linear(self, prefix: str, fused: Mapping[str, list[str]]) -> list[Weight]:
        """The weights of a linear layer, one below the other; [] where not all of its parts are quantized matrices."""
        parent, _, last = prefix.rpartition(".")
        if prefix.endswith(_READ_BY_ATTENTION) or prefix.endswith(_CUT_BY_MODEL):
            return []
        names = [".".join(filter(None, (parent, part, "weight"))) for part in fused.get(last, [last])]
        prefixes = [self._named.get(name) for name in names]
        weights = [weight for weight in prefixes if weight is not None and len(weight.shape) == 2]
        return weights if len(weights) == len(names) else []

    def experts(self, prefix: str) -> tuple[Weight, Weight] | None:
        """The stacks of a mixture of experts: gate and up as one (or up alone), and down."""
        inside = [weight for name, weight in self._named.items() if name.startswith(f"{prefix}.")]
        stacks = [weight for weight in inside if len(weight.shape) == 3]
        downs = [weight for weight in stacks if weight.role.endswith(".down")]
        ups = [weight for weight in stacks if weight not in downs]
        return (ups[0], downs[0]) if len(ups) == len(downs) == 1 else None


def is_drafter(checkpoint: Checkpoint, config: Any) -> bool:
    """Whether vLLM loads another model than the one that config.json describes: its multi-token-prediction head."""
    stated = checkpoint.inventory.config
    return getattr(config, "architectures", None) != stated.get("architectures") and getattr(
        config, "model_type", None
    ) != stated.get("model_type")
