"""These tests run models: where torch and transformers are not installed there is nothing to collect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.recipes import Recipe
from small_models import run
from torch_room import ready

collect_ignore_glob = [] if ready() else ["test_*.py"]


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
