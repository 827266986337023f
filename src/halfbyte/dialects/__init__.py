"""Dialects: one file per engine's spelling of quantized tensors."""

from halfbyte.dialects import compressed_tensors, fp8, gguf, gpt_oss, halfbyte, mlx, modelopt
from halfbyte.dialects.base import Dialect, get_dialect, list_dialects, register_dialect
from halfbyte.dialects.outputs import CacheScales, Container, InputScale, OutputTensor, UnequalScalesError, Written
from halfbyte.dialects.settings import quantization_config_of, unquantized_config

__all__ = [
    "CacheScales",
    "Container",
    "Dialect",
    "InputScale",
    "OutputTensor",
    "UnequalScalesError",
    "Written",
    "compressed_tensors",
    "fp8",
    "get_dialect",
    "gguf",
    "gpt_oss",
    "halfbyte",
    "list_dialects",
    "mlx",
    "modelopt",
    "quantization_config_of",
    "register_dialect",
    "unquantized_config",
]
