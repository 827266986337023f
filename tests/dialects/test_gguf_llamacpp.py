"""GGUF files run in llama.cpp (the wheel xllamacpp): the same tokens and log-probs as transformers with our values.

With FP32 weights and one quantized embedding both programs compute the same numbers: that shows names, order of rows,
metadata and tokenizer. With quantized matrices llama.cpp also rounds the activations to 8 bits, so there log-probs are
near and not equal.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.checkpoint import Reader
from halfbyte.dialects.gguf_vocab import _SPLITS
from halfbyte.source.checkpoint import Checkpoint
from small_models import linear, recipe, run

llama = pytest.importorskip("xllamacpp")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = (
    "The city of Paris is",
    "In 1914 the war began, and it's the first time that 12345 soldiers",
    "  spaces   and\n\nnewlines\tand tabs",
    "Once upon a time, there was a little girl named Lily. She loved",
    "naïve café — “quotes” 東京 🚀!!",
    "He said: 'I'll do it, we're DONE' [x+y=2]",
)
EMBEDDING = recipe({"match": "embedding", "format": "q8_0", "scale_search": "absmax"})
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    # llama.cpp knows no other way
    "truncate": True,
    "original_max_position_embeddings": 256,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
MOE = {"moe_intermediate_size": 64, "num_experts": 8, "norm_topk_prob": True}
MADE: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama3": (
        "LlamaConfig",
        {"rope_parameters": LLAMA3, "intermediate_size": 256, "attention_bias": True},
        "llama-bpe",
    ),
    "qwen3moe": ("Qwen3MoeConfig", {**EXPERTS, **MOE}, "qwen2"),
    "gpt-oss": (
        "GptOssConfig",
        {**EXPERTS, "num_local_experts": 4, "sliding_window": 16, "rope_parameters": PLAIN},
        "gpt-4o",
    ),
    "gpt-oss-yarn": (
        "GptOssConfig",
        {**EXPERTS, "num_local_experts": 4, "sliding_window": 16, "rope_parameters": YARN},
        "gpt-4o",
    ),
}


def made(name: str, shared: Path, folder: Path) -> Path:
    """A model with random FP32 weights, and the tokenizer of a trained one with the rules that it would have."""
    kind, more, split = MADE[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES, **more))
    for key, parameter in model.named_parameters():
        if "norm" in key:
            torch.nn.init.normal_(parameter, 1, 0.2)
        else:
            torch.nn.init.normal_(parameter, 0, 0.08 if parameter.dim() > 1 else 0.3)
    # ends of text and parts of characters are never the likeliest: llama.cpp gives no log-probs of them
    with torch.no_grad():
        model.lm_head.weight[:260] = 0
    model.save_pretrained(folder)
    source = shared / "data" / "models" / "qwen3-tiny-wiki"
    table = json.loads((source / "tokenizer.json").read_text())
    regex = next(pattern for pattern, known in _SPLITS.items() if known == split)
    table["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex
    table["model"]["ignore_merges"] = split == "llama-bpe"
    (folder / "tokenizer.json").write_text(json.dumps(table))
    (folder / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    return folder


class Engine:
    """llama.cpp with a model, and transformers with the values that the file decodes to."""

    def __init__(self, source: Path, out: Path) -> None:
        settings = llama.CommonParams()
        settings.model.path = str(next(out.glob("*.gguf")))
        settings.n_gpu_layers, settings.cpuparams.n_threads, settings.warmup, settings.verbosity = 0, 1, False, -1
        settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = llama.Server(settings)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        config = transformers.AutoConfig.from_pretrained(source)
        self.model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        found = self.model.load_state_dict(dict(values(out)), strict=False)
        self.model.tie_weights()
        assert not found.unexpected_keys
        assert set(found.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())

    def tokens(self, text: str) -> list[int]:
        """What llama.cpp makes of a text."""
        body = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
        request = urllib.request.Request(
            self.server.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return list(json.load(answer)["tokens"])

    def difference(self, text: str) -> float:
        """The largest difference among the 20 likeliest next tokens' log-probs."""
        ids = self.tokenizer(text)["input_ids"]
        assert ids == self.tokens(text), text
        asked = {"prompt": ids, "n_predict": 1, "n_probs": 20, "temperature": 0.0, "cache_prompt": False}
        answer = self.server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        with torch.no_grad():
            expected = torch.log_softmax(self.model(torch.tensor([ids])).logits[0, -1], -1)
        assert len(likeliest) == 20
        return max(abs(float(expected[t["id"]]) - float(t["logprob"])) for t in likeliest)


