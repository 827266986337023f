"""AWQ smoothing: columns that meet large activations grow before quantizing, and the norm before them shrinks.

With columns times s and the norm (or the rows of the previous projection) divided by s a model computes the
same, but the quantizer now spends its error where activations are small. Method: Lin et al., arXiv 2306.00978;
here the scale comes from an importance file and is chosen with the real quantizer in the loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import FormatError
from halfbyte.formats import Format
from halfbyte.formats.arrays import Array, Floats
from halfbyte.search.encode import encode

ALPHAS = tuple(round(0.05 * i, 2) for i in range(17))
"""Exponents tried on the mean squared activation; 0 is no smoothing, 0.5 scales by the root mean square."""
_FLOOR = 1e-8


@dataclass
class Consumer:
    """A matrix or stack [..., N, K] that reads the scaled channels; ``weight`` may hold some of its rows only.

    ``importance``: mean squared activation FP32 [K] or [E, K], or None for one that was never measured;
    ``counts`` [E]: tokens per expert. ``experts`` [E]: which of the model's experts these are, None for all.
    ``format`` None means that the matrix is kept in its own dtype. ``weighted``: its quantizer weighs errors by
    importance too. Matrices with the same ``share`` have one global scale.
    """

    name: str
    weight: Array
    importance: Floats | None
    format: Format | None
    search: str = "sweep"
    counts: NDArray[np.int64] | None = None
    share: str | None = None
    weighted: bool = False
    experts: NDArray[np.int64] | None = None


@dataclass
class SmoothingChoice:
    """The scale of a group, FP32 [K] or [E, K], or None where no smoothing is best.

    ``losses`` by exponent: the consumers' mean weighted error, each relative to its own output's energy.
    ``norm`` is the new norm in its own dtype; the scale is the one that this rounded norm needs, so quantized
    consumers see no rounding of it, and ``asked`` the one before that. ``rounding`` is the relative weighted error
    of kept consumers by rounding.
    """

    alpha: float
    scale: Floats | None
    losses: dict[float, float]
    norm: Array | None = None
    rounding: dict[str, float] = field(default_factory=dict)
    asked: Floats | None = None

    @property
    def loss(self) -> float:
        """The loss of what was chosen."""
        return self.losses[self.alpha]

    @property
    def unfolded(self) -> float:
        """The consumers' loss without smoothing."""
        return self.losses[0.0]


def choose_scale(
    consumers: Sequence[Consumer],
    norm: Array | None = None,
    *,
    zero_centred: bool = False,
    per_expert: bool = False,
    alphas: Sequence[float] = ALPHAS,
    importance: Floats | None = None,
) -> SmoothingChoice:
    """The exponent, and with it the scale, of the least importance-weighted error over all consumers.

    ``norm`` [K] is the norm's weight, None where rows of a projection are divided instead; ``per_expert`` gives
    every expert a scale of its own. ``importance`` [K] or [E, K] is what the scale is made from (``shared``),
    where consumers hold only some of their experts. Without importance or quantized consumers the choice is no
    smoothing. FormatError for shapes that do not fit.
    """
    for consumer in consumers:
        _check(consumer)
    if importance is None:
        importance = shared([(c.importance, c.counts) for c in consumers], per_expert)
    if importance is None or not any(c.format for c in consumers):
        return SmoothingChoice(0.0, None, {0.0: _loss(consumers, None, importance)})
    losses: dict[float, float] = {}
    best = SmoothingChoice(0.0, None, losses)
    for alpha in sorted({0.0, *alphas}):
        asked, rounded = scale_from(importance, alpha), None
        scale = asked
        if norm is not None:
            rounded, scale = smooth_norm(norm, asked, zero_centred)
        losses[alpha] = _loss(consumers, scale if alpha else None, importance)
        if alpha and losses[alpha] < best.loss:
            best = SmoothingChoice(alpha, scale, losses, rounded, asked=asked)
    if best.scale is not None:
        best.rounding = {c.name: _rounding(c, best.scale, importance) for c in consumers if c.format is None}
    return best


def scale_from(importance: Floats, alpha: float) -> Floats:
    """importance ** alpha over the root of its maximum times its minimum, [K] or [E, K]; all ones for alpha 0."""
    values = importance.astype(np.float64)
    largest = values.max(axis=-1, keepdims=True)
    values = np.maximum(values / np.where(largest > 0, largest, 1), _FLOOR) ** alpha
    values /= np.sqrt(values.max(axis=-1, keepdims=True) * values.min(axis=-1, keepdims=True))
    return values.astype(np.float32)


def smooth_norm(norm: Array, scale: Floats, zero_centred: bool) -> tuple[Array, Floats]:
    """A norm's weight [K] over the scale, rounded to its dtype, and the scale [K] that this amounts to exactly.

    A zero-centred weight stands for 1 + w, so w' = (1 + w) / s - 1. Channels whose gain is zero stay.
    """
    offset = 1.0 if zero_centred else 0.0
    gain = norm.astype(np.float64) + offset
    wanted = gain / scale - offset
    rounded = wanted.astype(norm.dtype)
    # near -1 a zero-centred weight is coarse: a gain must not become zero
    lost = (rounded.astype(np.float64) + offset == 0) & (gain != 0)
    away = np.nextafter(rounded, np.where(wanted > -offset, 1, -2).astype(norm.dtype) * np.ones_like(rounded))
    rounded = np.where(lost, away, rounded)
    new = rounded.astype(np.float64) + offset
    usable = (gain != 0) & (new != 0) & np.isfinite(new)
    exact = np.divide(gain, new, out=np.ones_like(gain), where=usable)
    rounded = np.where(usable, rounded, norm).astype(norm.dtype)
    return rounded, exact.astype(np.float32)


