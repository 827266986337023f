"""What a dialect plans and writes: tensors of the output, parts of them, and how they lie in files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from halfbyte.checkpoint import Layout, build_header
from halfbyte.errors import CheckpointError

Array = NDArray[Any]


class UnequalScalesError(CheckpointError):
    """Projections that one weight holds have different scales, where the weight has room for one."""


class OutputTensor(NamedTuple):
    """One tensor of the output, and which part of which region of a weight it holds.

    ``part`` is an array of QuantizedTensor (``codes``, ``scales``, ``global_scale``, ``offsets``) or the
    dialect's own word. ``expert`` is the leading index it belongs to, None for all of them. ``rows`` are the
    weight's rows (first, stop, step) that it holds, None for all. ``rows_per_row``: how many of the weight's
    rows one stored row stands for (1 for codes, 8 for zero points packed in words, 128 for scales of 128x128
    blocks, 0 if rows do not matter). ``constant``: the content, where the plan knows it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: str
    expert: int | None = None
    rows: tuple[int, int, int] | None = None
    rows_per_row: int = 1
    constant: tuple[float, ...] | None = None


class OutputChunk(NamedTuple):
    """Bytes for a planned tensor: ``array`` goes ``start`` elements after its beginning."""

    output: OutputTensor
    start: int
    array: Array


class InputScale(NamedTuple):
    """How a calibrated scale of activations is stored: after the module's name, reciprocal or not, in which shape."""

    ending: str
    global_scale_inv: bool
    shape: tuple[int, ...]


class CacheScales(NamedTuple):
    """How scales of an FP8 KV cache are stored: after an attention module's name for keys and for values, as which
    type and shape (multipliers), and the ``kv_cache_scheme`` that says so.
    """

    endings: tuple[str, str]
    dtype: str
    shape: tuple[int, ...]
    scheme: dict[str, Any]


class Container:
    """How an output's tensors lie in its files: safetensors, unless a dialect brings its own.

    ``overhead``: bytes of the first file that no tensor accounts for.
    """

    overhead = 0

    def name(self, number: int, count: int) -> str:
        """The name of file ``number`` (from 0) of ``count``."""
        return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def layout(self, number: int, count: int, outputs: Sequence[OutputTensor], total: int) -> Layout:
        """A file with these tensors in this order; ``total`` tensors lie in all files together."""
        return build_header([(o.name, o.dtype, o.shape) for o in outputs])
