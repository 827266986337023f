"""JSON documents as files: complete or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halfbyte.cli.output import plain


def write_json(path: str | Path, document: Any) -> None:
    """Write what ``print_json`` would print."""
    from halfbyte.checkpoint import write_file_atomic

    text = json.dumps(plain(document), indent=1, allow_nan=False, ensure_ascii=False)
    write_file_atomic(Path(path), text.encode() + b"\n")