def smooth_columns(weight: Array, scale: Floats) -> Floats:
    """The columns of a matrix [..., N, K] times the scale [K] or [E, K], in FP32."""
    return weight.astype(np.float32) * scale[..., None, :]


def smoothed_importance(importance: Floats | None, scale: Floats) -> Floats | None:
    """Mean squared activations once they are divided by the scale."""
    return None if importance is None else (importance / np.square(scale)).astype(np.float32)


def weighted_error(weight: Floats, decoded: Floats, importance: Floats, counts: Array | None = None) -> float:
    """Sum over rows and columns of importance times squared difference, experts weighted by their tokens."""
    squares = np.square(decoded - weight, dtype=np.float32).sum(axis=-2, dtype=np.float64)
    per_matrix = (squares * importance).sum(axis=-1)
    return float((per_matrix if counts is None else per_matrix * _share(counts)).sum())


def _loss(consumers: Sequence[Consumer], scale: Floats | None, importance: Floats | None) -> float:
    """Mean over the consumers of weighted error / weighted energy, after scaling and quantizing."""
    scales = [_of_experts(c, scale) for c in consumers]
    scaled = [
        c.weight.astype(np.float32) if s is None else smooth_columns(c.weight, s)
        for c, s in zip(consumers, scales, strict=True)
    ]
    amax: dict[str, float] = {}
    for consumer, weight in zip(consumers, scaled, strict=True):
        if consumer.share:
            amax[consumer.share] = max(amax.get(consumer.share, 0.0), float(np.abs(weight).max(initial=0)))
    total = 0.0
    for consumer, weight, factors in zip(consumers, scaled, scales, strict=True):
        seen = _seen(consumer, importance)
        now = seen if factors is None else np.asarray(smoothed_importance(seen, factors))
        decoded = _stored(consumer, weight, now if consumer.weighted else None, amax.get(consumer.share or ""))
        energy = weighted_error(weight, np.zeros_like(weight), now, consumer.counts)
        total += weighted_error(weight, decoded, now, consumer.counts) / energy if energy else 0.0
    return total / max(len(consumers), 1)


def _stored(consumer: Consumer, weight: Floats, importance: Floats | None, amax: float | None) -> Floats:
    """What a reader of the output will see."""
    if consumer.format is None:
        return weight.astype(consumer.weight.dtype).astype(np.float32)
    return encode(weight, consumer.format, consumer.search, importance, amax=amax).decode()


def _rounding(consumer: Consumer, whole: Floats, importance: Floats) -> float:
    scale = np.asarray(_of_experts(consumer, whole))
    weight = smooth_columns(consumer.weight, scale)
    now = np.asarray(smoothed_importance(_seen(consumer, importance), scale))
    energy = weighted_error(weight, np.zeros_like(weight), now, consumer.counts)
    rounded = weight.astype(consumer.weight.dtype).astype(np.float32)
    return weighted_error(weight, rounded, now, consumer.counts) / energy if energy else 0.0


def _of_experts(consumer: Consumer, scale: Floats | None) -> Floats | None:
    """The rows of a scale [E, K] that belong to the consumer's experts."""
    if scale is None or scale.ndim == 1 or consumer.experts is None:
        return scale
    return scale[consumer.experts]


def _seen(consumer: Consumer, importance: Floats | None) -> Floats:
    """The consumer's own importance, else the group's, else one for every column."""
    if consumer.importance is not None:
        return consumer.importance
    of_group = _of_experts(consumer, importance)
    return np.ones(consumer.weight.shape[-1], np.float32) if of_group is None else of_group


def shared(entries: Iterable[tuple[Floats | None, Array | None]], per_expert: bool) -> Floats | None:
    """One importance for a group's scale, from its consumers' importance and counts; None where nothing is known.

    Matrices of one group read the same activations, so their importance is the same but for rounding. A stack
    sees only routed tokens, so it speaks for the group only where no matrix does, by its token-weighted mean.
    """
    given = [(values, counts) for values, counts in entries if values is not None]
    if per_expert:
        return given[0][0] if given else None
    whole = [values for values, _ in given if values.ndim == 1]
    if whole:
        return np.max(whole, axis=0)
    means = [np.average(v, axis=0, weights=None if n is None else _share(n)).astype(np.float32) for v, n in given]
    return np.max(means, axis=0) if means else None


def _share(counts: Array) -> NDArray[np.float64]:
    counts = counts.astype(np.float64)
    total = counts.sum()
    return counts / total if total else np.full(counts.shape, 1 / counts.size)


def _check(consumer: Consumer) -> None:
    shape, given = consumer.weight.shape, consumer.importance
    if len(shape) < 2 or (given is not None and given.shape not in ((shape[-1],), (*shape[:-2], shape[-1]))):
        held = None if given is None else list(given.shape)
        raise FormatError(f"{consumer.name} has shape {list(shape)}, which importance of shape {held} does not fit")
    if consumer.counts is not None and consumer.counts.shape != shape[:-2]:
        raise FormatError(f"{consumer.name} has shape {list(shape)}, but counts {list(consumer.counts.shape)}")
