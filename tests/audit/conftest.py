"""A source and good outputs of it, which tests copy and damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.small_models import MOE_CONFIG, moe_tensors, run, write_checkpoint

CONFIG = {
    **MOE_CONFIG,
    "text_config": {**MOE_CONFIG["text_config"], "mtp_num_hidden_layers": 1},
    "vision_config": {"depth": 1},
}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("audit") / "source", moe_tensors(), CONFIG)


@pytest.fixture(scope="session")
def good(source: Path) -> Path:
    out = source.parent / "nvfp4"
    run(source, out, "nvfp4", "compressed-tensors")
    return out


@pytest.fixture(scope="session")
def modelopt(source: Path) -> Path:
    out = source.parent / "modelopt"
    run(source, out, "nvfp4", "modelopt")
    return out
