"""Rotations of blocks of columns, bit for bit those of halfbyte's formats. Needs torch only."""

from __future__ import annotations

import torch


def unrotated(x: torch.Tensor, size: int, swaps: torch.Tensor | None) -> torch.Tensor:
    """x R^T for x FP32 [..., N, K]: blocks of columns times the Hadamard matrix, or steps of it and of a swap, undone.

    ``swaps`` [..., K/size, steps]: the channel that each step exchanges with the block's first, 255 for no step.
    """
    return _turned(x, size, swaps, inverse=True)


def rotated(x: torch.Tensor, size: int, swaps: torch.Tensor | None) -> torch.Tensor:
    """x R: what inputs of a layer become where its weights stay as they are stored."""
    return _turned(x, size, swaps, inverse=False)


def _turned(x: torch.Tensor, size: int, swaps: torch.Tensor | None, inverse: bool) -> torch.Tensor:
    blocks = x.unflatten(-1, (-1, size))
    if swaps is None:
        return hadamard(blocks).flatten(-2)
    channels = swaps.long()[..., None, :, :]  # the same for all rows
    lanes = torch.arange(size, device=x.device)
    count = swaps.shape[-1]
    for step in reversed(range(count)) if inverse else range(count):
        channel = channels[..., step, None]
        active = channel < size
        if not bool(active.any()):
            continue
        order = torch.where(lanes == 0, channel, torch.where(lanes == channel, 0, lanes)).where(active, lanes)
        order = order.expand_as(blocks)
        turned = hadamard(blocks).gather(-1, order) if inverse else hadamard(blocks.gather(-1, order))
        blocks = torch.where(active, turned, blocks)
    return blocks.flatten(-2)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The last axis times the normalised Hadamard matrix; the order of operations is part of the format."""
    size = x.shape[-1]
    distance = 1
    while distance < size:
        pairs = x.unflatten(-1, (-1, 2, distance))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        distance *= 2
    # the FP32 number nearest to 1 / sqrt(size)
    return x * torch.tensor(size**-0.5, dtype=torch.float32, device=x.device)
