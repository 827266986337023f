"""Hessians on their way to the encoder: which weights have one, and each factored once for all that read one input."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from numpy.typing import ArrayLike

from halfbyte.calibration import Calibration
from halfbyte.calibration.importance import Floats
from halfbyte.calibration.token_counts import enough
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.formats import Format
from halfbyte.formats.rotation import Swaps, plain_swaps
from halfbyte.plan.shards import Item
from halfbyte.recipes import Method
from halfbyte.search.local_hessian import prepare_local
from halfbyte.search.output_metric import PreparedOutput, prepare_output
from halfbyte.search.prepared import Prepared, prepare
from halfbyte.search.rotated_space import duquant_swaps, rotated_hessian

# what is kept of a factored Hessian, per column squared
_KEPT_BYTES = 5
# and beside it, where codes are refined
_REFINED_BYTES = 4


class Hessians:
    """Factored Hessians, computed when first asked for; the least recently used are forgotten beyond ``limit`` bytes.

    Threads that ask for the same one wait for the first.
    """

    def __init__(self, calibration: Calibration, limit: int) -> None:
        self.calibration = calibration
        self.limit = limit
        self._found: OrderedDict[tuple[object, ...], tuple[int, Future[Prepared]]] = OrderedDict()
        self._rotations: dict[tuple[object, ...], Swaps] = {}
        self._lock = threading.Lock()

    def rotation(self, item: Item, first: int, stop: int, scale: Floats | None) -> Swaps | None:
        """Steps of a rotation that is found from the inputs, for a matrix or experts first..stop of a stack.

        None for the Hadamard matrix: where the format has no such steps, or too few tokens were seen.
        """
        fmt, weight = item.format, item.weight
        assert fmt is not None
        reached = enough(self.calibration, weight.name)
        if fmt.rotation is None or not fmt.rotation.steps or reached is None:
            return None
        if len(weight.shape) < 3:
            return self._swaps(item, None, scale) if reached[0] else None
        swaps = plain_swaps(fmt.rotation.swaps_shape((stop - first,), weight.shape[-1], fmt.block[1]))
        for expert in range(first, stop):
            if reached[expert if len(reached) > 1 else 0]:
                scale_here = scale if scale is None or scale.ndim == 1 else scale[expert]
                swaps[expert - first] = self._swaps(item, expert, scale_here)
        return swaps

    def _swaps(self, item: Item, expert: int | None, scale: Floats | None) -> Swaps:
        assert item.format is not None and item.format.rotation is not None
        key = self._key(item, expert, scale)
        # a few bytes, which every slice of a weight asks for; threads that find them twice find the same
        if key not in self._rotations:
            hessian = self.calibration.hessian(item.weight.name, expert, scale)
            with _named(item, expert):
                self._rotations[key] = duquant_swaps(hessian, item.format.block[1], item.format.rotation.steps)
        return self._rotations[key]

    def slice(self, item: Item, first: int, stop: int, scale: Floats | None) -> Sequence[Prepared | None]:
        """For a matrix one, for experts first..stop of a stack one each; ``scale`` as in ``Calibration.slice``.

        For a format in rotated space it is that of the rotated inputs, made ready for the format without the rotation.
        """
        reached = enough(self.calibration, item.weight.name)
        assert reached is not None
        if len(item.weight.shape) < 3:
            return [self._one(item, None, scale) if reached[0] else None]
        if len(reached) == 1:
            reached = reached * item.weight.shape[0]
        prepared: list[Prepared | None] = []
        for expert in range(first, stop):
            scale_here = scale if scale is None or scale.ndim == 1 else scale[expert]
            prepared.append(self._one(item, expert, scale_here) if reached[expert] else None)
        return prepared

    def outputs(self, item: Item, first: int, stop: int) -> Sequence[PreparedOutput | None] | None:
        """The metrics of the outputs, as ``slice`` gives those of the inputs; None where the method has none.

        They are not kept: every weight has its own.
        """
        if item.method is None or item.method.output is None:
            return None
        stack = len(item.weight.shape) > 2
        return [self._output(item, expert) for expert in (range(first, stop) if stack else [None])]

    def _output(self, item: Item, expert: int | None) -> PreparedOutput | None:
        hessian = self.calibration.output_hessian(item.weight.name, expert)
        if hessian is None or item.method is None:
            return None
        with _named(item, expert):
            return prepare_output(hessian, refine=item.method.refine is not None)

    def _key(self, item: Item, expert: int | None, scale: Floats | None) -> tuple[object, ...]:
        """What a Hessian and what is made of it depend on."""
        statistics, name = self.calibration.statistics, item.weight.name
        assert statistics is not None and item.format is not None
        hessian = statistics.array(name, "hessian")
        pooled = hessian is not None and hessian.ndim == 2
        return (
            statistics.same.get(name, name),
            None if pooled else expert,
            item.format.name,
            item.method,
            None if scale is None else scale.tobytes(),
        )

    def _one(self, item: Item, expert: int | None, scale: Floats | None) -> Prepared:
        key = self._key(item, expert, scale)
        with self._lock:
            known = self._found.get(key)
            if known is not None:
                self._found.move_to_end(key)
                future = known[1]
            else:
                future = Future()
                kept = _KEPT_BYTES + (_REFINED_BYTES if item.method and item.method.refine else 0)
                self._found[key] = kept * item.weight.shape[-1] ** 2, future
                self._forget()
        if known is None:
            try:
                future.set_result(self._prepare(item, expert, scale))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _forget(self) -> None:
        while len(self._found) > 1 and sum(size for size, _ in self._found.values()) > self.limit:
            self._found.popitem(last=False)

    def _prepare(self, item: Item, expert: int | None, scale: Floats | None) -> Prepared:
        assert item.format is not None and item.method is not None
        hessian: ArrayLike = self.calibration.hessian(item.weight.name, expert, scale)
        method, fmt = item.method, item.format
        with _named(item, expert):
            steps = self._swaps(item, expert, scale) if fmt.rotation and fmt.rotation.steps else None
            hessian, fmt = rotated_hessian(hessian, fmt, steps), fmt.plain
            return prepare_for(hessian, fmt, method)


def prepare_for(hessian: ArrayLike, fmt: Format, method: Method) -> Prepared:
    """Factor a Hessian for the way in which a method rounds to a format; FormatError where that is impossible."""
    if method.name == "local_hessian":
        return prepare_local(hessian, fmt, damping=method.damping)
    refine = method.refine is not None
    return prepare(hessian, fmt, mode=method.mode, order=method.order, damping=method.damping, refine=refine)


@contextlib.contextmanager
def _named(item: Item, expert: int | None) -> Iterator[None]:
    """Errors say whose Hessian it was."""
    try:
        yield
    except FormatError as error:
        where = item.weight.name if expert is None else f"expert {expert} of {item.weight.name}"
        raise CheckpointError(f"{where}: {error}") from error
