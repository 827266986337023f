"""What rooms of tests that run models do before they are collected."""

from __future__ import annotations

from importlib.util import find_spec


def ready() -> bool:
    """Whether torch and transformers are installed; then they are made quiet, and as deterministic as tests need."""
    if not (find_spec("torch") and find_spec("transformers")):
        return False
    import torch
    import transformers

    # sums are the same in every test only if they are split over the same number of threads
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return True
