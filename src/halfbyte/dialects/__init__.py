"""Dialects: one file per engine's spelling of quantized tensors."""

from halfbyte.dialects import compressed_tensors, gguf, gpt_oss, halfbyte, mlx, modelopt
from halfbyte.dialects import fp8_dialect as fp8
from halfbyte.dialects.dialect import Dialect, get_dialect, list_dialects, register_dialect
from halfbyte.dialects.outputs import CacheScales, Container, InputScale, OutputChunk, OutputTensor, UnequalScalesError
from halfbyte.dialects.quantization_config import quantization_config_of, unquantized_config

__all__ = [
    "CacheScales",
    "Container",
    "Dialect",
    "InputScale",
    "OutputChunk",
    "OutputTensor",
    "UnequalScalesError",
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
