"""Products with packed weights as torch operators for vLLM's compiled graphs.

``torch.ops.halfbyte`` takes a product's number as a constant. A graph with constants is compiled once per layer, and a
cached one would name the products of another process; these operators take the number in a tensor, as vLLM's graphs
take weights.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch

from halfbyte.checkpoint import numpy_dtype
from halfbyte.runtime.decode import to_torch
from halfbyte.runtime.ops import handle_of, run_experts, run_linear

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_products: WeakValueDictionary[int, Any] = WeakValueDictionary()


def number_of(product: Any) -> torch.Tensor:
    """Return the tensor that stands for a product, which somebody else keeps."""
    number = handle_of(product)
    _products[number] = product
    # on a GPU, too, the number stays where Python reads it without waiting for the device
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def multiply(x: torch.Tensor, number: torch.Tensor, product: Any, mode: str) -> torch.Tensor:
    """Return x W^T for x [..., K]; an operator in graphs that are being compiled."""
    if torch.compiler.is_compiling():
        return torch.ops.halfbyte_vllm.linear(x, number, product.n, mode)
    return run_linear(x, product, mode)


def mix(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, number: torch.Tensor, product: Any, mode: str
) -> torch.Tensor:
    """Return the weighted sums of the experts [T, slots] of x [T, K]; an operator in compiled graphs."""
    if torch.compiler.is_compiling():
        return torch.ops.halfbyte_vllm.experts(x, experts, weights, number, product.n, mode)
    return run_experts(x, experts, weights, product, mode)


def look_up(ids: torch.Tensor, number: torch.Tensor, product: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of a packed matrix [N, K] for integers [...], as [..., K]; an operator in compiled graphs."""
    if torch.compiler.is_compiling():
        return torch.ops.halfbyte_vllm.rows(ids, number, product.k, dtype)
    return _rows_of(ids, product, dtype)


def _rows_of(ids: torch.Tensor, product: Any, dtype: torch.dtype) -> torch.Tensor:
    return to_torch(product.rows(ids.numpy(), numpy_dtype(_NAMES[dtype])))


def _linear(x: torch.Tensor, product: torch.Tensor, n: int, mode: str) -> torch.Tensor:
    return run_linear(x, _products[int(product)], mode)


def _linear_fake(x: torch.Tensor, product: torch.Tensor, n: int, mode: str) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, mixture: torch.Tensor, n: int, mode: str
) -> torch.Tensor:
    return run_experts(x, experts, weights, _products[int(mixture)], mode)


def _experts_fake(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, mixture: torch.Tensor, n: int, mode: str
) -> torch.Tensor:
    return x.new_empty((x.shape[0], n))


def _rows(ids: torch.Tensor, product: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    return _rows_of(ids, _products[int(product)], dtype)


def _rows_fake(ids: torch.Tensor, product: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    return ids.new_empty((*ids.shape, k), dtype=dtype)


_library = torch.library.Library("halfbyte_vllm", "DEF")
_library.define("linear(Tensor x, Tensor product, int n, str mode) -> Tensor")
_library.define("experts(Tensor x, Tensor experts, Tensor weights, Tensor mixture, int n, str mode) -> Tensor")
_library.define("rows(Tensor ids, Tensor product, int k, ScalarType dtype) -> Tensor")
for _name, _run, _fake in (
    ("linear", _linear, _linear_fake),
    ("experts", _experts, _experts_fake),
    ("rows", _rows, _rows_fake),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"halfbyte_vllm::{_name}", _fake, lib=_library)
