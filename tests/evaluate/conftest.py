"""Everything but the windows runs models: without torch and transformers there is nothing else to collect."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("torch") and find_spec("transformers"):
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
else:
    collect_ignore = [
        f"test_{name}.py"
        for name in (
            *("activations", "conversations", "divergence", "honesty", "reference", "run", "sensitivity"),
            *("statistics", "tasks"),
        )
    ]
