"""Instruction sets that the machine of the tests may lack: AVX-512 by loops, NEON in an emulator."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kernels import linear_program
from kernels.linear_cases import ISAS, PRODUCT_FORMATS

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent.parent / "native"
FLAGS = ("-std=gnu++17", "-O1", "-fPIC", "-w", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{NATIVE}")
V3 = ("-mavx2", "-mbmi2", "-mfma", "-mf16c")
EMULATED = {
    "avxvnni": ("-DHB_EMULATE_AVXVNNI",),
    "avx512": ("-DHB_EMULATE_AVX512",),
    "avx512bf16": ("-DHB_EMULATE_AVX512", "-DHB_EMULATE_AVX512VNNI", "-DHB_EMULATE_AVX512BF16"),
}
TABLES = ("avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16")


def compile_all(commands: list[list[str]]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), commands):
            assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Libraries whose baseline is the code of another instruction set."""
    compiler = shutil.which("g++")
    if compiler is None or "avx2" not in ISAS:
        pytest.skip("no GCC here, or no AVX2 for what is not emulated")
    folder = tmp_path_factory.mktemp("emulated")
    others = "".join(f"const hb_linear_kernels hb_linear_{name} = {{}};\n" for name in TABLES)
    (folder / "tables.cpp").write_text(f'#include "linear_kernels.h"\nextern "C" {{\n{others}}}\n')
    commands = [
        [compiler, *FLAGS, "-c", str(NATIVE / "linear.cpp"), "-o", str(folder / "linear.o")],
        [compiler, *FLAGS, "-c", str(folder / "tables.cpp"), "-o", str(folder / "tables.o")],
    ]
    shim = ("-include", str(HERE / "avx512_by_loops.h"), "-DHB_NAME=hb_linear_baseline")
    for name, macros in EMULATED.items():
        source = ("-c", str(NATIVE / "linear_kernels.cpp"), "-o", str(folder / f"{name}.o"))
        commands.append([compiler, *FLAGS, *V3, *macros, *shim, *source])
    compile_all(commands)
    common = [str(folder / "linear.o"), str(folder / "tables.o")]
    built = {name: folder / f"{name}.so" for name in EMULATED}
    compile_all([[compiler, "-shared", str(p.with_suffix(".o")), *common, "-o", str(p)] for p in built.values()])
    return built


@pytest.mark.slow
@pytest.mark.parametrize("name", list(EMULATED))
def test_the_code_for_other_x86_processors_gives_right_products(libraries: dict[str, Path], name: str) -> None:
    program = [sys.executable, str(HERE / "every_product.py"), str(libraries[name]), "baseline"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["baseline", str(12 * len(PRODUCT_FORMATS) + 27)]


@pytest.mark.slow
@pytest.mark.parametrize("extension", ["", "+dotprod"])
def test_the_code_for_arm_gives_right_products(tmp_path: Path, extension: str) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no compiler or no emulator for ARM here")
    flags = (*FLAGS, f"-march=armv8.2-a{extension}", "-static")
    name = "dotprod" if extension else "baseline"
    sources = [str(HERE / "linear_program.cpp"), str(NATIVE / "linear_kernels.cpp")]
    program = tmp_path / "program"
    compile_all([[compiler, *flags, f"-DHB_NAME=hb_linear_{name}", *sources, "-o", str(program)]])
    cases = linear_program.cases()
    given = b"".join(case.data for case in cases)
    done = subprocess.run([emulator, str(program)], input=given, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = np.frombuffer(done.stdout, dtype=np.float32)
    for case in cases:
        y, results = results[: case.expected.size].reshape(case.expected.shape), results[case.expected.size :]
        assert np.linalg.norm(y - case.expected) <= case.tolerance * np.linalg.norm(case.expected), case.name
    assert not results.size
