"""Log messages of the commands that run models: each once, as a line of halfbyte's, and none of transformers' hints."""

from __future__ import annotations

import logging
import os
import sys

from halfbyte.cli.human import clean


class _Once(logging.Handler):
    """Writes each different message once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record on stderr unless its text was there before."""
        text = record.getMessage()
        if text not in self._seen:
            self._seen.add(text)
            print(f"halfbyte: {clean(text)}", file=sys.stderr)


def prepare_logs(level: int = logging.WARNING) -> None:
    """Call before transformers is imported. ``level``: the least important messages of halfbyte that are shown."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logger = logging.getLogger("halfbyte")
    logger.handlers = [_Once()]
    logger.propagate = False
    logger.setLevel(level)
