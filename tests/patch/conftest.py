"""A base checkpoint and a fine-tune of it, both quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.small_models import DENSE_CONFIG, dense_tensors, run, write_checkpoint


@pytest.fixture(scope="session")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("patch")
    tensors = dense_tensors()
    base = write_checkpoint(folder / "source", tensors, DENSE_CONFIG)
    rng = np.random.default_rng(5)
    for name, array in tensors.items():
        if "_proj" in name:
            wide = array.astype(np.float32)
            low_rank = rng.normal(size=(len(wide), 2)) @ rng.normal(size=(2, wide.shape[1]))
            wide += 0.003 * wide.std() * low_rank.astype(np.float32)
            tensors[name] = wide.astype(array.dtype)
    tuned = write_checkpoint(folder / "tuned", {**tensors, "extra.weight": tensors["model.norm.weight"]}, DENSE_CONFIG)
    run(base, folder / "base4", "nvfp4", "compressed-tensors")
    run(tuned, folder / "tuned4", "nvfp4", "compressed-tensors")
    return folder / "base4", folder / "tuned4"
