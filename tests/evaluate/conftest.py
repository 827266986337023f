"""Everything but the windows runs models: without torch and transformers there is nothing else to collect."""

from __future__ import annotations

from torch_room import ready

collect_ignore = (
    []
    if ready()
    else [
        f"test_{name}.py"
        for name in (
            *("activations", "conversations", "divergence", "honesty", "reference", "run", "sensitivity"),
            *("statistics", "tasks"),
        )
    ]
)
