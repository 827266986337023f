"""Fitted global scales are refused where there is nothing to fit or to store, and their cost is noted."""

from __future__ import annotations

import pytest

from halfbyte.errors import HalfbyteError, PlanError, RecipeError
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, dense_tensors, linear, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("d") / "dense", dense_tensors(), DENSE_CONFIG))


@pytest.mark.parametrize(
    ("fmt", "dialect", "error", "message"),
    [
        ("mxfp4", "halfbyte", RecipeError, "mxfp4 has no global scale to fit; leave it out or choose a format such as"),
        ("nvfp4", "mlx", PlanError, "mlx stores only powers of two as global scales; leave it out or choose another"),
    ],
)
def test_a_scale_that_cannot_be_fitted_or_stored_is_refused(
    checkpoint: Checkpoint, fmt: str, dialect: str, error: type[HalfbyteError], message: str
) -> None:
    with pytest.raises(error, match=rf"rule 1 of the recipe says `global_scale: soar` for model\..*, but {message}"):
        make_plan(checkpoint, linear(fmt, global_scale="soar"), dialect)


def test_the_cost_of_fitting_is_noted(checkpoint: Checkpoint) -> None:
    fitted = make_plan(checkpoint, linear("nvfp4", global_scale="soar"))
    assert [note for note in fitted.notes if "fitted" in note] == [
        "global scales of 14 weights are fitted: up to 16 more encodings of each"
    ]
    assert not [note for note in make_plan(checkpoint, linear("nvfp4")).notes if "fitted" in note]
