"""Hessians on their way to the encoder: which weights have one, and each factored once for all that read one input."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from halfbyte.calibrate import Calibration
from halfbyte.calibrate.importance import Floats
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.search.gptq import Prepared, prepare
from halfbyte.search.local_hessian import prepare_local
from halfbyte.shards import Item

MIN_TOKENS = 32
"""With fewer tokens an expert's Hessian says less than its diagonal, which importance weighs."""

# what is kept of a factored Hessian, per column squared
_KEPT_BYTES = 5


def enough(calibration: Calibration, weight: str) -> list[bool] | None:
    """For each expert, or for a matrix alone, whether enough tokens were seen; None where there is no Hessian."""
    tokens = calibration.tokens(weight)
    return None if tokens is None else [bool(n >= MIN_TOKENS) for n in np.atleast_1d(tokens)]


class Hessians:
    """Factored Hessians, computed when first asked for; the least recently used are forgotten beyond ``limit`` bytes.

    Threads that ask for the same one wait for the first.
    """

    def __init__(self, calibration: Calibration, limit: int) -> None:
        self.calibration = calibration
        self.limit = limit
        self._found: OrderedDict[tuple[object, ...], tuple[int, Future[Prepared]]] = OrderedDict()
        self._lock = threading.Lock()

    def slice(self, item: Item, first: int, stop: int, scale: Floats | None) -> Sequence[Prepared | None]:
        """For a matrix one, for experts first..stop of a stack one each; ``scale`` as in ``Calibration.slice``."""
        reached = enough(self.calibration, item.weight.name)
        assert reached is not None
        if len(item.weight.shape) < 3:
            return [self._one(item, None, scale) if reached[0] else None]
        if len(reached) == 1:
            reached = reached * item.weight.shape[0]
        found: list[Prepared | None] = []
        for expert in range(first, stop):
            own = scale if scale is None or scale.ndim == 1 else scale[expert]
            found.append(self._one(item, expert, own) if reached[expert] else None)
        return found

    def _one(self, item: Item, expert: int | None, scale: Floats | None) -> Prepared:
        statistics, name = self.calibration.statistics, item.weight.name
        assert statistics is not None and item.format is not None and item.method is not None
        own = statistics.array(name, "hessian")
        pooled = own is not None and own.ndim == 2
        key = (
            statistics.same.get(name, name),
            None if pooled else expert,
            item.format.name,
            item.method,
            None if scale is None else scale.tobytes(),
        )
        with self._lock:
            known = self._found.get(key)
            if known is not None:
                self._found.move_to_end(key)
                future = known[1]
            else:
                future = Future()
                self._found[key] = _KEPT_BYTES * item.weight.shape[-1] ** 2, future
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
        hessian = self.calibration.hessian(item.weight.name, expert, scale)
        method = item.method
        try:
            if method.name == "local_hessian":
                return prepare_local(hessian, item.format, damping=method.damping)
            return prepare(hessian, item.format, mode=method.mode, order=method.order, damping=method.damping)
        except FormatError as error:
            where = item.weight.name if expert is None else f"expert {expert} of {item.weight.name}"
            raise CheckpointError(f"{where}: {error}") from error
