"""Which parameter of a transformers model holds each weight of a plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.placement import places
from halfbyte.models import Weight
from halfbyte.source.checkpoint import Checkpoint

# roles of weights that a model class may have no place for: they are carried over as they are
_OPTIONAL = ("mtp.", "vision.", "audio.", "buffer", "quantized.")


@dataclass(frozen=True)
class Place:
    """A weight [..., N, K] and the name of the parameter that holds it, as [..., K, N] where it is ``transposed``."""

    weight: Weight
    target: str
    transposed: bool = False

    def module(self, model: Any) -> tuple[nn.Module, str]:
        """The module that has the parameter, and the parameter's name in it."""
        path, _, name = self.target.rpartition(".")
        return model.get_submodule(path), name

    def tensor(self, model: Any) -> torch.Tensor:
        """The parameter, or buffer, itself."""
        module, name = self.module(model)
        values: torch.Tensor = getattr(module, name)
        return values


class Places(NamedTuple):
    """Places of weights by name: of those that are trained, and of all others that one parameter holds."""

    trained: dict[str, Place]
    kept: dict[str, Place]


def find_places(model: Any, checkpoint: Checkpoint, names: set[str]) -> Places:
    """Find the parameter of every weight; ``names``: the weights that a plan quantizes.

    HalfbyteError where a weight of ``names`` has no parameter of its own and whole: the model is another one, holds
    packed weights, ties its embeddings, or has them all frozen.
    """
    state = model.state_dict()
    targets = places(model, checkpoint.weights)
    shared = Counter(targets.values())
    tied = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = Places({}, {})
    for weight in checkpoint.weights:
        target, is_trained = targets.get(weight.name), weight.name in names
        place = None
        if target is not None and target in state and shared[target] == 1:
            place = _fitting(weight, target, state[target], checkpoint.family.transposed)
        if place is None and is_trained and not (target is None and weight.role.startswith(_OPTIONAL)):
            raise HalfbyteError(_problem(model, weight, target, state))
        if place is not None and is_trained and tied[id(place.tensor(model))] > 1:
            raise HalfbyteError(
                f"{weight.name} is quantized and tied to another layer (tie_word_embeddings), which training would "
                "separate; keep embeddings and head unquantized"
            )
        if place is not None:
            (found.trained if is_trained else found.kept)[weight.name] = place
    if not any(place.tensor(model).requires_grad for place in found.trained.values()):
        raise HalfbyteError(
            "all weights that the plan quantizes are frozen (requires_grad is False); unfreeze those to train"
        )
    return found


def _fitting(weight: Weight, target: str, values: torch.Tensor, transposed: bool) -> Place | None:
    """The place of a weight in a parameter of its shape; ``transposed``: stacks of the model are [E, K, N]."""
    upright = weight.untransposed().shape
    swaps = transposed and len(upright) == 3
    wanted = (upright[0], upright[2], upright[1]) if swaps else upright
    return Place(weight.untransposed(), target, swaps) if tuple(values.shape) == wanted else None


def _problem(model: Any, weight: Weight, target: str | None, state: dict[str, torch.Tensor]) -> str:
    kind = type(model).__name__
    if target is None or target not in state:
        packed = any(hasattr(module, "_decoders") for module in model.modules())
        if packed:
            return f"{kind} holds packed weights, which cannot be trained; load it with dequantize=True"
        return f"{kind} has no parameter for {weight.name}; give the model that the plan is for"
    shape = list(state[target].shape)
    return (
        f"{kind} holds {weight.name} {list(weight.untransposed().shape)} in {target} {shape}, so it cannot be trained "
        "as one weight; give the model that the plan is for"
    )
