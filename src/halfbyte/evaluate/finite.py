"""Numbers that are not finite end a measurement, with the name of the layer in which they first appear."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from halfbyte.errors import MeasurementError


def watch_logits(model: Any, name: str) -> None:
    """Make every forward pass of a model raise MeasurementError where a logit is not finite; ``name`` is the model's.

    Whatever runs the model afterwards (windows of a text, tasks, a group of quantized weights) is covered.
    """

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, torch.Tensor) and not is_finite(logits):
            ids = kwargs.get("input_ids", args[0] if args else None)
            forward = type(module).forward
            raise MeasurementError(refusal(name, model, lambda: forward(module, input_ids=ids, use_cache=False)))

    model.register_forward_hook(check, with_kwargs=True)


def refusal(name: str, module: nn.Module, again: Callable[[], Any], prefix: str = "") -> str:
    """The sentence for a model ``name`` with values that are not finite.

    ``again`` runs ``module``, the model or the part of it called ``prefix``, once more, to find out where they appear.
    """
    layer = first_not_finite(module, again)
    if layer is None and not prefix:
        return f"{name} gives logits that are not finite, so nothing can be measured with it"
    path, part = layer or ("", module)
    where = ".".join(step for step in (prefix, path) if step)
    damaged = [key for key, values in _values(part) if not is_finite(values)]
    if damaged:
        why = f"its {damaged[0]} holds a NaN or an infinity; repair the checkpoint"
    else:
        dtype = next((str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()), "")
        remedy = "compute with --dtype bfloat16 or float32" if dtype == "float16" else "repair the checkpoint"
        why = f"its numbers leave the range of {dtype or 'its type'}; {remedy}"
    return f"{name} gives values that are not finite, first in {where} ({type(part).__name__}): {why}"


def is_finite(values: torch.Tensor) -> bool:
    """Whether every value is a finite number."""
    return bool(torch.isfinite(values).all())


def first_not_finite(module: nn.Module, again: Callable[[], Any]) -> tuple[str, nn.Module] | None:
    """The innermost part of a module that is the first to put out a value that is not finite; None if none does."""
    first: list[tuple[str, nn.Module]] = []

    def note(path: str) -> Callable[..., None]:
        def look(part: nn.Module, args: Any, output: Any) -> None:
            if not first and not all(map(is_finite, _tensors(output))):
                first.append((path, part))

        return look

    handles = [part.register_forward_hook(note(path)) for path, part in module.named_modules() if path]
    try:
        with contextlib.suppress(MeasurementError), torch.inference_mode():
            again()
    finally:
        for handle in handles:
            handle.remove()
    return first[0] if first else None


def _values(part: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers that a module itself computes with, decoded where they are quantized."""
    for name, values in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
        if values.is_floating_point():
            yield name, values
    for name in getattr(part, "_decoders", ()):
        yield name, part.decoded(name)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of what a module puts out."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, (tuple, list)):
        yield from (tensor for value in output for tensor in _tensors(value))
