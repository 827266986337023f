"""Encoding speed of other quantizers on one matrix and one thread, each in the Python that has it.

    python benchmarks/peers.py --engines DIR [-o benchmarks/results/peers.json]

DIR holds virtual environments named transformers (with compressed-tensors; the Python that runs this where there is
none), torchao, modelopt, mlx, llamacpp and fouroversix (numpy in each; modelopt also wants requests); those that are
missing are left out. Every peer gets the same 4096x4096 BF16 matrices (Gaussian and Student-t with 4 degrees of
freedom) and is timed by the CPU time of its process, median of several runs after a warm-up, fewer where one takes
seconds. halfbyte is measured in the same way, its errors not counted. Also run by ``benchmarks/run.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, head, write_results

N = K = 4096
# halfbyte's formats and searches beside the peers'
OURS = (
    ("nvfp4", "absmax"),
    ("nvfp4", "four_over_six"),
    ("nvfp4", "sweep"),
    ("mxfp4", "absmax"),
    ("mixfp4", "sweep"),
    ("if4", "absmax"),
    ("int4_g128", "absmax"),
    ("affine4_g64", "absmax"),
)
# seconds that the runs of one case take together, about
ENOUGH = 4.0
Case = tuple[str, Callable[[], Any]]


def matrices(folder: Path) -> dict[str, Path]:
    """BF16 matrices as uint16 .npy files."""
    import numpy as np

    found = {}
    for name in ("gaussian", "student_t"):
        rng = np.random.default_rng(7)
        x = rng.standard_normal((N, K), dtype=np.float32) if name == "gaussian" else rng.standard_t(4, (N, K))
        bits = (x * 0.02).astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        found[name] = folder / f"{name}.npy"
        np.save(found[name], rounded.astype(np.uint16))
    return found


def float32(path: Path) -> Any:
    """The matrix as FP32."""
    import numpy as np

    return (np.load(path).astype(np.uint32) << 16).view(np.float32)


def torch_bf16(path: Path) -> Any:
    """The matrix as a torch BF16 tensor, on one thread."""
    import torch

    torch.set_num_threads(1)
    return torch.from_numpy(float32(path)).bfloat16()


def transformers(path: Path) -> Iterator[Case]:
    """compressed-tensors: scales by its own rules, then its compressor."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    w = torch_bf16(path)

    def run(preset: str, compressor: str, group: int) -> None:
        scheme = preset_name_to_scheme(preset, ["Linear"])
        blocks = w.reshape(N, K // group, group)
        low, high = blocks.amin(-1), blocks.amax(-1)
        glob = generate_gparam(w.min(), w.max()) if preset.startswith("NVFP4") else None
        scale, _ = calculate_qparams(low, high, scheme.weights, global_scale=glob)
        state = {"weight": w, "weight_scale": scale}
        if glob is not None:
            state["weight_global_scale"] = glob.reshape(1).to(torch.float32)
        BaseCompressor.get_value_from_registry(compressor).compress(state, scheme)

    yield "compressed-tensors nvfp4", lambda: run("NVFP4A16", "nvfp4-pack-quantized", 16)
    yield "compressed-tensors mxfp4", lambda: run("MXFP4A16", "mxfp4-pack-quantized", 32)
    yield "compressed-tensors int4_g128", lambda: run("W4A16", "pack-quantized", 128)


def torchao(path: Path) -> Iterator[Case]:
    """torchao's reference tensors, eager."""
    import torch
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    w = torch_bf16(path)
    fp4 = torch.float4_e2m1fn_x2
    yield "torchao nvfp4", lambda: NVFP4Tensor.to_nvfp4(w, per_tensor_scale=w.abs().max().float() / 2688)
    yield "torchao mxfp4", lambda: to_mx(w, fp4, 32, ScaleCalculationMode.FLOOR)


def modelopt(path: Path) -> Iterator[Case]:
    """NVIDIA ModelOpt's NVFP4 tensor."""
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

    w = torch_bf16(path)
    yield "modelopt nvfp4", lambda: NVFP4QTensor.quantize(w, 16)
    yield "modelopt mxfp4", lambda: MXFP4QTensor.quantize(w, 32)


def mlx(path: Path) -> Iterator[Case]:
    """MLX on the CPU."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    w = mx.array(float32(path)).astype(mx.bfloat16)
    mx.eval(w)
    for mode, group, bits in (("nvfp4", 16, 4), ("mxfp4", 32, 4), ("affine", 64, 4)):
        yield f"mlx {mode}", lambda m=mode, g=group, b=bits: mx.eval(mx.quantize(w, group_size=g, bits=b, mode=m))


def llamacpp(path: Path) -> Iterator[Case]:
    """gguf-py, and llama.cpp's own C quantizers through the shared library of its wheel."""
    import ctypes

    import gguf
    import numpy as np
    import xllamacpp
    from gguf.quants import quantize

    w = float32(path)
    for name in ("MXFP4", "Q4_0"):
        kind = getattr(gguf.GGMLQuantizationType, name)
        yield f"gguf-py {name.lower()}", lambda k=kind: quantize(w, k)
    library = ctypes.CDLL(next(str(p) for p in Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")))
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    types = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    chunk.argtypes = types
    out = np.empty(N * K, np.uint8)
    for name, kind in (("MXFP4", 39), ("NVFP4", 40), ("Q4_0", 2)):
        run = lambda k=kind: chunk(k, w.ctypes.data, out.ctypes.data, 0, N, K, None)  # noqa: E731
        yield f"llama.cpp {name.lower()}", run


def fouroversix(path: Path) -> Iterator[Case]:
    """fouroversix' torch reference."""
    import fouroversix as library

    w = torch_bf16(path)
    for name, settings in (
        ("nvfp4", {"dtype": "nvfp4", "scale_rule": "static_6"}),
        ("four_over_six", {"dtype": "nvfp4", "scale_rule": "mse"}),
        ("if4", {"dtype": "if4", "scale_rule": "mse"}),
    ):
        config = library.QuantizationConfig(backend="pytorch", **settings)
        yield f"fouroversix {name}", lambda c=config: library.quantize_to_fp4(w, c)


def halfbyte(path: Path) -> Iterator[Case]:
    """halfbyte itself."""
    import ml_dtypes
    import numpy as np

    from halfbyte.search import encode

    w = np.load(path).view(ml_dtypes.bfloat16)
    for name, search in OURS:
        yield f"halfbyte {name} {search}", lambda n=name, s=search: encode(w, n, s)


PEERS = {f.__name__: f for f in (halfbyte, transformers, torchao, modelopt, mlx, llamacpp, fouroversix)}
LIBRARIES = {
    "halfbyte": ["halfbyte", "numpy"],
    "transformers": ["compressed-tensors", "torch"],
    "torchao": ["torchao", "torch"],
    "modelopt": ["nvidia-modelopt", "torch"],
    "mlx": ["mlx"],
    "llamacpp": ["gguf", "xllamacpp"],
    "fouroversix": ["fouroversix", "torch"],
}


def measure(peer: str, path: Path, runs: int) -> dict[str, Any]:
    """Median CPU seconds per case, and versions; run inside the peer's own Python."""
    from importlib.metadata import version

    rows: dict[str, Any] = {}
    for name, call in PEERS[peer](path):
        try:
            call()
            times = []
            for _ in range(runs):
                began = time.process_time()
                call()
                times.append(time.process_time() - began)
                if sum(times) > ENOUGH:
                    break
            rows[name] = {"seconds": statistics.median(times), "gb_per_s": N * K * 2 / statistics.median(times) / 1e9}
        except Exception as error:
            rows[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
    return {"versions": {n: version(n) for n in LIBRARIES[peer]}, "rows": rows}


def run_all(engines: Path, runs: int = 5) -> dict[str, Any]:
    """All peers that are installed under ``engines``, each in a process of its own."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, path in matrices(Path(folder)).items():
            for peer in PEERS:
                python = engines / peer / "bin" / "python"
                if peer == "halfbyte" or (peer == "transformers" and not python.exists()):
                    python = Path(sys.executable)
                if not python.exists():
                    print(f"{peer}: not installed, left out", file=sys.stderr)
                    continue
                command = [str(python), __file__, "--measure", peer, "--matrix", str(path), "--runs", str(runs)]
                threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
                done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
                if done.returncode:
                    print(f"{peer}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                    continue
                found.setdefault(kind, {})[peer] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=Path, help="folder of virtual environments")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--matrix", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.matrix, args.runs)))
        return
    write_results(args.output, head() | {"matrices": run_all(args.engines or Path("engines"), args.runs)})


if __name__ == "__main__":
    main()
