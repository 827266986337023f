"""Hidden states of all samples on their way through a model: embedded, read and written in batches, checked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from halfbyte.calibrate.layerwise import Arguments, LayerwiseModel, as_numpy, enter, run_layer
from halfbyte.calibrate.samples import Samples, Shape
from halfbyte.calibrate.states import States
from halfbyte.errors import MeasurementError
from halfbyte.evaluate.finite import is_finite, refusal

Calls = dict[Shape, list[Arguments]]
"""What every layer is called with beside hidden states, alike for batches of one shape."""


def embed(
    blocks: LayerwiseModel, samples: Samples, files: Sequence[States], name: str, also: Sequence[Shape] = ()
) -> Calls:
    """Embed all samples into each of ``files`` (none: an earlier run has), and return what layers are called with.

    ``also``: shapes beside those of the batches. MeasurementError where embeddings of the model ``name`` are not
    finite.
    """
    ids = torch.tensor(samples.tokens, device=blocks.device)
    calls: Calls = {}
    with blocks.embedding(ids):
        for shape in also:
            _, calls[shape] = enter(blocks, ids[: shape[0]])
        for rows, shape in samples.batches():
            if not files and shape in calls:
                continue
            first = rows.start // shape[1]
            hidden, calls[shape] = enter(blocks, ids[first : first + shape[0]])
            if not is_finite(hidden):
                raise MeasurementError(f"the embeddings of {name} hold a NaN or an infinity; repair the checkpoint")
            for states in files:
                states.write(rows, as_numpy(hidden))
    return calls


def read_batch(blocks: LayerwiseModel, states: States, rows: slice, shape: Shape) -> torch.Tensor:
    """Hidden states [batch, length, D] from their file, as the model's layers take them."""
    return torch.from_numpy(states.read(rows)).to(blocks.device, blocks.dtype).view(*shape, -1)


def check_output(
    blocks: LayerwiseModel, name: str, layer: nn.Module, hidden: torch.Tensor, call: Arguments, output: torch.Tensor
) -> None:
    """MeasurementError where a layer of the model ``name`` gives what is not finite; it names the part that does."""
    if not is_finite(output):
        again = partial(run_layer, layer, hidden, call)
        raise MeasurementError(refusal(name, layer, again, blocks.name_of(layer)))


def output_matrix(blocks: LayerwiseModel) -> tuple[str, nn.Module, nn.Module] | None:
    """The name of the output matrix's parameter, its module, and the norm before it; None where there is neither."""
    head, norm = blocks.model.get_output_embeddings(), getattr(blocks.decoder, "norm", None)
    if head is None or norm is None:
        return None
    name = next(n for n, module in blocks.model.named_modules() if module is head)
    return f"{name}.weight", head, norm
