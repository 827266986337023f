"""Write tests/models/tensor_lists/*.json: the tensor names of architecture families, as their files spell them.

For most families a tiny model with random weights is built with transformers and saved; the names, dtypes and
shapes come from the headers of that file. Those of ``SURVEYED`` are built without memory, as
``benchmarks/architectures.py`` does, with the shapes of their default configuration. Saving matters: in memory
transformers fuses the experts, on disk it writes the spelling of the hub. Multi-token-prediction layers, which
transformers drops, are added as the hub files carry them; the list says so in `meta.note`.

    python scripts/list_family_tensors.py [family ...]
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
OUT = REPOSITORY / "tests" / "models" / "tensor_lists"
NUMBER = re.compile(r"(?<![^.])(\d+)(?![^.])")

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TEXT_HEADS = TEXT | {"head_dim": 8}
DELTA = TEXT_HEADS | {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
MLA = TEXT | {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    **EXPERTS,
}
HYBRID = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "num_hidden_layers": 4,
    "n_routed_experts": 4,
    "moe_shared_expert_intermediate_size": 24,
    "moe_latent_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "ssm_state_size": 8,
}

# list name -> (model class, configuration class, arguments)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **TEXT_HEADS},
            "vision_config": {"model_type": "pixtral", "image_size": 32, "patch_size": 8, **VISION},
        },
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", TEXT_HEADS | EXPERTS | {"num_experts": 4}),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        DELTA | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {
            "text_config": DELTA,
            "vision_config": {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "hidden_size": 16},
        },
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", TEXT | {"num_local_experts": 4}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", "MiniMaxM2Config", TEXT_HEADS | {"num_local_experts": 4}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", MLA | {"q_lora_rank": None}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", MLA),
    "deepseek_v32": (
        "DeepseekV32ForCausalLM",
        "DeepseekV32Config",
        MLA | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4},
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", TEXT_HEADS | {"num_local_experts": 4}),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": TEXT_HEADS,
            "vision_config": {"image_size": 32, "patch_size": 8, **VISION},
            "mm_tokens_per_image": 4,
        },
    ),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", TEXT_HEADS | {"pad_token_id": 0}),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        TEXT_HEADS
        | EXPERTS
        | {"n_routed_experts": 4, "use_qk_norm": True, "attention_bias": True, "n_group": 1, "topk_group": 1},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT | {"pad_token_id": 0}),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", TEXT | {"num_local_experts": 4}),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", TEXT),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", TEXT),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", TEXT | {"num_experts": 4}),
    "nemotron_h": ("NemotronHForCausalLM", "NemotronHConfig", TEXT_HEADS | EXPERTS | HYBRID),
}

# list name -> class of transformers, built without memory
SURVEYED = {
    "bailing_hybrid": "BailingHybridForCausalLM",
    "bart": "BartForConditionalGeneration",
    "cohere2": "Cohere2ForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "falcon": "FalconForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "gemma3n": "Gemma3nForCausalLM",
    "gemma4": "Gemma4ForConditionalGeneration",
    "glm5_next": "Glm5NextForConditionalGeneration",
    "gpt_neox": "GPTNeoXForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "hy_v3": "HYV3ForCausalLM",
    "hy_v4": "HYV4ForCausalLM",
    "inkling": "InklingForConditionalGeneration",
    "inkling2": "Inkling2ForCausalLM",
    "jamba": "JambaForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
    "longcat_flash": "LongcatFlashForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "mimo_v2_flash": "MiMoV2FlashForCausalLM",
    "minimax": "MiniMaxForCausalLM",
    "minimax_m3": "MiniMaxM3SparseForConditionalGeneration",
    "mistral_large4": "MistralLarge4ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "olmo_hybrid": "OlmoHybridForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "step3p7": "Step3p7ForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
    "xlm_roberta": "XLMRobertaForCausalLM",
}

CONFIG_KEYS = (
    "model_type",
    "architectures",
    "hidden_size",
    "num_hidden_layers",
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "tie_word_embeddings",
)
Headers = dict[str, tuple[str, tuple[int, ...]]]


def main(wanted: list[str]) -> None:
    """Write the lists of the wanted families, or of all."""
    OUT.mkdir(parents=True, exist_ok=True)
    for name in wanted or (*MODELS, *SURVEYED):
        tensors, config, version = save(name) if name in MODELS else build(name)
        note = f"a tiny model saved by transformers {version}"
        if name in SURVEYED:
            note = f"{SURVEYED[name]} of transformers {version}, with few layers and experts"
        added = prediction_layer(name, tensors, config)
        if added:
            note += "; the multi-token-prediction layer is added as the hub's files carry it"
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in compact(tensors | added).items()]
        text = (
            f'{{"config": {json.dumps(config)},\n "meta": {json.dumps({"note": note})},\n "tensors": {{\n'
            + ",\n".join(lines)
            + "\n }}\n"
        )
        (OUT / f"{name}.json").write_text(text, encoding="utf-8")


def save(name: str) -> tuple[Headers, dict[str, Any], str]:
    """Build the tiny model, save it, and read the headers and the configuration of the files."""
    import torch
    import transformers

    model_class, config_class, arguments = MODELS[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments))
    with tempfile.TemporaryDirectory() as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        tensors = read_headers(Path(folder) / "model.safetensors")
    return tensors, short(config), transformers.__version__


def build(name: str) -> tuple[Headers, dict[str, Any], str]:
    """The names and shapes that a class would be saved with, and its configuration."""
    import transformers

    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    import architectures

    architectures.quiet()
    tensors, config = architectures.build(SURVEYED[name], architectures.classes()[SURVEYED[name]])
    if name == "longcat_flash":  # the hub has no weights for the experts that do nothing
        extra = re.compile(r"experts\.(\d+)\.")
        experts = config["n_routed_experts"]
        tensors = {k: t for k, t in tensors.items() if not (m := extra.search(k)) or int(m[1]) < experts}
    return {k: (t.dtype, t.shape) for k, t in tensors.items()}, short(config), transformers.__version__


def short(config: dict[str, Any]) -> dict[str, Any]:
    """What a family looks at in a configuration."""
    result = {key: config[key] for key in CONFIG_KEYS if key in config}
    if "text_config" in config:
        result["text_config"] = {k: v for k, v in config["text_config"].items() if k in CONFIG_KEYS}
    return result


def read_headers(path: Path) -> Headers:
    """Names, dtypes and shapes of a safetensors file."""
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    return {k: (v["dtype"], tuple(v["shape"])) for k, v in header.items() if k != "__metadata__"}


def prediction_layer(name: str, tensors: Headers, config: dict[str, Any]) -> Headers:
    """The multi-token-prediction tensors that hub files of this family hold besides."""
    hidden = (config.get("text_config") or config).get("hidden_size", 0)
    norm, joint = ("BF16", (hidden,)), ("BF16", (hidden, 2 * hidden))
    if name in {"deepseek_v3", "glm4_moe"}:
        layer = f"model.layers.{config['num_hidden_layers']}."
        inner = under(tensors, f"model.layers.{config['num_hidden_layers'] - 1}.", layer)
        vocabulary = tensors["model.embed_tokens.weight"]
        own = {"enorm": norm, "hnorm": norm, "eh_proj": joint, "shared_head.norm": norm}
        own |= {"shared_head.head": vocabulary, "embed_tokens": vocabulary}
        return inner | {f"{layer}{key}.weight": value for key, value in own.items()}
    if name in {"qwen3_next", "qwen3_5"}:
        text = "model.language_model." if name == "qwen3_5" else "model."
        own = {"fc": joint, "norm": norm, "pre_fc_norm_embedding": norm, "pre_fc_norm_hidden": norm}
        inner = under(tensors, f"{text}layers.3.", "mtp.layers.0.")  # layer 3 has full attention
        return inner | {f"mtp.{key}.weight": value for key, value in own.items()}
    return {}


def under(tensors: Headers, prefix: str, new: str) -> Headers:
    """The tensors below `prefix`, renamed to lie below `new`."""
    return {new + name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def compact(tensors: Headers) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names that differ only in numbers, and have one dtype and shape, as patterns with `{a..b}` ranges."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[tuple[int, ...]]] = {}
    for name, (dtype, shape) in tensors.items():
        parts = NUMBER.split(name)
        groups.setdefault(("#".join(parts[::2]), dtype, shape), []).append(tuple(map(int, parts[1::2])))
    result = {}
    for (pattern, dtype, shape), numbers in groups.items():
        for box in boxes(sorted(numbers)):
            texts = pattern.split("#")
            spans = [f"{{{a}..{b}}}" if a != b else str(a) for a, b in box]
            name = "".join(itertools.chain(*itertools.zip_longest(texts, spans, fillvalue="")))
            result[name] = (dtype, shape)
    return result


def boxes(numbers: list[tuple[int, ...]]) -> list[list[tuple[int, int]]]:
    """Cover index tuples by ranges per position, exactly; each box is a list of inclusive ranges."""
    if not numbers or not numbers[0]:
        return [[]] if numbers else []
    rests: dict[int, list[list[tuple[int, int]]]] = {}
    for first, group in itertools.groupby(numbers, key=lambda index: index[0]):
        rests[first] = boxes([index[1:] for index in group])
    result: list[list[tuple[int, int]]] = []
    run: list[int] = []
    for first in rests:
        if run and (first != run[-1] + 1 or rests[first] != rests[run[0]]):
            result += [[(run[0], run[-1]), *rest] for rest in rests[run[0]]]
            run = []
        run.append(first)
    return result + [[(run[0], run[-1]), *rest] for rest in rests[run[0]]]


if __name__ == "__main__":
    main(sys.argv[1:])
