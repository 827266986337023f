"""Quantized weights of any dialect as products that run: cut, joined and packed, and never decoded.

A runtime reads a weight with ``Checkpoint.read_quantized`` (codes and scales, whatever the dialect), or makes one of
tensors that an engine has loaded with ``tensor_of``. It may cut the weight for tensor parallelism (``rows_of``,
``columns_of``), and packs it:

    tensor = checkpoint.read_quantized(reader, weight)          # [N, K] or a stack [E, N, K]
    part = rows_of(tensor, 0, 512)                              # N-split; columns_of for a K-split
    layer = pack_linear([q, k, v], bias)                        # one product, results side by side
    mixture = pack_experts(gate_up, down, activation="silu")
    head = pack_dense(bf16_matrix)                              # a weight that is kept

Rotated formats rotate activations within the product. ``halfbyte.runtime.ops`` runs all of them on torch tensors.
NoKernelError where there is no compiled product: decode the weight instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import FormatError
from halfbyte.formats import Format, QuantizedTensor
from halfbyte.kernels.linear import NoKernelError, PackedDense, PackedExperts, PackedLinear, has_kernel
from halfbyte.kernels.linear_layout import NativeProduct

__all__ = [
    "ARRAYS",
    "NoKernelError",
    "PackedDense",
    "PackedExperts",
    "PackedLinear",
    "PackedRows",
    "columns_of",
    "has_kernel",
    "join_rows",
    "pack_dense",
    "pack_experts",
    "pack_linear",
    "parts_of",
    "rows_of",
    "tensor_of",
]

Array = NDArray[Any]
ARRAYS = tuple(f.name for f in fields(QuantizedTensor) if f.name not in ("format", "shape"))
"""The arrays that a quantized tensor may have."""
_OF_MATRIX = ("global_scale", "global_scale_inv", "rotation")


def parts_of(tensor: QuantizedTensor) -> dict[str, Array]:
    """Return the arrays of a tensor by name; of a global scale the stored one, multiplier or divisor, alone."""
    names = [name for name in ARRAYS if name != "global_scale" or tensor.global_scale_inv is None]
    return {name: np.asarray(getattr(tensor, name)) for name in names if getattr(tensor, name) is not None}


def tensor_of(fmt: Format, parts: Mapping[str, Array]) -> QuantizedTensor:
    """Return the tensor of a format whose arrays are these; the inverse of ``parts_of``.

    FormatError where an array is missing or does not fit the others.
    """
    arrays = dict(parts)
    codes = arrays["codes"]
    shape = (*codes.shape[:-1], codes.shape[-1] * 8 // fmt.bits)
    if "global_scale_inv" in arrays:
        arrays["global_scale"] = np.asarray(np.float32(1) / arrays["global_scale_inv"])
    for name, (_, wanted) in fmt.parts(shape).items():
        held = arrays.get(name)
        if (held is None and name != "rotation") or (held is not None and held.shape != wanted):
            there = "missing" if held is None else f"{list(held.shape)}"
            raise FormatError(f"{name} of a {fmt.name} weight {list(shape)} must be {list(wanted)}, and it is {there}")
    return QuantizedTensor(fmt, shape, **arrays)


def rows_of(tensor: QuantizedTensor, first: int, stop: int) -> QuantizedTensor:
    """Return rows first..stop of each matrix; FormatError unless they begin and end at blocks of rows."""
    count, height = tensor.shape[-2], tensor.format.block[0]
    _check_cut("rows", first, stop, count, height, tensor)
    shape = (*tensor.shape[:-2], stop - first, tensor.shape[-1])

    def cut(name: str, array: Array) -> Array:
        if name in _OF_MATRIX or (name != "codes" and height < 0):
            return array
        per = 1 if name == "codes" else height
        return np.ascontiguousarray(array[..., first // per : -(-stop // per), :])

    return _with(tensor, shape, {name: cut(name, array) for name, array in parts_of(tensor).items()})


def columns_of(tensor: QuantizedTensor, first: int, stop: int) -> QuantizedTensor:
    """Return columns first..stop of each matrix; FormatError unless they begin and end at blocks of columns."""
    count, width, bits = tensor.shape[-1], tensor.format.block[1], tensor.format.bits
    _check_cut("columns", first, stop, count, width, tensor)
    if first * bits % 8 or stop * bits % 8:
        raise FormatError(f"columns {first} to {stop} of a {tensor.format.name} weight do not begin and end at bytes")
    shape = (*tensor.shape[:-1], stop - first)

    def cut(name: str, array: Array) -> Array:
        if name == "codes":
            return np.ascontiguousarray(array[..., first * bits // 8 : stop * bits // 8])
        if name in ("global_scale", "global_scale_inv") or width < 0:
            return array
        blocks = slice(first // width, -(-stop // width))
        return np.ascontiguousarray(array[..., blocks, :] if name == "rotation" else array[..., blocks])

    return _with(tensor, shape, {name: cut(name, array) for name, array in parts_of(tensor).items()})


def join_rows(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor | None:
    """Return one tensor with the rows of several, in order.

    None where they cannot be one: of different formats, global scales, rotations or columns, or cut within blocks.
    """
    head = tensors[0]
    if len(tensors) == 1:
        return head
    parts = [parts_of(tensor) for tensor in tensors]
    height = head.format.block[0]
    alike = all(
        t.format == head.format
        and t.shape[:-2] == head.shape[:-2]
        and t.shape[-1] == head.shape[-1]
        and p.keys() == parts[0].keys()
        for t, p in zip(tensors, parts, strict=True)
    )
    if not alike or (height > 1 and any(t.shape[-2] % height for t in tensors[:-1])):
        return None
    arrays: dict[str, Array] = {}
    for name in parts[0]:
        if name in _OF_MATRIX or (name != "codes" and height < 0):
            if any(not np.array_equal(p[name], parts[0][name]) for p in parts):
                return None
            arrays[name] = parts[0][name]
        else:
            arrays[name] = np.concatenate([p[name] for p in parts], axis=-2)
    return _with(head, (*head.shape[:-2], sum(t.shape[-2] for t in tensors), head.shape[-1]), arrays)


class PackedRows:
    """Several products of the same activations, whose results lie side by side: one that cannot be joined."""

    def __init__(self, products: Sequence[PackedLinear]) -> None:
        self.products = tuple(products)
        self.k = products[0].k
        self.n = sum(product.n for product in products)
        if any(product.k != self.k for product in products):
            raise FormatError(f"weights with {sorted({p.k for p in products})} columns take no common activations")

    def run(self, product: NativeProduct) -> None:
        """Run all of them on raw addresses, which are not checked."""
        start, size = product.y, 4 if product.y_type == 2 else 2
        for part in self.products:
            product.y = start
            part.run(product)
            start += part.n * size

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(product.nbytes for product in self.products)


def pack_linear(tensors: Sequence[QuantizedTensor], bias: Array | None = None) -> PackedLinear | PackedRows:
    """Pack matrices that take the same activations into one product: y = x [W1; W2; ...]^T + bias.

    They become one matrix where their format and global scale agree, and else run one after the other. ``bias``
    [N1 + N2 + ...] or None. NoKernelError where a format has no compiled product.
    """
    whole = join_rows(tensors)
    if whole is not None:
        return PackedLinear(whole, bias)
    ends = np.cumsum([tensor.shape[0] for tensor in tensors])
    biases = [None] * len(tensors) if bias is None else np.split(bias, ends[:-1])
    return PackedRows([PackedLinear(tensor, part) for tensor, part in zip(tensors, biases, strict=True)])


def pack_dense(values: Array, bias: Array | None = None) -> PackedDense:
    """Wrap a kept matrix [N, K] of BF16, FP16 or FP32, which is not copied and must stay alive."""
    return PackedDense(values, bias)


def pack_experts(gate_up: QuantizedTensor, down: QuantizedTensor, **settings: Any) -> PackedExperts:
    """Pack a mixture of experts: ``gate_up`` [E, 2W, K] (gates first, or ``interleaved``) and ``down`` [E, N, W].

    ``settings`` are those of PackedExperts: biases, activation, gated, interleaved, limit, alpha. Cut for tensor
    parallelism, ``gate_up`` takes the same rows of both halves (``join_rows`` of two ``rows_of``) and ``down`` these
    columns.
    """
    return PackedExperts(gate_up, down, **settings)


def _check_cut(what: str, first: int, stop: int, count: int, block: int, tensor: QuantizedTensor) -> None:
    inside = 0 <= first < stop <= count
    if not inside or (block > 1 and (first % block or (stop % block and stop != count))):
        shape = list(tensor.shape)
        raise FormatError(
            f"{what} {first} to {stop} cannot be cut from a {tensor.format.name} weight {shape}, whose blocks have "
            f"{block} {what}"
        )


def _with(tensor: QuantizedTensor, shape: tuple[int, ...], arrays: dict[str, Any]) -> QuantizedTensor:
    return replace(tensor, shape=shape, **arrays)
