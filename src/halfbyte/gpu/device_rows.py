"""Rows of a packed matrix on a device, as embeddings look them up, by operations of torch."""

from __future__ import annotations

import torch

from halfbyte.gpu.device_weight import DeviceWeight


def rows_of_weight(weight: DeviceWeight, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of a matrix [N, K] as [..., K] for integers [...], decoded in FP32 and rounded to ``dtype``.

    Nothing waits for the device, so indices are not checked: one that is no row's gives any row or torch's own error.
    """
    chosen = indices.reshape(-1).to(torch.int64)
    strip, g, r = chosen // 16, chosen % 8, chosen % 16 // 8
    words = weight.words.reshape(weight.strips, weight.tiles, 2, 8, 4, 2, 2)
    held = words[strip, :, :, g, :, r]  # row tile c t h
    scale, table = _scales(weight, strip, g, r)
    index = _indices(held, weight.layout.kind) + 16 * table[..., None, None]
    values = weight.tables.reshape(-1)[index] * scale[..., None, None] * weight.factors[0]
    return values.reshape(len(chosen), -1)[:, : weight.k].to(dtype).reshape(*indices.shape, weight.k)


def _scales(weight: DeviceWeight, strip: torch.Tensor, g: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Scales and tables of the blocks of rows: [rows, tiles, c, t]."""
    layout = weight.layout
    if layout.narrow:
        words = weight.scales.reshape(weight.strips, weight.tiles, 8, 4)[strip, :, g]  # row tile t
        stored = torch.stack([words >> (8 * (r + 2 * c))[:, None, None] & 255 for c in (0, 1)], dim=2).to(torch.int64)
        chosen = stored >> 7 if layout.chooses else torch.zeros_like(stored)
        return weight.scale_values[stored], chosen
    words = weight.scales.reshape(weight.strips, weight.tiles, 2, 8, 4)[strip, :, :, g]
    bits = (words >> (16 * r)[:, None, None, None] & 0xFFFF).to(torch.int32)
    if layout.scale == "bf16":
        values = (bits << 16).view(torch.float32)
    else:
        values = bits.to(torch.int16).view(torch.float16).float()
    return values, torch.zeros_like(bits).to(torch.int64)


def _indices(words: torch.Tensor, kind: str) -> torch.Tensor:
    """Indices [..., 8] of the elements of words, as ``word_packing`` lays them out."""
    e = torch.arange(8, device=words.device)
    bits = words[..., None].to(torch.int64)
    if kind == "mirrored":
        sign = bits >> torch.where(e < 4, 8 * e + 7, 8 * e - 29) & 1
        return (bits >> 4 * e & 7 ^ 4) | sign << 3
    if kind == "table":
        return bits >> 4 * e & 15 ^ 4
    return bits >> (4 * (e // 2) + 16 * (e % 2)) & 15
