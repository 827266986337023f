"""The solver: silent, whatever its version prints by itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("highspy")

ALLOCATE = """\
from halfbyte.allocate.choices import AllocationUnit, Choice
from halfbyte.allocate.solve import allocate

units = [AllocationUnit(str(i), [], [Choice("a", 4, 0, 1.0), Choice("b", 8, 0, i / 9)]) for i in range(9)]
assert allocate(units, 50).bytes <= 50
"""


def test_the_solver_prints_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
