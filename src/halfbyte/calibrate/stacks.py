"""Stacks of experts, filled one expert after the other and kept as narrow as the checkpoint has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from halfbyte.runtime.decode import to_torch

Read = Callable[..., NDArray[Any]]


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint that a parameter is made of, the expert whose it is, and the pattern of
    transformers' converter that it matched."""

    name: str
    expert: int | None
    pattern: str | None


def plan_stack(
    experts: int, sources: Sequence[Source], converters: Sequence[WeightConverter]
) -> list[list[str]] | None:
    """For each expert the tensors whose rows it is made of; an empty list: all experts are indices of one tensor.

    None where transformers does something else with them.
    """
    if len(sources) == 1 and sources[0].pattern is None:
        return []
    converter = next((c for c in converters if sources[0].pattern in c.source_patterns), None)
    if converter is None or not _only_stacks(converter):
        return None
    names: dict[tuple[int | None, str | None], str] = {(s.expert, s.pattern): s.name for s in sources}
    wanted = [[(expert, pattern) for pattern in converter.source_patterns] for expert in range(experts)]
    if len(sources) != len(names) or set(names) != {key for keys in wanted for key in keys}:
        return None
    return [[names[key] for key in keys] for keys in wanted]


def _only_stacks(converter: WeightConverter) -> bool:
    """Whether experts are stacked, after the rows of their projections were put one below the other."""
    kinds = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    merge, join = (MergeModulelist, 0), (Concatenate, 1)
    one = len(converter.source_patterns) == 1
    return len(converter.target_patterns) == 1 and (kinds == [merge, join] or (one and kinds == [merge]))


def fill_stack(
    shape: Sequence[int], plan: Sequence[Sequence[str]], read: Mapping[str, Read], whole: str, kind: torch.dtype,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """A stack [E, N, K] of what ``plan_stack`` found, ``whole`` being the tensor where it found one.

    In the checkpoint's type where ``kind`` is FP32 and holds it exactly, else in ``kind``. ValueError where the
    tensors have another shape.
    """
    stack: torch.Tensor | None = None
    for expert in range(shape[0]):
        if plan:
            parts = [to_torch(read[name]()) for name in plan[expert]]
            values = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            values = to_torch(read[whole](expert, expert + 1))[0]
        if values.shape != torch.Size(shape[1:]):
            raise ValueError(f"{list(values.shape)} instead of {list(shape[1:])}")
        if stack is None:
            narrow = kind == torch.float32 and values.dtype in (torch.bfloat16, torch.float16)
            stack = torch.empty(tuple(shape), dtype=values.dtype if narrow else kind, device=device)
        stack[expert] = values
    assert stack is not None
    return stack
