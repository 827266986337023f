"""The outcome of a verification, from what was counted."""

from __future__ import annotations

from halfbyte.kernels.tensor_error import TensorError
from halfbyte.verify.verification import Verification


def test_nothing_was_counted_at_first() -> None:
    result = Verification("out", None)
    assert (result.kept, result.quantized, result.smoothed, result.dropped, result.errors) == (0, 0, 0, {}, [])
    assert (result.lossless, result.relmse, result.recomputed, result.wrong_source) == (0, 0.0, False, "")


def test_it_is_ok_until_there_is_a_problem() -> None:
    result = Verification("out", None)
    assert result.ok
    result.problems.append("something")
    assert not result.ok


def test_the_relative_error_is_that_of_all_weights_together() -> None:
    errors = [TensorError("a", "r", "nvfp4", 4, 1.0, 10.0, 0.5), TensorError("b", "r", "nvfp4", 4, 3.0, 10.0, 0.5)]
    assert Verification("out", "in", errors=errors).relmse == 0.2


def test_lossless_weights_are_quantized_in_the_source_and_unchanged() -> None:
    errors = [
        TensorError("a", "r", "nvfp4", 4, source="nvfp4"),
        TensorError("b", "r", "nvfp4", 4, max_error=0.5, source="nvfp4"),
        TensorError("c", "r", "nvfp4", 4),
    ]
    assert Verification("out", "in", errors=errors).lossless == 1
