"""Teachers whose answers were written down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbyte.errors import HalfbyteError
from halfbyte.train.cached_teacher import CachedTeacher
from halfbyte.train.objectives import likeliest

TABLE = torch.randn(30, 30, generator=torch.manual_seed(0))
IDS = torch.arange(24).reshape(3, 8)


def teacher(ids: torch.Tensor) -> torch.Tensor:
    return TABLE[ids]


def test_answers_are_those_of_the_teacher_in_any_order(tmp_path: Path) -> None:
    cached = CachedTeacher.write(teacher, IDS, tmp_path / "t", top_k=5)
    assert CachedTeacher.is_folder(tmp_path / "t")
    wanted = likeliest(teacher(IDS[[2, 0]]), 5)
    for known in (cached, CachedTeacher(tmp_path / "t")):
        answer = known(IDS[[2, 0]])
        assert torch.equal(answer.ids, wanted.ids) and torch.equal(answer.log_probs, wanted.log_probs)


def test_a_sequence_that_it_has_not_seen_is_refused(tmp_path: Path) -> None:
    cached = CachedTeacher.write(teacher, IDS, tmp_path / "t", top_k=5)
    with pytest.raises(HalfbyteError, match="lacks the teacher's answer"):
        cached(IDS.flip(-1))


def test_a_folder_without_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="holds no answers"):
        CachedTeacher(tmp_path)
