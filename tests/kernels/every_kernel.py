"""Runs every kernel on arrays of exactly the right size, once per instruction set: a program for sanitizer builds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from formats.cases import QUICK, draw
from halfbyte import kernels
from halfbyte.formats import get_format
from halfbyte.kernels import ErrorStats
from halfbyte.search import encode
from kernels.cases import NATIVE, TYPES, cast, inputs

if __name__ == "__main__":
    np.seterr(all="ignore")
    for isa in NATIVE:
        with kernels.use_backend(isa):
            for name, search in QUICK:
                fmt = get_format(name)
                for kind, x in inputs(fmt).items():
                    dtype = TYPES[sorted(TYPES)[(len(kind) + len(name)) % 3]]
                    narrow = cast(x, dtype)
                    importance = np.abs(draw("heavy", x.shape[-1:], 9)) if len(search) % 2 else None
                    tensor = encode(narrow, fmt, search, importance, stats=ErrorStats())
                    tensor.decode()
                    tensor.decode(TYPES["bf16"])
                    kernels.compare(tensor, narrow, ErrorStats())
                    narrow.flat[-1] = np.nan
                    kernels.amax(narrow)
    print("ran", *NATIVE)
