"""Record what independent quantizers make of frozen inputs, as digests in tests/golden/<package>.json.

Run it in an environment that has the package; halfbyte is not needed there:

    python scripts/make_golden_vectors.py fouroversix   # fouroversix, torch
    python scripts/make_golden_vectors.py torchao       # torchao, torch
    python scripts/make_golden_vectors.py mlx           # mlx
    python scripts/make_golden_vectors.py gguf          # gguf

The tests encode the same inputs (tests/formats/streams.py) and compare digests; none of the packages is then needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

from formats.streams import STREAMS, digests, fingerprints, random_bytes  # noqa: E402

Cases = dict[str, Any]


def fouroversix() -> Cases:
    """Codes and scales of NVFP4 (static and adaptive), IF4 and NVINT4 by the package's PyTorch reference."""
    import torch
    from fouroversix import QuantizationConfig, quantize_to_fp4

    torch.set_num_threads(1)
    rules = {
        "nvfp4": ("static_6", "mse", "mae", "abs_max"),
        "if4": ("mse",),
        "nvint4": ("static_6",),
    }
    cases: Cases = {}
    for stream in ("frozen", "gaussian", "laplace", "student", "gaussian_bf16"):
        x = STREAMS[stream]()
        rows, blocks = x.shape[0], x.shape[1] // 16
        for dtype, names in rules.items():
            for rule in names:
                config = QuantizationConfig(dtype=dtype, scale_rule=rule, backend="pytorch")
                found = quantize_to_fp4(torch.from_numpy(x), config)
                scales = found.scale_factors.view(torch.uint8).numpy()
                if found.scale_factors_are_in_blackwell_layout:
                    # 128x4 tiles, rows interleaved by 32
                    scales = scales.reshape(rows // 128, blocks // 4, 32, 4, 4).transpose(0, 3, 2, 1, 4)
                scales = np.ascontiguousarray(scales.reshape(rows, blocks))
                codes = found.values.numpy()
                cases[f"{dtype}/{rule}/{stream}"] = _record(codes, scales, stream)
    return cases


def torchao() -> Cases:
    """Codes and scales of MXFP4 and MXFP8 by the four scale rules, and of NVFP4 with a global scale."""
    import torch
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    torch.set_num_threads(1)
    cases: Cases = {}
    for stream in ("frozen", "gaussian", "gaussian_bf16", "edges"):
        x = torch.from_numpy(STREAMS[stream]())
        for name, dtype in (("mxfp4", torch.float4_e2m1fn_x2), ("mxfp8", torch.float8_e4m3fn)):
            for rule in ("floor", "rceil", "even"):
                scales, codes = to_mx(x, dtype, 32, ScaleCalculationMode[rule.upper()])
                cases[f"{name}/{rule}/{stream}"] = {
                    "codes": digests(codes.view(torch.uint8).numpy()),
                    "scales": digests(scales.view(torch.uint8).numpy()),
                }
        if stream != "edges":
            found = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=x.abs().max() / 2688)
            scales, codes = found.scale.view(torch.uint8).numpy(), found.qdata.numpy()
            cases[f"nvfp4/two_level/{stream}"] = _record(codes, scales, stream)
    return cases


def mlx() -> Cases:
    """FP32 values of random codes and scales in MLX's four modes, and its affine scales and biases."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    cases: Cases = {}
    words = random_bytes((64, 512), 10).view(np.uint32)
    for mode, bits, group, low, high in (
        ("mxfp4", 4, 32, 20, 220),
        ("nvfp4", 4, 16, 0, 127),
        ("mxfp8", 8, 32, 20, 220),
    ):
        codes = words if bits == 4 else _without_nan(words)
        scales = random_bytes((64, 1024 * 4 // bits // group), 11, low, high)
        values = mx.dequantize(
            mx.array(codes), mx.array(scales), group_size=group, bits=bits, mode=mode, dtype=mx.float32
        )
        cases[f"{mode}/decode"] = {"values": digests(np.array(values))}
    for bits, group in ((4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (8, 128)):
        for stream in ("frozen", "gaussian_bf16"):
            x = mx.array(STREAMS[stream]()).astype(mx.bfloat16)
            codes, scales, biases = mx.quantize(x, group_size=group, bits=bits)
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            values = mx.dequantize(codes, scales, biases, group_size=group, bits=bits)
            cases[f"affine{bits}_g{group}/{stream}"] = {
                "scales": digests(np.array(scales)),
                "biases": digests(np.array(biases)),
                "values": digests(np.array(values)),
                "mse": float(((np.array(values, dtype=np.float64) - np.array(x.astype(mx.float32))) ** 2).mean()),
            }
    return cases


def gguf() -> Cases:
    """The table of IQ4_NL and FP32 values of random MXFP4 and NVFP4 blocks."""
    from gguf import GGMLQuantizationType, quants

    cases: Cases = {"iq4_nl/table": {"values": [int(v) for v in quants.IQ4_NL.kvalues]}}
    mx = random_bytes((64, 8, 17), 12)
    mx[..., 0] = random_bytes((64, 8), 13, 20, 220)
    values = quants.dequantize(mx.reshape(64, -1), GGMLQuantizationType.MXFP4)
    cases["mxfp4/decode"] = {"values": digests(values + np.float32(0))}  # gguf's zeros have no definite sign
    nv = random_bytes((64, 4, 36), 14)
    nv[..., :4] = random_bytes((64, 4, 4), 15, 0, 127)
    values = quants.dequantize(nv.reshape(64, -1), GGMLQuantizationType.NVFP4)
    cases["nvfp4/decode"] = {"values": digests(values + np.float32(0))}
    return cases


def _record(codes: Any, scales: Any, stream: str) -> dict[str, Any]:
    """Digests; for BF16 inputs, whose many ties fall differently, also fingerprints of 2048 blocks to count."""
    found: dict[str, Any] = {"codes": digests(codes), "scales": digests(scales)}
    if stream == "gaussian_bf16":
        found["first_2048_blocks"] = fingerprints(codes.reshape(-1, 8)[:2048], scales.reshape(-1)[:2048]).hex()
    return found


def _without_nan(words: Any) -> Any:
    codes = words.view(np.uint8).copy()
    codes[(codes & 127) == 127] = 0
    return codes.view(np.uint32)


PACKAGES = {f.__name__: f for f in (fouroversix, torchao, mlx, gguf)}


def main() -> None:
    """Write the golden file of one package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=PACKAGES)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "tests" / "golden")
    arguments = parser.parse_args()
    cases = PACKAGES[arguments.package]()
    versions = {"numpy": np.__version__, arguments.package: version(arguments.package)}
    if "torch" in sys.modules:
        versions["torch"] = version("torch")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.package}.json"
    path.write_text(json.dumps({"versions": versions, "cases": cases}, indent=1) + "\n")
    print(f"{path}: {len(cases)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
