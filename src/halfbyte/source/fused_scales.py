"""Global scales of weights that engines fuse, and which must therefore be one number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from halfbyte.checkpoint import Reader
from halfbyte.source.checkpoint import Checkpoint


class FusedScale(NamedTuple):
    """The scale of one weight or of one projection of an expert: its group, where it stands, and its value."""

    group: str
    weight: str
    tensor: str
    value: float


def fused_scales(checkpoint: Checkpoint, reader: Reader) -> Iterator[FusedScale]:
    """Read the scales of matrices of a fusion group, and of the projections that an expert's matrix consists of.

    Only of formats in which one number scales a whole matrix; tensors that are missing are passed over.
    """
    dialect, tensors = checkpoint.dialect, checkpoint.inventory.tensors
    for weight in checkpoint.weights if dialect else ():
        fmt = checkpoint.formats.get(weight.name)
        if dialect is None or fmt is None or not fmt.shares_scale:
            continue
        part = "global_scale" if fmt.has_global_scale else "scales"
        stacked = len(weight.shape) == 3
        if weight.group is None and not (stacked and len(weight.row_parts) > 1):
            continue
        for output in dialect.spelling.outputs(weight, fmt):
            if output.part == part and output.name in tensors and (output.expert is not None) == stacked:
                value = reader.read(output.name).reshape(-1)
                if value.size == 1:
                    group = weight.group or weight.name
                    yield FusedScale(
                        f"{group}.{output.expert}" if stacked else group, weight.name, output.name, float(value[0])
                    )
