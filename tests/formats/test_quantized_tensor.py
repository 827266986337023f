from __future__ import annotations

import subprocess
import sys

import numpy as np

from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.search import encode


def test_nbytes_counts_every_stored_array() -> None:
    x = np.random.RandomState(0).standard_normal((3, 8, 64)).astype(np.float32)
    assert encode(x, "nvfp4").nbytes == 3 * 8 * (32 + 4) + 3 * 4
    assert encode(x, "int4_asym_g32").nbytes == 3 * 8 * (32 + 2 * 2 + 2)


def test_tables_tells_the_choice_of_each_block() -> None:
    scales = np.array([[0x38, 0xB8]], dtype=np.uint8)
    codes = np.zeros((1, 16), dtype=np.uint8)
    q = QuantizedTensor(get_format("mixfp4"), (1, 32), codes, scales, np.float32(1))
    assert q.codebooks.tolist() == [[0, 1]]
    q = QuantizedTensor(get_format("razer_e3m3"), (1, 32), codes, np.array([[0x10, 0xD0]], np.uint8), np.float32(1))
    assert q.codebooks.tolist() == [[0, 3]]


def test_the_tensor_scale_of_each_expert_is_its_own() -> None:
    x = np.random.RandomState(0).standard_normal((2, 4, 32)).astype(np.float32) * [[[1]], [[100]]]
    q = encode(x.astype(np.float32), "nvfp4")
    assert q.global_scale is not None and q.global_scale.shape == (2,)
    assert np.array_equal(q.global_scale, (np.abs(x).max(axis=(1, 2)) / 2688).astype(np.float32))


def test_decoding_is_compiled_whatever_was_imported_before() -> None:
    code = """
import sys
import numpy as np
from halfbyte.formats import QuantizedTensor, get_format
assert "halfbyte.kernels" not in sys.modules
tensor = QuantizedTensor(get_format("mxfp4"), (1, 32), np.full((1, 16), 0x22, np.uint8), np.full((1, 1), 127, np.uint8))
assert (tensor.decode() == 1).all() and "halfbyte.kernels" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