def values(out: Path) -> Iterator[tuple[str, Any]]:
    """All weights of a GGUF file in FP32; the experts of gpt-oss as transformers has them."""
    checkpoint = Checkpoint.open(out)
    turned = checkpoint.inventory.config["model_type"] == "gpt_oss"
    with Reader(checkpoint.inventory) as reader:
        for weight in checkpoint.weights:
            array = np.asarray(checkpoint.read(reader, weight)).astype(np.float32)
            if turned and weight.name.endswith(("gate_up_proj", "down_proj")):
                array = array.swapaxes(-1, -2)
            yield weight.name, torch.from_numpy(np.ascontiguousarray(array))


@pytest.mark.parametrize("name", MADE)
def test_log_probs_are_those_of_transformers(name: str, shared: Path, tmp_path: Path) -> None:
    source = made(name, shared, tmp_path / name)
    run(source, tmp_path / "out", EMBEDDING, "gguf")
    engine = Engine(source, tmp_path / "out")
    assert max(map(engine.difference, TEXTS)) < 5e-5


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "nvfp4_unscaled", "q4_0", "iq4_nl_g32", "q8_0"])
@pytest.mark.parametrize("name", ["llama3", "qwen3moe"])
def test_quantized_weights_give_near_log_probs(name: str, fmt: str, shared: Path, tmp_path: Path) -> None:
    source = made(name, shared, tmp_path / name)
    run(source, tmp_path / "out", linear(fmt), "gguf")
    engine = Engine(source, tmp_path / "out")
    assert np.mean([engine.difference(text) for text in TEXTS]) < 0.15


@pytest.mark.parametrize("name", ["llama3", "qwen3moe", "gpt-oss"])
def test_tensor_scales_are_applied_where_plans_allow_them(name: str, shared: Path, tmp_path: Path) -> None:
    source = made(name, shared, tmp_path / name)
    matrices = recipe({"match": ["attention", "lm_head"], "format": "nvfp4", "scale_search": "absmax"})
    run(source, tmp_path / "out", matrices, "gguf")
    engine = Engine(source, tmp_path / "out")
    assert np.mean([engine.difference(text) for text in TEXTS]) < 0.15


@pytest.mark.parametrize("fmt", ["nvfp4_unscaled", "mxfp4", "q4_0", "iq4_nl_g32"])
def test_quantized_embeddings_load(fmt: str, shared: Path, tmp_path: Path) -> None:
    source = made("llama3", shared, tmp_path / "llama3")
    run(source, tmp_path / "out", recipe({"match": "embedding", "format": fmt, "scale_search": "absmax"}), "gguf")
    engine = Engine(source, tmp_path / "out")
    assert max(map(engine.difference, TEXTS)) < 5e-5


@pytest.mark.parametrize("fmt", ["mxfp4", "q8_0"])
def test_quantized_experts_of_gpt_oss_give_near_log_probs(fmt: str, shared: Path, tmp_path: Path) -> None:
    source = made("gpt-oss", shared, tmp_path / "gpt-oss")
    run(source, tmp_path / "out", linear(fmt), "gguf")
    engine = Engine(source, tmp_path / "out")
    assert np.mean([engine.difference(text) for text in TEXTS]) < 0.15


@pytest.mark.parametrize("model", ["qwen3-tiny-wiki", "stories260K", "tiny1m"])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_trained_models_run(model: str, fmt: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "models" / model
    run(source, tmp_path / "out", linear(fmt, if_not_divisible="keep"), "gguf")
    engine = Engine(source, tmp_path / "out")
    assert np.mean([engine.difference(text) for text in TEXTS]) < 0.3


def test_a_split_model_loads(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "models" / "qwen3-tiny-wiki"
    plan = run(source, tmp_path / "out", linear("mxfp4"), "gguf", max_shard_bytes=3_000_000)
    assert len(plan.shards) > 1
    settings = llama.CommonParams()
    settings.model.path = str(tmp_path / "out" / plan.shards[0].name)
    settings.n_gpu_layers, settings.cpuparams.n_threads, settings.warmup, settings.verbosity = 0, 1, False, -1
    answer = llama.Server(settings).handle_completions({"prompt": "The city", "n_predict": 2, "temperature": 0.0})
    assert json.loads(answer)["choices"] if isinstance(answer, str) else answer["choices"]
