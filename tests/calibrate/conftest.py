"""Collecting statistics runs models: not collected where torch and transformers are not installed."""

import pytest

from torch_room import ready

collect_ignore_glob = [] if ready() else ["test_*.py"]


@pytest.fixture(scope="session")
def demo_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    from halfbyte.demo import TEXT

    return str(TEXT)
