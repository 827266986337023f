"""Dialects: one file per engine's spelling of quantized tensors."""

from halfbyte.dialects import compressed_tensors, halfbyte
from halfbyte.dialects.base import Dialect, OutputTensor, Written, get_dialect, list_dialects, register_dialect

__all__ = [
    "Dialect",
    "OutputTensor",
    "Written",
    "compressed_tensors",
    "get_dialect",
    "halfbyte",
    "list_dialects",
    "register_dialect",
]
