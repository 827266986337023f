from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from halfbyte.kernels import linear
from halfbyte.kernels.linear import PackedDense, PackedExperts, PackedLinear
from kernels.linear_cases import ISAS, activations, as_bf16, weight

NAMES = ("mixfp4", "mxfp4", "int4_g128", "affine4_g64", "iq4_nl", "razer_e3m3", "hif4", "q8_0", "nf4", "fp8_channel")


@pytest.fixture(autouse=True)
def one_thread_afterwards():
    yield
    linear.set_threads(1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_same_bits_in_any_batch(name: str, isa: str) -> None:
    packed = PackedLinear(weight(name, (35, 384)))
    x = activations(70, 384)
    with linear.use_isa(isa):
        for mode in ("exact", "int8"):
            for rows in (x, as_bf16(x)):
                alone = np.concatenate([packed(rows[t : t + 1], mode) for t in range(70)])
                for size in (2, 3, 4, 5, 8, 33, 65, 70):
                    assert packed(rows[:size], mode).tobytes() == alone[:size].tobytes()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    packed, x = PackedLinear(weight("mixfp4", (1200, 1024))), activations(9, 1024)
    dense = PackedDense(as_bf16(activations(1200, 1024)))
    results = []
    for count in (1, 2, 3, 7):
        linear.set_threads(count)
        assert linear.threads() == count
        results.append([packed(x).tobytes(), packed(x, "int8").tobytes(), dense(x).tobytes()])
    assert all(result == results[0] for result in results)


def test_calls_from_many_threads_at_once() -> None:
    linear.set_threads(3)
    packed, x = PackedLinear(weight("mixfp4", (1040, 1024))), activations(4, 1024)
    wanted = packed(x, "int8").tobytes()
    with ThreadPoolExecutor(4) as threads:
        assert all(y == wanted for y in threads.map(lambda _: packed(x, "int8").tobytes(), range(60)))


def test_python_runs_while_a_product_does() -> None:
    packed, x = PackedLinear(weight("mixfp4", (2048, 2048))), activations(256, 2048)
    ticks, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)

    counter = threading.Thread(target=count)
    counter.start()
    before = ticks[0]
    packed(x)
    during = ticks[0] - before
    stop.set()
    counter.join()
    assert during > 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_multiplies_too() -> None:
    program = (
        "import os, sys, numpy as np\n"
        "from halfbyte.kernels import linear\n"
        "from kernels.linear_cases import weight, activations\n"
        "linear.set_threads(3)\n"
        "packed, x = linear.PackedLinear(weight('mixfp4', (1040, 1024))), activations(4, 1024)\n"
        "wanted = packed(x).tobytes()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if packed(x).tobytes() == wanted and packed(x).tobytes() == wanted else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0 and packed(x).tobytes() == wanted\n"
    )
    folder = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_number_of_threads_is_checked() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        linear.set_threads(0)


def test_experts_do_not_depend_on_threads_and_batch() -> None:
    experts = PackedExperts(weight("mixfp4", (6, 512, 256)), weight("mixfp4", (6, 256, 256), 1))
    x, r = activations(40, 256), np.random.RandomState(0)
    chosen = np.stack([r.permutation(6)[:3] for _ in range(40)])
    shares = r.uniform(0, 1, (40, 3))
    results = []
    for count in (1, 3):
        linear.set_threads(count)
        for mode in ("exact", "int8"):
            together = experts(x, chosen, shares, mode)
            alone = [experts(x[t : t + 1], chosen[t : t + 1], shares[t : t + 1], mode) for t in range(40)]
            assert together.tobytes() == np.concatenate(alone).tobytes()
            results.append(together.tobytes())
    assert results[:2] == results[2:]
