"""Collecting statistics runs models: not collected where torch and transformers are not installed."""

from importlib.util import find_spec

import pytest

TORCH = bool(find_spec("torch") and find_spec("transformers"))
if TORCH:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def demo_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    from halfbyte.demo import TEXT

    return str(TEXT)
