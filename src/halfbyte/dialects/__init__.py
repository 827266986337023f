"""Dialects: one file per engine's spelling of quantized tensors."""

from halfbyte.dialects import compressed_tensors, gguf, gpt_oss, halfbyte, mlx, modelopt
from halfbyte.dialects import fp8_dialect as fp8
from halfbyte.dialects.capabilities import ActivationScales, Package, UnquantizedLayout
from halfbyte.dialects.dialect import Dialect, get_dialect, list_dialects, register_dialect
from halfbyte.dialects.module_spelling import ModulePart, ModuleSpelling
from halfbyte.dialects.outputs import CacheScales, Container, InputScale, OutputChunk, OutputTensor, UnequalScalesError
from halfbyte.dialects.quantization_config import quantization_config_of, unquantized_config
from halfbyte.dialects.spelling import Spelling

__all__ = [
    "ActivationScales",
    "CacheScales",
    "Container",
    "Dialect",
    "InputScale",
    "ModulePart",
    "ModuleSpelling",
    "OutputChunk",
    "OutputTensor",
    "Package",
    "Spelling",
    "UnequalScalesError",
    "UnquantizedLayout",
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
