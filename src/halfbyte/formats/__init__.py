"""What a number is: codebooks, scale types, block formats and packing. Arrays only, no files, no models."""

from halfbyte.formats import affine, fp8, ggml, hif4, if4, int4, mixfp4, mx, nvfp4, razer, signed
from halfbyte.formats.affine import AffineFormat
from halfbyte.formats.block import BlockFormat
from halfbyte.formats.codebooks import Codebook
from halfbyte.formats.format import Format, QuantizedTensor, stacked
from halfbyte.formats.hif4 import HiF4Format
from halfbyte.formats.registry import get_format, list_formats, register
from halfbyte.formats.rotated_format import RotatedFormat, rotated
from halfbyte.formats.rotation import Rotation
from halfbyte.formats.scale_search import Encoded
from halfbyte.formats.scales import ScaleType


def rotation_of(fmt: Format | None) -> Rotation | None:
    """The rotation of a format's weights, if there is a format and they are rotated."""
    return fmt.rotation if fmt else None


__all__ = [
    "AffineFormat",
    "BlockFormat",
    "Codebook",
    "Encoded",
    "Format",
    "HiF4Format",
    "QuantizedTensor",
    "RotatedFormat",
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
    "rotated",
    "rotation_of",
    "signed",
    "stacked",
]
