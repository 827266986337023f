"""halfbyte in vLLM: checkpoints that vLLM has no kernels for are decoded while it loads them.

``register`` is the entry point ``halfbyte`` of the group ``vllm.general_plugins``; vLLM calls it in each of its
processes. It adds the quantization method ``halfbyte``, under which every layer is an ordinary unquantized one, and
loaders whose stream of tensors is the checkpoint decoded (``vllm_loader``). Checkpoints of all other methods go
through the very same code as without the plugin.
"""

from __future__ import annotations

from halfbyte.engines.vllm_claims import METHOD
from halfbyte.plugins import load_installed_with_warnings


def register() -> None:
    """Tell vLLM of the method and of the loaders; harmless when called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from halfbyte.engines.vllm_loader import install
    from halfbyte.engines.vllm_method import HalfbyteConfig

    load_installed_with_warnings()
    register_quantization_config(METHOD)(HalfbyteConfig)
    install()
