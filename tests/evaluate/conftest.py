"""Everything but the windows runs models: without torch and transformers there is nothing else to collect."""

from __future__ import annotations

from pathlib import Path

from torch_room import ready

_HERE = Path(__file__).parent
collect_ignore = [] if ready() else [path.name for path in _HERE.glob("test_*.py") if path.stem != "test_windows"]
