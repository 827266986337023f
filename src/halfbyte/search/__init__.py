"""How numbers become codes: searches over scales and tables, with the NumPy reference encoder."""

from halfbyte.search.encode import encode
from halfbyte.search.rules import global_scale
from halfbyte.search.searches import SEARCHES, Search, get_search

__all__ = ["SEARCHES", "Search", "encode", "get_search", "global_scale"]
