"""These tests run models: where torch and transformers are not installed there is nothing to collect."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from halfbyte.recipes import Recipe
from small_models import run

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
    from .architectures import save

    folders: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return of


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Qwen3.5-MoE with vision and MTP in both spellings of experts; tests must not change it."""
    from .qwen35 import save_both

    return save_both(tmp_path_factory.mktemp("qwen35"))


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A conversion of a checkpoint, written once."""
    folders: dict[tuple[str, str, str], Path] = {}

    def of(source: Path, recipe: str | Recipe, dialect: str = "halfbyte") -> Path:
        key = (str(source), recipe if isinstance(recipe, str) else recipe.model_dump_json(), dialect)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("quantized") / f"model-{len(folders)}"
            run(source, folders[key], recipe, dialect)
        return folders[key]

    return of
