"""How numbers become codes: searches over scales and codebooks, with the NumPy reference encoder."""

from halfbyte.search.encode import encode
from halfbyte.search.encode_options import EncodeOptions, GptqOptions
from halfbyte.search.searches import SEARCHES, Search, get_search, global_scale, register_search

__all__ = [
    "SEARCHES",
    "EncodeOptions",
    "GptqOptions",
    "Search",
    "encode",
    "get_search",
    "global_scale",
    "register_search",
]
