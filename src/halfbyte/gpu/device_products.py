"""Whether products on GPUs are there, and those of several weights that take the same activations."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch

from halfbyte.errors import FormatError
from halfbyte.formats import Format
from halfbyte.gpu.ptx_text import scale_text
from halfbyte.gpu.table_layout import Operand, describe_tables
from halfbyte.kernels.linear import NoKernelError

OPERANDS: dict[torch.dtype, Operand] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def cuda_is_here() -> bool:
    """Whether torch sees a CUDA device."""
    return torch.cuda.is_available()


def has_product(fmt: Format, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether weights of a format are multiplied on GPUs with activations of a type."""
    if not available():
        return False
    try:
        layout = describe_tables(fmt)
        if dtype in OPERANDS:
            scale_text(layout, OPERANDS[dtype])
    except NoKernelError:
        return False
    return True


class Product(Protocol):
    """A product on a device, such as ``DeviceLinear``."""

    n: int
    k: int

    def run_on_device(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T."""


class DeviceRows:
    """Several products of the same activations, whose results lie side by side."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = tuple(products)
        widths = {product.k for product in self.products}
        if len(widths) != 1:
            raise FormatError(f"weights with {sorted(widths)} columns take no common activations")
        self.k: int = widths.pop()
        self.n = sum(product.n for product in self.products)

    def run_on_device(self, x: torch.Tensor) -> torch.Tensor:
        """Return all results."""
        return torch.cat([product.run_on_device(x) for product in self.products], dim=-1)
