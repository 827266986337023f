"""Packed weights on a device, with what every kernel wants to know of them."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from halfbyte.formats import QuantizedTensor
from halfbyte.gpu.ptx_text import scale_text, word_text
from halfbyte.gpu.table_layout import Operand
from halfbyte.gpu.word_packing import PackedWords, pack_words, unpack_words
from halfbyte.kernels.linear import NoKernelError

_SCALES = {"bf16": "bfloat16", "fp16": "float16"}
_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_OPERANDS: dict[torch.dtype, Operand] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


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
        self._about = packed

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
        return unpack_words(_with_arrays(self._about, words, scales))

    def settings(self, dtype: torch.dtype, strips: int) -> dict[str, Any]:
        """The constants of a kernel for activations of a type; NoKernelError for one that the scales do not fit.

        CUDA devices decode by machine instructions, others (and FP32) by plain operations.
        """
        if dtype not in _TRITON:
            raise NoKernelError(f"activations on GPUs are BF16, FP16 or FP32, not {dtype}")
        operand = _OPERANDS.get(dtype)
        texts = ("", "")
        by_instructions = operand is not None and self.device.type == "cuda" and torch.version.cuda is not None
        if operand is not None:
            texts = (scale_text(self.layout, operand), word_text(self.layout, operand))
        return {
            "SCALE_TEXT": texts[0] if by_instructions else "",
            "WORD_TEXT": texts[1] if by_instructions else "",
            "KIND": self.layout.kind,
            "SCALE": _SCALES.get(self.layout.scale, "byte"),
            "CHOOSES": self.layout.chooses,
            "DECODE": "asm" if by_instructions else "plain",
            "TYPE": _TRITON[dtype],
            "STRIPS": strips,
        }


def _with_arrays(packed: PackedWords, words: Any, scales: Any) -> PackedWords:
    about = {name: getattr(packed, name) for name in packed.__dataclass_fields__}
    return PackedWords(**{**about, "words": words, "scales": scales})
