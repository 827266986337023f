"""``import halfbyte.transformers`` teaches transformers the dialect ``halfbyte``.

From then on ``AutoModelForCausalLM.from_pretrained(path)`` (and every other auto class that has the architecture)
loads such checkpoints: weights stay in 4 bit and run by compiled products; a missing tensor is a ValueError.
``model.dequantize()`` makes the model dense.

Dense models in ModelOpt's dialect, of which transformers knows nothing, load in the same way; mixtures of experts in
it need ``halfbyte.load``.

It does not change how transformers reads compressed-tensors checkpoints: up to 5.23 it ignores the global scale of
NVFP4 experts without a word (huggingface/transformers#48371), so load those with ``halfbyte.load``.
"""

from __future__ import annotations

from halfbyte.plugins import load_installed_with_warnings
from halfbyte.runtime import need_torch

need_torch()
load_installed_with_warnings()

from halfbyte.runtime.modelopt_quantizer import ModeloptQuantizer  # noqa: E402
from halfbyte.runtime.packed_quantizer import PackedQuantizer as HalfbyteQuantizer  # noqa: E402
from halfbyte.runtime.remote.halfbyte_quantizer import HalfbyteQuantizationConfig  # noqa: E402

__all__ = ["HalfbyteQuantizationConfig", "HalfbyteQuantizer", "ModeloptQuantizer"]
