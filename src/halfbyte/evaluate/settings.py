"""What to measure, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONVERSATIONS, CONVERSATION_LENGTH = 100, 256
"""How many conversations divergences are published on, and how many tokens of each."""


@dataclass(frozen=True)
class TextSettings:
    """The text to measure on, and how to compute.

    ``text``: a UTF-8 file (None: the held-out text of the demo model). ``preset``: one of
    ``halfbyte.evaluate.windows.PRESETS``, which settles length and stride. ``length``: tokens in a window (default
    512), ``stride``: tokens between windows (default: the length), ``max_tokens``: use only the text's first tokens.
    ``bos``: whether the token that begins a text takes the place of the first one in every window, which is never
    scored: ``auto`` where the tokenizer puts it before a text, ``yes`` or ``no``. ``dtype`` is computed in, on the
    torch ``device``. ``cache``: a folder for references; None: a temporary one.
    """

    text: str | Path | None = None
    preset: str | None = None
    length: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    bos: str = "auto"
    dtype: str = "float32"
    device: Any = None
    cache: str | Path | None = None

    @property
    def names_text(self) -> bool:
        """Whether anything is said of the text, so that one is to be measured on."""
        given = (self.text, self.preset, self.length, self.stride, self.max_tokens)
        return any(value is not None for value in given)


@dataclass(frozen=True)
class Settings(TextSettings):
    """What to measure, and how.

    The text is what perplexity is measured on, and the divergence too unless there are ``conversations`` (the path of
    a JSON file), of which ``conversation_count`` times ``conversation_length`` tokens are used. ``activations``
    (nvfp4, mxfp4, fp8) are rounded where weights are quantized; ``dequantize`` decodes weights once. ``noise_floor``:
    measure the source against itself in another dtype. ``tasks`` of lm-evaluation-harness, with the ``questions`` of
    mmlu_pro (a JSON lines file) and at most ``limit`` of them. ``errors``: also compare tensors, weighted by the file
    ``importance``. ``drafts``: also let the multi-token-prediction head draft so many tokens.
    """

    conversations: str | Path | None = None
    conversation_count: int = CONVERSATIONS
    conversation_length: int = CONVERSATION_LENGTH
    dequantize: bool = False
    activations: str | None = None
    noise_floor: bool = False
    tasks: tuple[str, ...] = ()
    questions: str | Path | None = None
    limit: int | None = None
    errors: bool = False
    drafts: int = 0
    importance: str | Path | None = None
