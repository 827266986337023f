from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from halfbyte import kernels

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CXX = shutil.which("g++")
FLAGS = ("-std=c++17", "-O0", "-g1", "-fPIC", "-w", "-ffp-contract=off", "-fno-strict-aliasing")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
AVX2 = ("-mavx2", "-mbmi2")
ISAS = {
    "baseline": (),
    "avx2": AVX2,
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2, "-mprefer-vector-width=512"),
}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with address and undefined-behaviour sanitizers."""
    if CXX is None or not sys.platform.startswith("linux"):
        pytest.skip("no GCC here to build with sanitizers")
    folder = tmp_path_factory.mktemp("sanitized")
    names = list(ISAS) if os.uname().machine == "x86_64" else ["baseline"]

    def compile_one(name: str) -> str:
        target = str(folder / f"{name}.o")
        source = "dispatch" if name == "dispatch" else "kernels"
        flags = (*FLAGS, *SANITIZERS, *ISAS.get(name, ()), f"-DHB_NAME=hb_kernels_{name}")
        subprocess.run([CXX, *flags, "-c", str(REPOSITORY / "native" / f"{source}.cpp"), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*names, "dispatch"]))
    library = folder / "halfbyte_kernels.so"
    subprocess.run([CXX, *SANITIZERS, "-shared", *objects, "-o", str(library)], check=True)
    return library


@pytest.mark.slow
def test_no_kernel_reads_or_writes_beside_its_arrays_or_has_undefined_behaviour(sanitized: Path) -> None:
    runtime = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "HALFBYTE_LIBRARY": str(sanitized),
        "PYTHONMALLOC": "malloc",
    }
    environment.pop("HALFBYTE_ISA", None)
    program = Path(__file__).with_name("every_kernel.py")
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["ran", *kernels.backends()[:-1]]
