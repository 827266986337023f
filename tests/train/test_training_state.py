"""The saved state of an unfinished training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbyte.errors import OutputError
from halfbyte.train.training_state import TrainingState


def test_a_state_is_read_as_it_was_saved_until_the_training_is_finished(tmp_path: Path) -> None:
    state = TrainingState(tmp_path / "w", "a", resume=False)
    assert state.load() is None
    state.save({"step": 3, "masters": [torch.arange(4.0)]})
    loaded = TrainingState(tmp_path / "w", "a", resume=True).load()
    assert loaded is not None and loaded["step"] == 3 and torch.equal(loaded["masters"][0], torch.arange(4.0))
    state.finish()
    assert not (tmp_path / "w").exists()


def test_what_is_not_to_be_continued_is_left_alone(tmp_path: Path) -> None:
    TrainingState(tmp_path / "w", "a", resume=False).save({"step": 3})
    with pytest.raises(OutputError, match="--resume"):
        TrainingState(tmp_path / "w", "a", resume=False)
    with pytest.raises(OutputError, match="another training"):
        TrainingState(tmp_path / "w", "b", resume=True).load()


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    state = TrainingState(tmp_path / "w", "a", resume=False)
    state.save({"step": 3})
    (tmp_path / "w" / "state.pt").write_bytes(b"torn")
    with pytest.raises(OutputError, match="remove"):
        state.load()
