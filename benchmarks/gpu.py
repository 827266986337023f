"""Everything about the GPU kernels in one call: correctness first, then times, as JSON that is written after each part.

    python benchmarks/gpu.py gpu.json                  on a machine with a CUDA device, in less than 8 minutes
    python benchmarks/gpu.py gpu.json --smoke          the same code in Triton's interpreter, with tiny shapes: no times

Times are those of CUDA graphs of several calls whose weights rotate through more than the cache, so that they come
from memory. A part that fails says so in the JSON, and the others run; what the time did not suffice for is listed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update({"TRITON_INTERPRET": "1"} if "--smoke" in sys.argv else {})

import numpy as np
import torch

from halfbyte.formats import BlockFormat, QuantizedTensor, get_format
from halfbyte.gpu.device_encode import prepare
from halfbyte.gpu.device_experts import DeviceExperts
from halfbyte.gpu.device_linear import DeviceLinear
from halfbyte.gpu.word_packing import pack_words
from halfbyte.search import get_search
from halfbyte.search.encode import empty

SMOKE = "--smoke" in sys.argv
FORMATS = ("nvfp4", "mixfp4", "if4", "razer", "nf4", "mxfp4", "int4_g128")
TIMED = ("mixfp4", "nvfp4", "if4")
SHAPES = ((4096, 4096), (8192, 8192), (2048, 8192))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
EXPERTS = (256, 1024, 2048, 2048)  # experts, rows of gate and up, columns, rows of down
MIXTURE_TOKENS = (1, 8, 32, 128)
CACHE_BYTES = 256 << 20
CALLS = 20


class Run:
    """The document that grows, the device, and the time that is left."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.end = path, time.monotonic() + seconds
        self.device = torch.device("cpu" if SMOKE else "cuda")
        self.document: dict[str, Any] = {"smoke": SMOKE, "left_out": [], "failed": {}}

    def part(self, name: str, work: Callable[[Run], Any]) -> None:
        """Run a part, keep what it returns or how it failed, and write the document."""
        started = time.monotonic()
        try:
            self.document[name] = work(self)
        except Exception as error:  # the other parts still tell something
            self.document["failed"][name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
        self.document.setdefault("seconds", {})[name] = round(time.monotonic() - started, 1)
        self.path.write_text(json.dumps(self.document, indent=1) + "\n")
        print(f"{name}: {self.document['seconds'][name]} s" + (" FAILED" if name in self.document["failed"] else ""))

    def has_time(self, what: str) -> bool:
        """Whether there is time for something, which is listed otherwise."""
        if time.monotonic() < self.end:
            return True
        self.document["left_out"].append(what)
        return False


def random_weight(name: str, shape: tuple[int, ...], seed: int = 0) -> QuantizedTensor:
    """Random codes that encoders write, with scales around 2^-4 and both selectors."""
    fmt, r = get_format(name), np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for part, (dtype, size) in fmt.parts(shape).items():
        if part == "codes":
            codes = r.integers(0, 256, size, dtype=np.uint8)
            low, high = codes & 15, codes >> 4
            arrays[part] = np.where(low == 8, 0, low) | np.where(high == 8, 0, high) << 4
        elif part == "scales" and np.dtype(dtype) == np.uint8:
            middle = 123 if fmt.scale is not None and fmt.scale.name == "e8m0" else 24
            selector = 0x80 if len(fmt.codebooks) > 1 else 0
            arrays[part] = (r.integers(middle, middle + 8, size) | r.integers(0, 256, size) & selector).astype(np.uint8)
        else:
            arrays[part] = np.full(size, 2.0**-4, dtype=dtype)
    return QuantizedTensor(fmt, shape, **arrays)


def activations(run: Run, rows: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal activations."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, k, generator=generator).to(dtype).to(run.device)


def about(run: Run) -> dict[str, Any]:
    """Versions, device, and what it reads per second."""
    import triton

    facts: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    if not SMOKE:
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": properties.name, "capability": torch.cuda.get_device_capability(0)}
        facts["cuda"], facts["units"] = torch.version.cuda, properties.multi_processor_count
        held = torch.zeros(1 << 29, dtype=torch.int32, device=run.device)
        facts["read_gbs"] = round(held.nbytes / microseconds(run, [lambda: held.sum()]) / 1e3, 1)
    return facts


def correctness(run: Run) -> dict[str, Any]:
    """Largest error relative to the largest result, of products and of decoded weights, against FP64."""
    found = {}
    rows, (n, k) = ((1, 3), (40, 272)) if SMOKE else ((1, 8, 16, 33, 129), (1000, 2064))
    # the interpreter's products of BF16 are wrong
    dtypes = (torch.float16, torch.float32) if SMOKE else (torch.bfloat16, torch.float16, torch.float32)
    for name in FORMATS:
        columns = max(get_format(name).block[1], 16)
        tensor = random_weight(name, (n, k // columns * columns))
        product = DeviceLinear(tensor, device=run.device)
        dense = torch.from_numpy(tensor.decode()).double().to(run.device)
        for dtype in dtypes:
            for m in rows:
                x = activations(run, m, dense.shape[1], dtype)
                key = f"{name} {str(dtype).removeprefix('torch.')} {m}"
                try:
                    y = product(x)
                except Exception as error:
                    found[key] = f"{type(error).__name__}: {error}"
                    continue
                wanted = x.double() @ dense.T
                found[key] = float((y.double() - wanted).abs().max() / wanted.abs().max())
    return found


def mixtures_correct(run: Run) -> dict[str, Any]:
    """The same for a mixture of experts, and whether two runs give the same bits."""
    count, width, k, n = (4, 32, 144, 40) if SMOKE else (16, 512, 1024, 768)
    up, down = random_weight("mixfp4", (count, 2 * width, k), 1), random_weight("mixfp4", (count, n, width), 2)
    mixture = DeviceExperts(up, down, device=run.device)
    dtype = torch.float32 if SMOKE else torch.bfloat16
    x, tokens = activations(run, 5 if SMOKE else 37, k, dtype), 5 if SMOKE else 37
    generator = torch.Generator().manual_seed(7)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(tokens)]).to(run.device)
    shares = torch.rand(tokens, 2, generator=generator).to(run.device)
    y, again = mixture(x, chosen, shares), mixture(x, chosen, shares)
    first, second = (torch.from_numpy(t.decode()).double().to(run.device) for t in (up, down))
    wanted = torch.zeros(tokens, n, dtype=torch.float64, device=run.device)
    for slot in range(2):
        gate, up_part = torch.einsum("tk,tnk->tn", x.double(), first[chosen[:, slot]]).chunk(2, -1)
        hidden = torch.nn.functional.silu(gate) * up_part
        wanted += shares[:, slot, None].double() * torch.einsum("tk,tnk->tn", hidden, second[chosen[:, slot]])
    error = float((y.double() - wanted).abs().max() / wanted.abs().max())
    return {"error": error, "same_bits": bool(torch.equal(y, again))}


def microseconds(run: Run, calls: list[Callable[[], Any]], rounds: int = 5) -> float:
    """The median time of a call within a CUDA graph of all of them; 0.0 in the interpreter, after one call."""
    if SMOKE:
        calls[0]()
        return 0.0
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    repeats = max(1, CALLS // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (repeats * len(calls)))
    return sorted(times)[rounds // 2]


def copies_of(nbytes: int) -> int:
    """Copies of a weight that together are larger than the cache."""
    return 1 if SMOKE else max(2, min(CALLS, -(-CACHE_BYTES // nbytes)))


def dense(run: Run) -> list[dict[str, Any]]:
    """Microseconds per call: BF16 by the device's library, and each format, by shape and batch."""
    rows = []
    shapes = ((48, 256),) if SMOKE else SHAPES
    batches = (1, 16) if SMOKE else BATCHES
    dtype = torch.float32 if SMOKE else torch.bfloat16
    for n, k in shapes:
        if not run.has_time(f"dense {n}x{k}"):
            continue
        timed = {m: {"shape": [n, k], "batch": m} for m in batches}
        plain = [torch.randn(n, k, device=run.device).to(dtype) for _ in range(copies_of(2 * n * k))]
        for m in batches:
            x = activations(run, m, k, dtype)
            timed[m]["bf16_us"] = microseconds(run, [partial(torch.nn.functional.linear, x, w) for w in plain])
        del plain
        for name in TIMED:
            packed = pack_words(random_weight(name, (n, k)))
            count = copies_of(n * k * 9 // 16)
            products = [DeviceLinear(packed, device=run.device) for _ in range(count)]
            for m in batches:
                x = activations(run, m, k, dtype)
                timed[m][f"{name}_us"] = microseconds(run, [partial(product, x) for product in products])
        rows += timed.values()
    return rows


def marlin(run: Run) -> Any:
    """vLLM's Marlin NVFP4 at the same shapes, where vLLM is installed."""
    if SMOKE:
        return "not in the interpreter"
    try:
        from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_fp4
    except ImportError as error:
        return f"vLLM is not installed here: {error}"
    rows = []
    for n, k in SHAPES:
        if not run.has_time(f"marlin {n}x{k}"):
            continue
        source = torch.randn(n, k, device=run.device, dtype=torch.bfloat16) / 50
        _, codes, scales, factor = marlin_utils_fp4.rand_marlin_weight_nvfp4_like(source, 16)
        workspace = marlin_utils.marlin_make_workspace_new(run.device)
        held = [(codes.clone(), scales.clone()) for _ in range(copies_of(n * k * 9 // 16))]
        multiply = partial(marlin_utils_fp4.apply_fp4_marlin_linear, size_n=n, size_k=k)
        for m in BATCHES:
            x = activations(run, m, k, torch.bfloat16)
            calls = [partial(multiply, x, *pair, factor, workspace) for pair in held]
            rows.append({"shape": [n, k], "batch": m, "marlin_us": microseconds(run, calls)})
    return rows


def experts(run: Run) -> list[dict[str, Any]]:
    """Microseconds of a layer of experts, top 8, and of BF16 grouped products where torch has them."""
    count, rows, k, n = (4, 64, 144, 40) if SMOKE else EXPERTS
    slots, dtype = (2, torch.float32) if SMOKE else (8, torch.bfloat16)
    one_up, one_down = random_weight("mixfp4", (1, rows, k)), random_weight("mixfp4", (1, n, rows // 2))
    up, down = (stack_of(t, count) for t in (one_up, one_down))
    mixture = DeviceExperts(up, down, device=run.device)
    timed = []
    for tokens in (3,) if SMOKE else MIXTURE_TOKENS:
        if not run.has_time(f"experts, {tokens} tokens"):
            continue
        x = activations(run, tokens, k, dtype)
        scores = torch.rand(tokens, count, generator=torch.Generator().manual_seed(tokens))
        chosen = scores.topk(slots).indices.to(run.device)
        shares = torch.full((tokens, slots), 1 / slots, device=run.device)
        row = {"tokens": tokens, "experts": count, "used": int(chosen.unique().numel())}
        row["mixfp4_us"] = microseconds(run, [partial(mixture, x, chosen, shares)])
        row["bf16_us"] = None if SMOKE else grouped(run, x, chosen, (count, rows, k, n))
        timed.append(row)
    return timed


def stack_of(tensor: QuantizedTensor, count: int) -> QuantizedTensor:
    """The same expert several times."""
    arrays = {name: np.repeat(getattr(tensor, name), count, axis=0) for name in ("codes", "scales", "global_scale")}
    return QuantizedTensor(tensor.format, (count, *tensor.shape[1:]), **arrays)


def grouped(run: Run, x: torch.Tensor, chosen: torch.Tensor, shape: tuple[int, ...]) -> Any:
    """Microseconds of gate, up and down as two grouped BF16 products, without sorting and sums; or why not."""
    count, rows, k, n = shape
    try:
        up = torch.empty(count, rows, k, dtype=torch.bfloat16, device=run.device).normal_()
        down = torch.empty(count, n, rows // 2, dtype=torch.bfloat16, device=run.device).normal_()
        order = chosen.reshape(-1).argsort()
        ends = torch.bincount(chosen.reshape(-1), minlength=count).cumsum(0).to(torch.int32)
        held = x[order // chosen.shape[1]].contiguous()

        def call() -> torch.Tensor:
            gate, value = torch._grouped_mm(held, up.transpose(1, 2), ends).chunk(2, -1)
            return torch._grouped_mm(torch.nn.functional.silu(gate) * value, down.transpose(1, 2), ends)

        return microseconds(run, [call])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def encoding(run: Run) -> dict[str, float]:
    """GB/s of BF16 weights that searches encode, without copies from and to the host."""
    n, k = (8, 64) if SMOKE else (8192, 8192)
    dtype = torch.float32 if SMOKE else torch.bfloat16
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = {}
    for name in ("nvfp4", "mixfp4"):
        for search in ("absmax", "four_over_six", "sweep"):
            fmt, chosen = get_format(name), get_search(search)
            assert isinstance(fmt, BlockFormat)
            out = empty(fmt, (n, k))
            out.global_scale = np.asarray(np.float32(1e-3))
            launch, _, _ = prepare(values.to(run.device), out, fmt, chosen)
            taken = microseconds(run, [launch])
            found[f"{name} {search}"] = round(values.nbytes / taken / 1e3, 1) if taken else 0.0
    return found


def summary(run: Run) -> dict[str, Any]:
    """The targets of docs/gpu.md against what was measured."""
    rows, bandwidth = run.document.get("dense", []), run.document.get("about", {}).get("read_gbs")
    if not bandwidth or not rows:
        return {"not_measured": "no CUDA device"}
    first = [r for r in rows if r["batch"] <= 16]
    shares = [r["shape"][0] * r["shape"][1] * 9 / 16 / bandwidth / 1e3 / r["mixfp4_us"] for r in first]
    return {
        "least_share_of_memory_to_batch_16": round(min(shares), 3),
        "least_speed_up_to_batch_64": round(min(r["bf16_us"] / r["mixfp4_us"] for r in rows if r["batch"] <= 64), 2),
        "speed_up_at_batch_1": [round(r["bf16_us"] / r["mixfp4_us"], 2) for r in rows if r["batch"] == 1],
        "mixfp4_over_nvfp4": round(max(r["mixfp4_us"] / r["nvfp4_us"] for r in first), 3),
    }


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seconds", type=float, default=420.0, help="begin nothing new after this time")
    arguments = parser.parse_args()
    if not SMOKE and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --smoke runs the same code in Triton's interpreter")
    run = Run(arguments.json, arguments.seconds)
    for name, work in (
        ("about", about),
        ("correctness", correctness),
        ("mixtures_correct", mixtures_correct),
        ("dense", dense),
        ("experts", experts),
        ("encoding", encoding),
        ("marlin", marlin),
        ("summary", summary),
    ):
        run.part(name, work)
    if run.document["failed"]:
        raise SystemExit(f"failed: {', '.join(run.document['failed'])} (see {arguments.json})")


if __name__ == "__main__":
    main()
