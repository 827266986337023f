"""Make a torchvision that was built for GPUs importable beside a torch that was built for CPUs.

Its compiled operators cannot be loaded there, and its import fails where it registers shapes for two of them. Models
that read text never call them, so declaring their names is enough. Does nothing where torchvision can be imported.
Runs in the environment that is to be repaired.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

DECLARATIONS = """

# declared for a torch without the compiled operators
if not _has_ops():
    for _operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_operator}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
"""


def main() -> int:
    """Repair torchvision if it is broken; the exit code is 1 if it still is."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        print("torchvision is not installed", file=sys.stderr)
        return 1
    if importable():
        return 0
    file = Path(spec.origin).with_name("extension.py")
    text = file.read_text()
    if DECLARATIONS not in text:
        file.write_text(text + DECLARATIONS)
    return int(not importable())


def importable() -> bool:
    """Import torchvision in a process of its own."""
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
