from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from formats.cases import CASES, draw
from halfbyte import kernels
from halfbyte.errors import FormatError
from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.search import encode, get_search
from kernels.cases import NATIVE, differences, reference

PROGRAM = """
import numpy as np
from halfbyte import kernels
from halfbyte.search import encode
encode(np.ones((4, 32), dtype=np.float32), "nvfp4").decode()
print(kernels.backend())
"""


def run(**environment: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler here")
def test_where_there_is_a_compiler_there_are_kernels() -> None:
    assert "baseline" in kernels.backends()


def test_without_a_library_numpy_does_the_work_and_says_so_once() -> None:
    backend, said = run(HALFBYTE_LIBRARY="no such library")
    assert backend == "reference"
    assert said.count("NumPy does their work") == 1


@pytest.mark.skipif(not NATIVE, reason="no native kernels here")
@pytest.mark.parametrize("name", kernels.backends())
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    assert run(HALFBYTE_ISA=name) == (name, "")


def test_an_instruction_set_that_cannot_run_is_not_used() -> None:
    backend, said = run(HALFBYTE_ISA="avx1024")
    assert backend == kernels.backends()[0]
    assert "avx1024 cannot run here" in said


def test_a_backend_holds_within_its_with_statement() -> None:
    before = kernels.backend()
    with kernels.use_backend("reference"):
        assert kernels.backend() == "reference"
    assert kernels.backend() == before
    with pytest.raises(ValueError, match="avx1024"), kernels.use_backend("avx1024"):
        pass


@pytest.mark.skipif(not NATIVE, reason="no native kernels here")
@pytest.mark.parametrize(("name", "search"), CASES)
def test_every_format_and_search_has_kernels_but_those_said_to_have_none(name: str, search: str) -> None:
    fmt = get_format(name)
    expected = name not in kernels.NUMPY_ONLY
    assert kernels.supports(fmt) == expected
    assert kernels.supports(fmt, get_search(search, fmt)) == expected


@pytest.mark.parametrize("name", sorted(kernels.NUMPY_ONLY))
def test_formats_without_kernels_are_encoded_and_decoded_by_the_reference(name: str) -> None:
    x = draw("normal", (4, 128), 1)
    found, expected = encode(x, name), reference(x, get_format(name), "sweep")
    assert not differences(found, expected)
    assert found.decode().tobytes() == get_format(name).decode(expected).tobytes()


def test_a_format_that_kernels_do_not_know_is_left_to_the_reference() -> None:
    odd = replace(get_format("nvfp4"), name="nvfp4_g24", block_shape=(1, 24))
    assert not kernels.supports(odd)
    x = draw("normal", (4, 48), 1)
    assert np.abs(encode(x, odd).decode() - x).max() < 0.5


def test_slices_in_many_threads_give_the_bytes_of_the_whole() -> None:
    x = draw("normal", (64, 512), 2)
    whole = encode(x, "mixfp4", global_scale=np.float32(0.001))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda p: encode(p, "mixfp4", global_scale=np.float32(0.001)), np.split(x, 32)))
    joined = QuantizedTensor(
        whole.format,
        whole.shape,
        np.concatenate([p.codes for p in parts]),
        np.concatenate([p.scales for p in parts]),
        whole.global_scale,
    )
    assert not differences(joined, whole)


def test_flushed_subnormals_of_other_libraries_change_nothing() -> None:
    torch = pytest.importorskip("torch")
    x = draw("normal", (4, 64), 3) * np.float32(1e-38)
    expected = encode(x, "mxfp4")
    torch.set_flush_denormal(True)
    try:
        assert not differences(encode(x, "mxfp4"), expected)
    finally:
        torch.set_flush_denormal(False)


def test_torch_tensors_are_seen_without_copies() -> None:
    torch = pytest.importorskip("torch")
    for name, expected in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float32", np.float32)):
        tensor = torch.randn(4, 64).to(getattr(torch, name))
        array = kernels.as_array(tensor)
        assert array.dtype == expected
        assert array.ctypes.data == tensor.data_ptr()
        assert not differences(encode(tensor, "nvfp4"), encode(np.array(array), "nvfp4"))


def test_torch_tensors_elsewhere_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(FormatError, match=r"meta cannot be quantized on the CPU; pass tensor\.cpu\(\)"):
        encode(torch.empty(4, 64, device="meta"), "nvfp4")
