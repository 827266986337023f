"""What a number is: tables, scale types, block formats and packing. Arrays only, no files, no models."""

from halfbyte.formats import affine, fp8, ggml, hif4, if4, int4, mixfp4, mx, nvfp4, razer, signed
from halfbyte.formats.affine import AffineFormat
from halfbyte.formats.block import BlockFormat, rotation_of
from halfbyte.formats.codebooks import Codebook
from halfbyte.formats.format import Format, get_format, list_formats, register
from halfbyte.formats.hif4 import HiF4Format
from halfbyte.formats.scales import ScaleType
from halfbyte.formats.tensor import QuantizedTensor, stacked

__all__ = [
    "AffineFormat",
    "BlockFormat",
    "Codebook",
    "Format",
    "HiF4Format",
    "QuantizedTensor",
    "ScaleType",
    "affine",
    "fp8",
    "get_format",
    "ggml",
    "hif4",
    "if4",
    "int4",
    "list_formats",
    "mixfp4",
    "mx",
    "nvfp4",
    "razer",
    "register",
    "rotation_of",
    "signed",
    "stacked",
]
