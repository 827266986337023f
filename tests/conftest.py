"""Shared fixtures: where the real models and texts lie, and a small synthetic checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Triton decides when it is imported whether its kernels run in its interpreter, on the CPU
os.environ["TRITON_INTERPRET"] = "1"

# the same examples every time, on a machine that may do other things too
settings.register_profile("halfbyte", deadline=None, derandomize=True)
settings.load_profile("halfbyte")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models, texts and inventories that lies beside the repository."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip("the folder ../shared with real models and texts is not here")
    return path


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint folder of a tiny random model of an architecture, written once; it needs transformers."""
    from runtime.architectures import save

    folders: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return of
