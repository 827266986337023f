"""How many tokens make a Hessian: 32, for each expert that has its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from halfbyte.calibration import Calibration
from halfbyte.calibration.importance import Matched
from halfbyte.calibration.statistics import Part, Statistics, new_description, write_description, write_part
from halfbyte.calibration.token_counts import enough


def calibration(folder: Path, counts: list[int] | int, hessian: tuple[int, ...] | None) -> Calibration:
    """Statistics of one weight "w" with 4 columns: its token counts, and a Hessian of this shape."""
    count = np.array(counts, np.int64)
    arrays = {"count": count, "squares": np.ones((*count.shape, 4)), "amax": np.ones(count.shape, np.float32)}
    if hessian is not None:
        arrays["hessian"] = np.ones(hessian, np.float32)
    write_part(folder, "all", Part({"w": arrays}))
    write_description(folder, new_description(texts=[], samples=1, tokens=1, parts=["all"]) | {"complete": True})
    return Calibration("", "", 1, Matched(), Statistics(folder))


def test_an_expert_needs_32_tokens(tmp_path: Path) -> None:
    assert enough(calibration(tmp_path, [0, 31, 32, 33], (4, 4, 4)), "w") == [False, False, True, True]


@pytest.mark.parametrize(("counts", "reached"), [([20, 11], False), ([20, 12], True)])
def test_experts_that_share_a_hessian_need_32_tokens_together(tmp_path: Path, counts: list[int], reached: bool) -> None:
    assert enough(calibration(tmp_path, counts, (4, 4)), "w") == [reached]


@pytest.mark.parametrize(("count", "reached"), [(31, False), (32, True)])
def test_a_matrix_needs_32_tokens(tmp_path: Path, count: int, reached: bool) -> None:
    assert enough(calibration(tmp_path, count, (4, 4)), "w") == [reached]


def test_without_a_hessian_nothing_is_enough(tmp_path: Path) -> None:
    assert enough(calibration(tmp_path, 1000, None), "w") is None
