"""These tests train models: where torch and transformers are not installed there is nothing to collect."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from small_models import recipe, run

if find_spec("torch") and find_spec("transformers"):
    import torch
    import transformers

    # sums are the same in every test only if they are split over the same number of threads
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint folder of a tiny random model of an architecture, written once."""
    from runtime.architectures import save

    folders: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return of


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
