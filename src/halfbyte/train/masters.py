"""Master weights: where training starts."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import HalfbyteError
from halfbyte.formats import QuantizedTensor
from halfbyte.train.rounding import Floats, in_block_space, round_given

Start = Literal["cell", "decoded", "original"]
STARTS: tuple[Start, ...] = ("cell", "decoded", "original")
REACH = np.float32(0.9)
"""How far an original weight may be from its decoded value: this part of the way to the middle of two values."""
# another model's weights have a cosine near 0, those of the coarsest formats and of long GPTQ chains above 0.8
_STRANGER = 0.4


def master_of(name: str, tensor: QuantizedTensor, original: NDArray[np.float32] | None, start: Start) -> Floats:
    """The master FP32 [..., N, K] of a quantized weight, in the space of its blocks.

    ``decoded``: the values of the codes. ``original``: the unquantized weight, whose codes may be others. ``cell``:
    the unquantized weight, pulled into the cell of its code: the codes stay, and the master is as near to the weight
    as they allow. HalfbyteError where ``original`` is no weight that these codes were made of, or where codes are not
    those that rounding gives.
    """
    decoded = tensor.format.to_plain(tensor).decode()
    if start == "decoded" or original is None:
        master = decoded
    else:
        master = in_block_space(tensor, original)
        _check_related(name, decoded, master)
        master = _pulled(tensor, decoded, master) if start == "cell" else np.array(master)
    if start != "original" and not np.array_equal(round_given(tensor, master).values, tensor.decode()):
        raise HalfbyteError(
            f"{name} holds codes that {tensor.format.name} never writes, so training cannot start from them; quantize "
            "its source again"
        )
    return master


def _pulled(tensor: QuantizedTensor, decoded: Floats, original: Floats) -> Floats:
    """The original weight, or where it lies outside the cell of its code, a value well inside."""
    first, last = tensor.format.cells(tensor)
    return np.clip(original, decoded + REACH * (first - decoded), decoded + REACH * (last - decoded))


def _check_related(name: str, decoded: Floats, original: Floats) -> None:
    norms = np.sqrt(float(np.vdot(original, original)) * float(np.vdot(decoded, decoded)))
    if not float(np.vdot(original, decoded)) >= _STRANGER * norms:
        raise HalfbyteError(
            f"{name} of the model is not what the codes of the start were made of; give the model that was quantized, "
            "or start from decoded values (master decoded)"
        )
