"""Statistics know the model that they were collected from."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.calibration.model_identity import check_identity, identity_of
from halfbyte.errors import PlanError
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, dense_tensors, write_checkpoint


def model(folder: Path, seed: int = 0, shards: int = 1, **config: object) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(folder, dense_tensors(seed), {**DENSE_CONFIG, **config}, shards))


def about(checkpoint: Checkpoint) -> dict[str, object]:
    return {"source": {"name": "first", "identity": identity_of(checkpoint)}}


def test_the_same_model_is_recognised_however_its_tensors_are_spread(tmp_path: Path) -> None:
    first = model(tmp_path / "a", dtype="bfloat16")
    assert check_identity(about(first), model(tmp_path / "b", shards=3, transformers_version="9")) == []


@pytest.mark.parametrize(
    ("seed", "config", "what"), [(1, {}, "its weights"), (0, {"rope_theta": 5.0}, "its configuration")]
)
def test_another_model_of_the_same_shapes_is_refused(
    seed: int, config: dict[str, object], what: str, tmp_path: Path
) -> None:
    first, other = model(tmp_path / "a"), model(tmp_path / "b", seed, **config)
    with pytest.raises(PlanError, match=f"collected from first.*{what}.*--calibration-of-base"):
        check_identity(about(first), other)
    (note,) = check_identity(about(first), other, of_base=True)
    assert "base model" in note and what in note


def test_statistics_without_an_identity_give_a_note(tmp_path: Path) -> None:
    (note,) = check_identity({"source": {"name": "old"}}, model(tmp_path / "a"))
    assert "do not say which weights" in note
