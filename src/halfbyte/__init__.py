"""halfbyte: 4-bit language models, any format exactly, straight from file to file."""

from halfbyte.formats import QuantizedTensor, get_format, list_formats
from halfbyte.search import encode

__version__ = "0.1.0"

__all__ = ["QuantizedTensor", "__version__", "encode", "get_format", "list_formats"]
