"""Measuring quantized models: perplexity, divergence from the source, tasks, errors of tensors, sensitivity.

What runs models needs torch and transformers; the errors of tensors do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from halfbyte.evaluate.errors_document import tensor_errors
from halfbyte.evaluate.windows import Protocol, Window, windows

if TYPE_CHECKING:
    from halfbyte.evaluate.by_group import sensitivity
    from halfbyte.evaluate.evaluation import evaluate, measure
    from halfbyte.evaluate.settings import Settings, TextSettings

__all__ = [
    "Protocol",
    "Settings",
    "TextSettings",
    "Window",
    "evaluate",
    "measure",
    "sensitivity",
    "tensor_errors",
    "windows",
]

_HOME = {
    **dict.fromkeys(("Settings", "TextSettings"), "halfbyte.evaluate.settings"),
    **dict.fromkeys(("evaluate", "measure"), "halfbyte.evaluate.evaluation"),
    "sensitivity": "halfbyte.evaluate.by_group",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from halfbyte.runtime import need_torch

        need_torch()
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
