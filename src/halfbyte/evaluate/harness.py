"""halfbyte's loader as a model of lm-evaluation-harness: ``lm_eval.simple_evaluate("halfbyte", {"pretrained": PATH})``.

Importing this module registers it.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from halfbyte.evaluate.models import open_model
from halfbyte.runtime.loading import load_tokenizer
from halfbyte.runtime.templates import template_limit


@register_model("halfbyte")
class HalfbyteLM(HFLM):  # type: ignore[misc]
    """A checkpoint that halfbyte loads, or a model that is loaded already.

    ``truncated`` counts prompts that were longer than the model's positions, of which the harness drops the beginning.
    """

    truncated = 0

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        dtype: str = "float32",
        device: str | None = None,
        dequantize: bool = False,
        **more: Any,
    ) -> None:
        if isinstance(pretrained, str):
            tokenizer = tokenizer or load_tokenizer(pretrained)
            pretrained = open_model(pretrained, dtype, dequantize, device)
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **more)

    def apply_chat_template(self, *args: Any, **more: Any) -> Any:
        """Spell a conversation, within the time that templates have."""
        with template_limit():
            return super().apply_chat_template(*args, **more)

    def _loglikelihood_tokens(self, requests: Any, **more: Any) -> Any:
        # what comes in is the context and its continuation, of which the last token is not an input
        long = {tuple(context) for _, context, rest in requests if len(context) + len(rest) - 1 > self.max_length}
        self.truncated += len(long)
        return super()._loglikelihood_tokens(requests, **more)
