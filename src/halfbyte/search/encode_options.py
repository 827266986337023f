"""What ``encode`` and ``gptq`` take beside weight, format and search: one frozen object, or its fields by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

from numpy.typing import ArrayLike

from halfbyte.formats import QuantizedTensor
from halfbyte.kernels import ErrorStats
from halfbyte.search.output_metric import PreparedOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack

Mode = Literal["in_loop", "local_hessian", "compensated", "static"]
Order = Literal["none", "act"]
Refine = Literal["descent"]


@dataclass(frozen=True)
class ScaleOptions:
    """How global scales come about, and who counts errors.

    ``global_scale`` FP32 [...] sets them (tensors that an engine fuses must share one), ``global_scale_inv`` FP32 [...]
    sets them as the reciprocals that some checkpoints store, ``amax`` FP32 [...] derives them where the weight is a
    slice of a larger tensor or fusion group, and ``power_of_two`` rounds them up to powers of two. The error of the
    result is added to ``stats``.
    """

    global_scale: ArrayLike | None = None
    global_scale_inv: ArrayLike | None = None
    amax: ArrayLike | None = None
    power_of_two: bool = False
    stats: ErrorStats | None = None


@dataclass(frozen=True)
class EncodeOptions(ScaleOptions):
    """``importance`` [K] or [..., K], non-negative, weights the squared error of each column.

    ``rotation`` uint8 [..., K/B, steps]: steps of a format in rotated space, by default the Hadamard matrix.
    """

    importance: ArrayLike | None = None
    rotation: ArrayLike | None = None


@dataclass(frozen=True)
class GptqOptions(ScaleOptions):
    """``mode``, ``order`` and ``damping`` as ``halfbyte.search.gptq.gptq`` explains them.

    ``given``: a tensor of the format whose scales are taken as they are, in mode ``static``. ``output``: the mean or
    sum of g gᵀ over the gradients at the outputs, [N, N] or one for each leading index, or what
    ``halfbyte.search.output_metric.prepare_output`` made of it (a sequence of them for a stack, None where a matrix has
    none); rows then take the errors of earlier rows. ``refine`` "descent": afterwards codes move, with their scales
    fixed, as long as the weighted error falls.
    """

    mode: Mode = "in_loop"
    order: Order = "none"
    damping: float = 0.01
    given: QuantizedTensor | None = None
    output: ArrayLike | PreparedOutput | Sequence[PreparedOutput | None] | None = None
    refine: Refine | None = None


class ScaleKeywords(TypedDict, total=False):
    """The fields of ``ScaleOptions`` as keyword arguments."""

    global_scale: ArrayLike | None
    global_scale_inv: ArrayLike | None
    amax: ArrayLike | None
    power_of_two: bool
    stats: ErrorStats | None


class EncodeKeywords(ScaleKeywords, total=False):
    """The fields of ``EncodeOptions`` as keyword arguments, without the importance."""

    rotation: ArrayLike | None


class GptqKeywords(ScaleKeywords, total=False):
    """The fields of ``GptqOptions`` as keyword arguments."""

    mode: Mode
    order: Order
    damping: float
    given: QuantizedTensor | None
    output: ArrayLike | PreparedOutput | Sequence[PreparedOutput | None] | None
    refine: Refine | None
