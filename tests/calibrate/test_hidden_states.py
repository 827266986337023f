"""Samples become hidden states in files, batch by batch, and layers are called with what fits each batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from calibrate.models import dense_model
from halfbyte.calibrate.hidden_states import check_output, embed, output_matrix, read_batch
from halfbyte.calibrate.layerwise import LayerwiseModel
from halfbyte.calibrate.samples import BATCH_TOKENS, Samples
from halfbyte.calibrate.states import States
from halfbyte.checkpoint import Reader
from halfbyte.errors import MeasurementError
from halfbyte.source.checkpoint import Checkpoint

LENGTH = BATCH_TOKENS // 4
SAMPLES = Samples([[i] * LENGTH for i in range(1, 7)], ("text",))


@pytest.fixture
def blocks(tmp_path: Path) -> Iterator[LayerwiseModel]:
    checkpoint = Checkpoint.open(dense_model(tmp_path / "model", layers=1))
    with Reader(checkpoint.inventory) as reader, torch.inference_mode():
        yield LayerwiseModel(checkpoint, reader, torch.float32, torch.device("cpu"))


def test_batches_have_all_samples_in_order() -> None:
    rows = [(rows.start, rows.stop, shape) for rows, shape in SAMPLES.batches()]
    assert rows == [(0, 4 * LENGTH, (4, LENGTH)), (4 * LENGTH, 6 * LENGTH, (2, LENGTH))]


def test_embeddings_of_all_samples_are_written_to_every_file(blocks: LayerwiseModel, tmp_path: Path) -> None:
    files = [States(tmp_path / name, 64) for name in ("one", "other")]
    calls = embed(blocks, SAMPLES, files, "model", [(1, LENGTH)])
    assert set(calls) == {(4, LENGTH), (2, LENGTH), (1, LENGTH)}
    with blocks.embedding(torch.tensor([[6]])):
        last = blocks.model.get_input_embeddings()(torch.tensor([6]))[0].numpy()
    for states in files:
        assert np.array_equal(states.read(slice(6 * LENGTH - 1, 6 * LENGTH))[0], last)
    assert read_batch(blocks, files[0], slice(0, 2 * LENGTH), (2, LENGTH)).shape == (2, LENGTH, 64)


def test_embeddings_that_are_there_are_not_written_again(blocks: LayerwiseModel, tmp_path: Path) -> None:
    assert set(embed(blocks, SAMPLES, [], "model")) == {(4, LENGTH), (2, LENGTH)}
    assert not list(tmp_path.glob("*.f32"))


def test_an_output_that_is_not_finite_names_the_layer(blocks: LayerwiseModel) -> None:
    layer, hidden = blocks.layers[0], torch.full((1, 4, 64), torch.nan)
    call = embed(blocks, Samples([[1, 2, 3, 4]], ("text",)), [], "model")[1, 4][0]
    with blocks.filled(layer), pytest.raises(MeasurementError, match=r"model.*layers\.0"):
        check_output(blocks, "model", layer, hidden, call, hidden)


def test_the_output_matrix_comes_with_the_norm_before_it(blocks: LayerwiseModel) -> None:
    assert output_matrix(blocks) == ("lm_head.weight", blocks.model.lm_head, blocks.decoder.norm)
