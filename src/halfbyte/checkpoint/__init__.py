"""Checkpoint files: inventory from headers, byte-range reading, planned layout, atomic writing, journal."""

from halfbyte.checkpoint.dtypes import itemsize, nbytes, numpy_dtype, safetensors_name
from halfbyte.checkpoint.header import TensorInfo
from halfbyte.checkpoint.inventory import Inventory
from halfbyte.checkpoint.journal import Journal, prepare_output
from halfbyte.checkpoint.layout import Layout, build_header
from halfbyte.checkpoint.reader import Reader
from halfbyte.checkpoint.store import LocalStore, Store
from halfbyte.checkpoint.writer import ShardWriter, copy_file_atomic, write_file_atomic

__all__ = [
    "Inventory",
    "Journal",
    "Layout",
    "LocalStore",
    "Reader",
    "ShardWriter",
    "Store",
    "TensorInfo",
    "build_header",
    "copy_file_atomic",
    "itemsize",
    "nbytes",
    "numpy_dtype",
    "prepare_output",
    "safetensors_name",
    "write_file_atomic",
]
