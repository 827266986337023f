"""Rows of packed weights as embeddings look them up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.gpu.weights import FORMATS, weight

from halfbyte.gpu.device_rows import rows_of_weight
from halfbyte.gpu.device_weight import DeviceWeight


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_of_the_decoded_weight(name: str) -> None:
    tensor = weight(name, (37, 256))
    chosen = torch.tensor([[0, 36, 7], [8, 16, 36]])
    rows = rows_of_weight(DeviceWeight(tensor, "cpu"), chosen, torch.float32)
    np.testing.assert_allclose(rows.numpy(), tensor.decode()[chosen.numpy()], rtol=3e-7)
