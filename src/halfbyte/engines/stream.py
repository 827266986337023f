"""A quantized checkpoint as the stream of dense tensors that an engine's loader takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator

import torch

from halfbyte.checkpoint import Reader
from halfbyte.dialects import quantization_config_of
from halfbyte.errors import CheckpointError
from halfbyte.models import Family, Piece, Weight
from halfbyte.runtime.decode import to_torch
from halfbyte.source.checkpoint import Checkpoint

# values decoded at a time; rows come in multiples of every format's block height and of words of zero points
SLICE = 1 << 24
_ROWS = 1024


def decoded(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    unused: Callable[[str], bool] = lambda name: False,
    packed: Container[str] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a quantized checkpoint under the names of an unquantized one; quantized weights in ``dtype``.

    Values are computed in FP32 and rounded once. Stacks of experts come one expert and projection at a time, large
    matrices are decoded in slices, so that memory stays that of one tensor. ``unused`` says which names the model
    does not want; these are not decoded, and neither are the weights named ``packed``. Scales of activations are left
    out, those of a KV cache are not.
    """
    dialect, source = checkpoint.dialect, checkpoint.inventory.source
    if dialect is None:
        method = quantization_config_of(checkpoint.inventory).get("quant_method")
        state = f"is quantized by {method!r}, which halfbyte does not read" if method else "is not quantized"
        raise CheckpointError(f"{source} {state}; leave the choice of the quantization method to the engine")
    with Reader(checkpoint.inventory) as reader:
        for weight in checkpoint.weights:
            if is_input_scale(checkpoint, weight) or weight.name in packed:
                continue
            if checkpoint.tensors_of(weight) == list(weight.sources):
                for name in weight.sources:
                    if not unused(name):
                        yield name, to_torch(reader.read(name))
                continue
            pieces = experts_of(checkpoint.family, weight)
            if pieces[0].expert is None:
                if not unused(pieces[0].source):
                    kept = weight.name not in checkpoint.formats
                    yield pieces[0].source, _whole(checkpoint, reader, weight, None if kept else dtype)
                continue
            for expert, group in itertools.groupby(pieces, lambda piece: piece.expert):
                wanted = [piece for piece in group if not unused(piece.source)]
                if wanted and expert is not None:
                    values = torch.from_numpy(checkpoint.read(reader, weight, expert, expert + 1)[0])
                    for piece in wanted:
                        yield piece.source, values[slice(*(piece.rows or (None,)))].to(dtype)


def is_input_scale(checkpoint: Checkpoint, weight: Weight) -> bool:
    """Whether a weight is a calibrated scale of activations."""
    return checkpoint.dialect is not None and weight.name.endswith(checkpoint.dialect.activations.endings)


def experts_of(family: Family, weight: Weight) -> tuple[Piece, ...]:
    """A stack's projections, expert by expert, as the family spells them; the weight itself where it has no spelling.

    Stacks whose unquantized form is turned or interleaved have no such spelling: engines want them whole.
    """
    if weight.pieces[0].expert is not None or len(weight.shape) != 3 or weight.interleaved or family.transposed:
        return weight.pieces
    for fused, layout in family.data.experts.items():
        ending = fused.replace("{layer}", str(weight.layer))
        if weight.name.endswith(ending):
            start = weight.name.removesuffix(ending)
            spelled = [start + part.replace("{layer}", str(weight.layer)) for part in layout.parts.values()]
            rows: list[tuple[int, int] | None] = [(first, stop) for _, first, stop in weight.row_parts]
            return tuple(
                Piece(name.replace("{expert}", str(expert)), expert, part)
                for expert in range(weight.shape[0])
                for name, part in zip(spelled, rows or [None], strict=True)
            )
    return weight.pieces


def _whole(checkpoint: Checkpoint, reader: Reader, weight: Weight, dtype: torch.dtype | None) -> torch.Tensor:
    """A weight in slices of bounded size, each rounded before the next is decoded; None keeps the stored type."""
    if dtype is None:
        return to_torch(checkpoint.read(reader, weight))
    tensor = torch.empty(weight.shape, dtype=dtype)
    step = max(1, SLICE // max(1, tensor[0].numel()))
    if len(weight.shape) == 2:
        step = -(-step // _ROWS) * _ROWS
    for first in range(0, weight.shape[0], step):
        stop = min(first + step, weight.shape[0])
        tensor[first:stop] = torch.from_numpy(checkpoint.read(reader, weight, first, stop))
    # MXFP4 of gpt-oss lies as [E, N, K], its unquantized experts do not
    return tensor.mT.contiguous() if tensor.ndim == 3 and checkpoint.family.transposed else tensor
