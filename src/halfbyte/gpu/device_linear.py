"""y = x W^T + bias on a device with a weight that stays in 4 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.formats import QuantizedTensor
from halfbyte.gpu.decode_kernel import decode_kernel
from halfbyte.gpu.dense_kernel import dense_kernel
from halfbyte.gpu.device_weight import DeviceWeight
from halfbyte.gpu.word_packing import PackedWords
from halfbyte.kernels.linear import NoKernelError

DECODE_ABOVE = 128
"""Rows of activations above which the weight is decoded once and multiplied by the library of the device."""
_PROGRAMS = 1024
_STAGES = 3


@dataclass(frozen=True)
class Bucket:
    """A launch for so many rows of activations: ``tokens`` per program, ``strips`` of 16 rows and ``warps``."""

    tokens: int
    strips: int = 4
    warps: int = 2


BUCKETS = (Bucket(8), Bucket(16), Bucket(32))


def bucket_of(rows: int) -> Bucket:
    """The launch for a number of rows: the smallest that holds them, or the largest, several times."""
    return next((bucket for bucket in BUCKETS if rows <= bucket.tokens), BUCKETS[-1])


def splits_of(groups: int, batches: int, tiles: int) -> int:
    """Into how many parts K is split: powers of two, so that there are about 1024 programs of four tiles or more."""
    splits = 1
    while splits < 32 and 2 * splits * groups * batches <= _PROGRAMS and 2 * splits * 4 <= tiles:
        splits *= 2
    return splits


class DeviceLinear:
    """A weight [N, K] in 4 bits on a device, and a bias [N] or None.

    NoKernelError for a weight without a product on GPUs. Results do not depend on other rows of the batch within a
    bucket, and never on timing: sums are added in a fixed order. Nothing waits for the device, and the launch depends
    on the shape of x alone, so that calls can be captured in CUDA graphs (after one call outside, which allocates the
    counters).
    """

    def __init__(
        self,
        tensor: QuantizedTensor | PackedWords,
        bias: torch.Tensor | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        if len(tensor.shape) != 2:
            raise NoKernelError(f"a linear layer needs a matrix, not a weight of shape {list(tensor.shape)}")
        self.weight = DeviceWeight(tensor, device)
        self.n, self.k = self.weight.n, self.weight.k
        self.bias = None if bias is None else bias.to(device)
        groups = -(-self.weight.strips // BUCKETS[0].strips)
        batches = -(-DECODE_ABOVE // BUCKETS[0].tokens)
        self.counters = torch.zeros(groups * batches, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.numel() * self.bias.element_size())

    def unpack(self) -> QuantizedTensor:
        """Return the quantized tensor, byte for byte."""
        return self.weight.unpack()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The same as ``run_on_device``."""
        return self.run_on_device(x)

    def run_on_device(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product with x [..., K] as [..., N] in the type of x.

        HalfbyteError for another width or device, NoKernelError for a type that the scales do not fit.
        """
        if x.ndim == 0 or x.shape[-1] != self.k or x.device != self.weight.device:
            raise HalfbyteError(
                f"activations of shape {list(x.shape)} on {x.device} do not fit a weight with {self.k} columns "
                f"on {self.weight.device}"
            )
        rows = x.reshape(-1, self.k)
        if len(rows) > DECODE_ABOVE:
            y = torch.nn.functional.linear(rows, self.decoded(x.dtype), None if self.bias is None else self.bias.to(x))
        else:
            y = self._product(rows.contiguous())
        return y.reshape(*x.shape[:-1], self.n)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        weight, m = self.weight, len(x)
        y = torch.empty((m, self.n), dtype=x.dtype, device=x.device)
        if m == 0:
            return y
        bucket = bucket_of(m)
        groups, batches = -(-weight.strips // bucket.strips), -(-m // bucket.tokens)
        splits = splits_of(groups, batches, weight.tiles)
        parts = y
        if splits > 1:
            parts = torch.empty((splits, batches * bucket.tokens, self.n), dtype=torch.float32, device=x.device)
        dense_kernel[(groups, splits, batches)](
            x, weight.words, weight.scales, weight.factors, y if self.bias is None else self.bias, y, parts,
            self.counters, weight.tables, weight.scale_values, m, self.n, self.k, self.k, weight.strips, weight.tiles,
            **weight.settings(x.dtype, bucket.strips), TOKENS=bucket.tokens, SPLITS=splits,
            BIAS=self.bias is not None, WHOLE=self.k % 128 == 0, STAGES=_STAGES, num_warps=bucket.warps,
        )  # fmt: skip
        return y

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [N, K] decoded on the device."""
        weight = self.weight
        y = torch.empty((self.n, self.k), dtype=dtype, device=weight.device)
        strips = 4
        decode_kernel[(-(-weight.strips // strips), weight.tiles)](
            weight.words, weight.scales, weight.factors, y, weight.tables, weight.scale_values,
            self.n, self.k, weight.strips, weight.tiles, **weight.settings(dtype, strips), num_warps=4,
        )  # fmt: skip
        return y
