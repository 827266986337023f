"""Batches of tokens: the same ones every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import HalfbyteError
from halfbyte.train.token_batches import TokenBatches, make_batches


class Letters:
    """A tokenizer with a token for each byte."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(800)))
    return path


def test_each_epoch_has_every_sequence_once_in_an_order_of_its_own(text: Path) -> None:
    batches = make_batches([text], Letters(), 16, 3)
    assert batches.sequences.shape == (45, 16) and batches.held_out.shape == (5, 16)
    epochs = [torch.cat([batches.batch(step) for step in range(first, first + 15)]) for first in (0, 15)]
    assert not torch.equal(*epochs)
    assert all(sorted(epoch.tolist()) == sorted(batches.sequences.tolist()) for epoch in epochs)


def test_a_batch_depends_on_seed_and_step_only(text: Path) -> None:
    one, two = (make_batches([text], Letters(), 16, 3, seed=7) for _ in range(2))
    two.batch(40)
    assert torch.equal(one.batch(2), two.batch(2))
    assert not torch.equal(one.batch(2), make_batches([text], Letters(), 16, 3, seed=8).batch(2))
    assert one.fingerprint == two.fingerprint != TokenBatches(one.sequences, one.held_out, 3, 8).fingerprint


def test_a_text_of_its_own_is_held_out_whole(text: Path) -> None:
    assert len(make_batches([text], Letters(), 16, held_out=[text]).held_out) == 50


def test_texts_that_cannot_be_used_are_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  ")
    for wrong, length, match in (
        (tmp_path / "no.txt", 16, "is no file"),
        (tmp_path / "empty.txt", 16, "is empty"),
        (text, 1000, "fewer than one sequence"),
        (text, 500, "one is held out"),
    ):
        with pytest.raises(HalfbyteError, match=match):
            make_batches([wrong], Letters(), length)
    with pytest.raises(HalfbyteError, match="has only 100"):
        make_batches([text], Letters(), 16, vocabulary=100)
