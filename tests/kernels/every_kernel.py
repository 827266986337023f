"""Runs every kernel on arrays of exactly the right size, once per instruction set: a program for sanitizer builds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from formats.cases import draw
from halfbyte import kernels
from halfbyte.formats import get_format
from halfbyte.kernels import ErrorStats
from halfbyte.search import encode
from halfbyte.search.gptq import gptq, prepare
from kernels.cases import NATIVE, QUICK_KERNEL_CASES, TYPES, cast, inputs
from search.hessians import hessian

if __name__ == "__main__":
    np.seterr(all="ignore")
    for isa in NATIVE:
        with kernels.use_backend(isa):
            for name, search in QUICK_KERNEL_CASES:
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
            for name in ("mixfp4", "mxfp4", "razer_e3m3", "iq4_nl", "int4_g128", "int4_asym_g32", "affine4_g64"):
                k = max(48, 2 * get_format(name).block[1])
                for i, mode in enumerate(("in_loop", "local_hessian", "compensated", "static")):
                    prepared = prepare(hessian(k), name, mode=mode, order=("none", "act")[i % 2])
                    for rows in (1, 17):
                        gptq(
                            cast(draw("heavy", (2, rows, k), rows), TYPES[sorted(TYPES)[i % 3]]),
                            name,
                            "sweep",
                            prepared,
                        )
            for size, name in ((16, "nvfp4"), (32, "mxfp4"), (64, "int4_g64"), (128, "int4_g128")):
                x = draw("heavy", (2, 3, 2 * size), size)
                swaps = np.random.RandomState(size).randint(0, 2 * size, (2, 2, 16)).astype(np.uint8)
                encode(x, f"{name}_hadamard").decode()
                encode(x, f"{name}_duquant", rotation=swaps).decode()
    print("ran", *NATIVE)
