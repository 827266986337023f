"""These tests train models: where torch and transformers are not installed there is nothing to collect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from small_models import recipe, run
from torch_room import ready

collect_ignore_glob = [] if ready() else ["test_*.py"]


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A conversion of all linear weights of a checkpoint, or of others, written once."""
    folders: dict[tuple[str, ...], Path] = {}

    def of(source: Path, fmt: str = "nvfp4", dialect: str = "halfbyte", match: str = "linear") -> Path:
        key = (str(source), fmt, dialect, match)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("quantized") / f"model-{len(folders)}"
            run(source, folders[key], recipe({"match": match, "format": fmt, "scale_search": "absmax"}), dialect)
        return folders[key]

    return of


@pytest.fixture(scope="session")
def demo_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in NVFP4."""
    from halfbyte.demo import MODEL

    out = tmp_path_factory.mktemp("demo") / "nvfp4"
    run(MODEL, out, "nvfp4")
    return out
