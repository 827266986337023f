"""Packed weights on a device, with what every kernel wants to know of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl

from halfbyte.formats import QuantizedTensor
from halfbyte.gpu.device_products import OPERANDS
from halfbyte.gpu.ptx_text import scale_text, word_text
from halfbyte.gpu.table_layout import TableLayout
from halfbyte.gpu.word_packing import PackedWords, pack_words, unpack_words
from halfbyte.kernels.linear import NoKernelError

_SCALES = {"bf16": "bfloat16", "fp16": "float16"}
_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class DeviceWeight:
    """Words, scales and global scales of a weight [N, K] or [experts, N, K] on a device."""

    def __init__(self, tensor: QuantizedTensor | PackedWords, device: torch.device | str) -> None:
        packed = tensor if isinstance(tensor, PackedWords) else pack_words(tensor)
        layout = packed.layout
        self.format, self.layout, self.shape = packed.format, layout, packed.shape
        self.n, self.k = packed.shape[-2:]
        self.count = packed.words.shape[0]
        self.strips, self.tiles = packed.words.shape[1:3]
        self.words = torch.from_numpy(packed.words).to(device)
        self.scales = torch.from_numpy(packed.scales).to(device)
        self.factors = torch.from_numpy(packed.factors).to(device)
        self.tables = torch.from_numpy(layout.values()).to(device)
        self.scale_values = torch.from_numpy(layout.scale_values(packed.format)).to(device)
        # the arrays live on the device alone
        self._description = replace(packed, words=np.empty(0, np.int32), scales=np.empty(0, np.int32))

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.words.device

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = (self.words, self.scales, self.factors, self.tables, self.scale_values)
        return sum(t.numel() * t.element_size() for t in tensors)

    def unpack(self) -> QuantizedTensor:
        """Return the quantized tensor that was packed, byte for byte."""
        words, scales = self.words.cpu().numpy(), self.scales.cpu().numpy()
        return unpack_words(replace(self._description, words=words, scales=scales))

    def settings(self, dtype: torch.dtype, strips: int) -> dict[str, Any]:
        """Constants and options of a kernel for activations of a type.

        NoKernelError for a type that the scales do not fit. CUDA devices decode by machine instructions, others
        (and FP32) by plain operations.
        """
        on_cuda = self.device.type == "cuda" and torch.version.cuda is not None
        return _settings(self.layout, dtype, strips, on_cuda)


@cache  # asked at every product: writing the texts takes 0.1 to 0.2 ms
def _settings(layout: TableLayout, dtype: torch.dtype, strips: int, on_cuda: bool) -> dict[str, Any]:
    if dtype not in _TRITON:
        raise NoKernelError(f"activations on GPUs are BF16, FP16 or FP32, not {dtype}")
    operand = OPERANDS.get(dtype)
    texts = ("", "")
    if operand is not None:  # also where plain operations decode: the same types are refused
        texts = (scale_text(layout, operand), word_text(layout, operand))
    by_instructions = operand is not None and on_cuda
    return {
        "SCALE_TEXT": texts[0] if by_instructions else "",
        "WORD_TEXT": texts[1] if by_instructions else "",
        "KIND": layout.kind,
        "SCALE": _SCALES.get(layout.scale, "byte"),
        "CHOOSES": layout.chooses,
        "DECODE": "asm" if by_instructions else "plain",
        "TYPE": _TRITON[dtype],
        "STRIPS": strips,
        "enable_fp_fusion": True,  # Triton's default changes with its version
    }
