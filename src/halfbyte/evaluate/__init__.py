"""Measuring quantized models: perplexity and the divergence from the source. Needs torch and transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halfbyte.evaluate.windows import Protocol, Window, windows

if TYPE_CHECKING:
    from halfbyte.evaluate.run import evaluate

__all__ = ["Protocol", "Window", "evaluate", "windows"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from halfbyte.runtime import need_torch

        need_torch()
        from halfbyte.evaluate import run

        return run.evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
