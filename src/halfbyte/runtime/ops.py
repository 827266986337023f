"""Products with packed weights on torch tensors, as torch operators that ``torch.compile`` and engines can trace.

``run_linear`` and ``run_experts`` are plain functions, for code that runs eagerly. ``torch.ops.halfbyte.linear`` and
``torch.ops.halfbyte.experts`` do the same with a number instead of the product: the one that ``handle_of`` gives. A
handle is valid as long as somebody else keeps the product.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.kernels.linear import PackedExperts, product_of, set_threads
from halfbyte.kernels.linear_layout import NativeProduct

_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_numbers = itertools.count(1)
_products: WeakValueDictionary[int, Any] = WeakValueDictionary()
_handles: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_threads = 0


class Product(Protocol):
    """Anything that multiplies: PackedLinear, PackedRows or PackedDense."""

    n: int
    k: int

    def run(self, product: NativeProduct) -> None:
        """Run on raw addresses."""


def handle_of(product: Any) -> int:
    """Return the number that stands for a product in ``torch.ops.halfbyte``."""
    number = _handles.get(product)
    if number is None:
        number = next(_numbers)
        _handles[product], _products[number] = number, product
    return number


def run_linear(x: torch.Tensor, product: Product, mode: str = "exact") -> torch.Tensor:
    """Return x W^T + bias in the type of x [..., K], as [..., N]; on as many threads as torch uses.

    HalfbyteError for activations on another device than the weight, or of another width. A product of
    ``halfbyte.gpu`` runs on its device.
    """
    if hasattr(product, "run_on_device"):
        return product.run_on_device(x)
    x, dtype = _checked(x, product.k)
    y = torch.empty((*x.shape[:-1], product.n), dtype=x.dtype)
    rows = x.numel() // product.k
    if rows:
        name = _TYPES[x.dtype]
        product.run(product_of(x.data_ptr(), name, rows, y.data_ptr(), name, product.k, product.n, mode))
    return y if dtype == y.dtype else y.to(dtype)


def run_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, mixture: PackedExperts, mode: str = "exact"
) -> torch.Tensor:
    """Return the weighted sum of the chosen experts of each row of x [T, K], as [T, N] in the type of x.

    ``experts`` [T, slots] are numbers of experts (others than these add nothing), ``weights`` [T, slots] their shares.
    """
    if hasattr(mixture, "run_on_device"):
        return mixture.run_on_device(x, experts, weights)
    x, dtype = _checked(x, mixture.k)
    chosen = experts.to(torch.int64).contiguous()
    shares = weights.to(torch.float32).contiguous()
    if x.ndim != 2 or chosen.ndim != 2 or chosen.shape != shares.shape or len(chosen) != len(x):
        shapes = f"{list(x.shape)}, {list(chosen.shape)} and {list(shares.shape)}"
        raise HalfbyteError(f"x, experts and weights must be [T, K], [T, slots] and [T, slots], not {shapes}")
    y = torch.empty((len(x), mixture.n), dtype=x.dtype)
    if len(x):
        name = _TYPES[x.dtype]
        native = mixture.mixture(chosen.data_ptr(), shares.data_ptr(), chosen.shape[1])
        mixture.run(native, product_of(x.data_ptr(), name, len(x), y.data_ptr(), name, mixture.k, mixture.n, mode))
    return y if dtype == y.dtype else y.to(dtype)


def _checked(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.dtype]:
    """Contiguous activations of a type that products take, and their own type."""
    global _threads
    if x.device.type != "cpu":
        raise HalfbyteError(f"packed weights are multiplied on the CPU, and the activations are on {x.device}")
    if x.ndim == 0 or x.shape[-1] != k:
        raise HalfbyteError(f"activations of shape {list(x.shape)} do not fit a weight with {k} columns")
    threads = torch.get_num_threads()
    if threads != _threads:
        set_threads(threads)
        _threads = threads
    dtype = x.dtype
    if dtype not in _TYPES:
        x = x.to(torch.float32)
    return x.contiguous(), dtype


def _product(handle: int) -> Any:
    product = _products.get(handle)
    if product is None:
        raise HalfbyteError(f"no packed weight has the handle {handle}; the model that it was part of is gone")
    return product


def _linear(x: torch.Tensor, product: int, n: int, mode: str = "exact") -> torch.Tensor:
    return run_linear(x, _product(product), mode)


def _linear_fake(x: torch.Tensor, product: int, n: int, mode: str = "exact") -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, mixture: int, n: int, mode: str = "exact"
) -> torch.Tensor:
    return run_experts(x, experts, weights, _product(mixture), mode)


def _experts_fake(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, mixture: int, n: int, mode: str = "exact"
) -> torch.Tensor:
    return x.new_empty((x.shape[0], n))


_library = torch.library.Library("halfbyte", "DEF")
_library.define('linear(Tensor x, int product, int n, str mode="exact") -> Tensor')
_library.define('experts(Tensor x, Tensor experts, Tensor weights, int mixture, int n, str mode="exact") -> Tensor')
for _name, _run, _fake in (("linear", _linear, _linear_fake), ("experts", _experts, _experts_fake)):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"halfbyte::{_name}", _fake, lib=_library)
