from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from halfbyte import kernels
from halfbyte.kernels import linear

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CXX = shutil.which("g++")
FLAGS = ("-std=c++17", "-O0", "-g1", "-fPIC", "-w", "-ffp-contract=off", "-fno-strict-aliasing")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
V3 = ("-mavx2", "-mbmi2", "-mfma", "-mf16c")
V4 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *V3, "-mprefer-vector-width=512")
CODEC = {"baseline": (), "avx2": V3[:2], "avx512": tuple(flag for flag in V4 if flag not in V3[2:])}
PRODUCTS = {
    "baseline": (),
    "avx2": V3,
    "avxvnni": (*V3, "-mavxvnni"),
    "avx512": V4,
    "avx512vnni": (*V4, "-mavx512vnni"),
    "avx512bf16": (*V4, "-mavx512vnni", "-mavx512bf16"),
}


def commands(folder: Path) -> list[list[str]]:
    """How each source is compiled, for every instruction set that it has."""
    everything = os.uname().machine == "x86_64"
    sources: list[tuple[str, str, tuple[str, ...]]] = [("dispatch", "", ()), ("linear", "", ())]
    for source, isas in (("kernels", CODEC), ("linear_kernels", PRODUCTS)):
        sources += [(source, name, flags) for name, flags in isas.items() if everything or name == "baseline"]
    made = []
    for source, name, flags in sources:
        table = f"hb_{source.removesuffix('_kernels')}_{name}"
        target = folder / f"{source}{name}.o"
        files = ("-c", str(REPOSITORY / "native" / f"{source}.cpp"), "-o", str(target))
        made.append([str(CXX), *FLAGS, *SANITIZERS, *flags, f"-DHB_NAME={table}", *files])
    return made


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with address and undefined-behaviour sanitizers."""
    if CXX is None or not sys.platform.startswith("linux"):
        pytest.skip("no GCC here to build with sanitizers")
    folder = tmp_path_factory.mktemp("sanitized")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), commands(folder)):
            assert done.returncode == 0, done.stderr[-3000:]
    library, objects = folder / "halfbyte_kernels.so", [str(path) for path in folder.glob("*.o")]
    subprocess.run([CXX, *SANITIZERS, "-shared", *objects, "-o", str(library), "-lpthread"], check=True)
    return library


def run_sanitized(library: Path, program: str, *arguments: str) -> list[str]:
    """The words that a program of this folder prints with the library."""
    runtime = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "HALFBYTE_LIBRARY": str(library),
        "PYTHONMALLOC": "malloc",
    }
    environment.pop("HALFBYTE_ISA", None)
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split()


@pytest.mark.slow
def test_no_kernel_reads_or_writes_beside_its_arrays_or_has_undefined_behaviour(sanitized: Path) -> None:
    assert run_sanitized(sanitized, "every_kernel.py") == ["ran", *kernels.backends()[:-1]]


@pytest.mark.slow
def test_no_product_reads_or_writes_beside_its_arrays_or_has_undefined_behaviour(sanitized: Path) -> None:
    isas = linear.isas()
    assert run_sanitized(sanitized, "every_product.py", "-", *isas)[::2] == list(isas)
