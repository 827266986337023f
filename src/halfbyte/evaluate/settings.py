"""What to measure, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.evaluate import conversations as chat


@dataclass(frozen=True)
class Settings:
    """What to measure, and how.

    ``text``, ``preset``, ``length``, ``stride``, ``max_tokens``: what perplexity is measured on, and the divergence
    too unless there are ``conversations`` (the path of a JSON file), of which ``conversation_count`` times
    ``conversation_length`` tokens are used. ``dtype`` is computed in; ``activations`` (nvfp4, mxfp4, fp8) are rounded
    where weights are quantized; ``dequantize`` decodes weights once. ``noise_floor``: measure the source against
    itself in another dtype. ``cache``: a folder for references; None: a temporary one. ``tasks`` of
    lm-evaluation-harness, with the ``questions`` of mmlu_pro (a JSON lines file) and at most ``limit`` of them.
    ``errors``: also compare tensors, weighted by the file ``importance``.
    """

    text: str | Path | None = None
    preset: str | None = None
    length: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    conversations: str | Path | None = None
    conversation_count: int = chat.COUNT
    conversation_length: int = chat.LENGTH
    dtype: str = "float32"
    device: Any = None
    dequantize: bool = False
    activations: str | None = None
    noise_floor: bool = False
    cache: str | Path | None = None
    tasks: tuple[str, ...] = ()
    questions: str | Path | None = None
    limit: int | None = None
    errors: bool = False
    importance: str | Path | None = None
