"""Weights that their format cannot hold, found while they are encoded: the first one ends it, or all are named."""

from __future__ import annotations

from halfbyte.errors import UnconvertibleError
from halfbyte.formats import get_format
from halfbyte.kernels.tensor_error import MAX_OBJECTIVE, TensorError, largest_relmse
from halfbyte.recipes import Method
from halfbyte.recipes.resolve import refits

SHOWN = 3


class Refusals:
    """Judges every weight by the bound of ``verify``; ``weights`` maps names to what is wrong.

    The first refused weight raises UnconvertibleError, unless ``collect``: then ``check`` does when all are known.
    """

    def __init__(self, collect: bool = False) -> None:
        self.collect = collect
        self.weights: dict[str, str] = {}

    def judge(self, error: TensorError, method: Method | None) -> None:
        """Refuse a weight with too large an error; ``method``: how it was rounded, which may move weights further."""
        bound = largest_relmse(get_format(error.format), method is not None, refitted=refits(method))
        relmse, where = error.relmse, ""
        if not error.worst_relmse <= max(relmse, bound):
            relmse, where = error.worst_relmse, f" in expert {error.worst_expert}"
        objective = error.calibrated_relmse
        if refits(method) and objective is not None and not objective <= MAX_OBJECTIVE:
            reason = (
                f"has outputs with a relative error of {objective:.3g} against those of its target, more than "
                f"{MAX_OBJECTIVE:g}, in {error.format}"
            )
            self.take(UnconvertibleError(f"{error.name} {reason}", {error.name: reason}))
        if not relmse <= bound:
            reason = (
                f"has a relative error of {relmse:.3g}{where} in {error.format}, whose scales cannot hold its values "
                f"(at most {bound:g} is allowed)"
            )
            self.take(UnconvertibleError(f"{error.name} {reason}", {error.name: reason}))

    def take(self, refusal: UnconvertibleError) -> None:
        """Note a refused weight, or raise what was said of it."""
        if not (self.collect and refusal.weights):
            raise UnconvertibleError(f"{refusal}; {ADVICE}", refusal.weights) if refusal.weights else refusal
        self.weights |= refusal.weights

    def check(self) -> None:
        """UnconvertibleError with all weights that were refused."""
        if self.weights:
            names = sorted(self.weights)
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise UnconvertibleError(
                f"{len(names)} weight(s) cannot be written in their format: {', '.join(names[:SHOWN])}{more}; {ADVICE}",
                self.weights,
            )


ADVICE = "give it another format, or keep it by a rule"
