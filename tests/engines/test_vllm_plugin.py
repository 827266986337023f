"""How vLLM finds the plugin."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path


def test_the_entry_point_names_a_function() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    found = re.search(
        r'^\[project\.entry-points\."vllm\.general_plugins"\]\nhalfbyte = "(.+):(.+)"$', text, re.MULTILINE
    )
    assert found is not None and callable(getattr(import_module(found[1]), found[2]))
