"""Drafted tokens change how many passes a text takes, and nothing of the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.runtime import load, load_tokenizer
from halfbyte.runtime.generation import Generator, Sampling
from halfbyte.runtime.speculation import DraftCounts, Speculation
from halfbyte.source.checkpoint import Checkpoint

DEMO = Path(halfbyte.__file__).parent / "demo_model"
Loaded = tuple[Any, Checkpoint]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The demo model with packed weights: states of linear attention cannot be cut."""
    out = tmp_path_factory.mktemp("hybrid") / "out"
    halfbyte.quantize(DEMO, out, "mixfp4-absmax")
    return load(out, "float32"), Checkpoint.open(out)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A GLM-4.5 whose head is a copy of its last layer: caches can be cut."""
    folder = tmp_path_factory.mktemp("glm")
    config = transformers.Glm4MoeConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 24, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "pad_token_id": 0},
    )
    torch.manual_seed(0)
    transformers.Glm4MoeForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    layer = {k.replace("layers.1.", "layers.2."): v.clone() for k, v in tensors.items() if ".layers.1." in k}
    joined = torch.cat([torch.zeros(32, 32), torch.eye(32)], 1)  # it looks at the state alone
    layer |= {f"model.layers.2.{n}.weight": torch.ones(32) for n in ("enorm", "hnorm", "shared_head.norm")}
    save_file(tensors | layer | {"model.layers.2.eh_proj.weight": joined}, folder / "model.safetensors")
    return load(folder, "float32"), Checkpoint.open(folder)


def greedy(logits: Callable[[Sequence[int]], Any], ids: Sequence[int], count: int) -> list[int]:
    result = list(ids)
    for _ in range(count):
        result.append(int(logits(result).argmax()))
    return result


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("name", ["hybrid", "plain"])
def test_the_likeliest_tokens_are_those_of_the_model_alone(
    name: str, drafts: int, request: pytest.FixtureRequest
) -> None:
    model, checkpoint = request.getfixturevalue(name)
    prompt, tokenizer = range(20, 34), None
    speculation = Speculation(checkpoint, model, drafts)
    written = greedy(speculation.logits, prompt, 40)
    assert written == greedy(Generator(model, tokenizer)._logits, prompt, 40)
    counts = speculation.counts
    assert 0 < counts.accepted < counts.drafted <= drafts * counts.passes
    # every pass gives one token and those that it accepts; the first reads the prompt, others are plain
    assert counts.passes + counts.accepted + counts.plain_passes + 1 == 40
    # another prompt, and this one again, half of it cached
    for ids in ([9, 8, 7], written[:20], written):
        assert greedy(speculation.logits, ids, 6) == greedy(Generator(model, tokenizer)._logits, ids, 6)


def test_text_sampled_with_a_seed_is_the_same_too(hybrid: Loaded) -> None:
    model, checkpoint = hybrid
    tokenizer = load_tokenizer(DEMO)
    sampling = Sampling(temperature=0.8, seed=3, max_tokens=30)
    with_drafts = Generator(model, tokenizer, Speculation(checkpoint, model, 2))
    text = "".join(with_drafts.complete("The city of", sampling))
    assert text == "".join(Generator(model, tokenizer).complete("The city of", sampling))
    drafts = with_drafts.counts.drafts
    assert drafts is not None and drafts.accepted > 0 and drafts.speedup is not None and drafts.speedup > 0


def test_an_interrupted_pass_leaves_nothing_half_cached(hybrid: Loaded) -> None:
    model, checkpoint = hybrid
    speculation = Speculation(checkpoint, model, 1)
    expected = greedy(speculation.logits, range(20, 30), 6)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_output_embeddings().register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        speculation.logits([*expected, 1, 2])
    handle.remove()
    assert greedy(speculation.logits, range(20, 30), 6) == expected


def test_the_speedup_compares_tokens_with_plain_passes() -> None:
    assert DraftCounts(passes=10, drafted=10, accepted=8, seconds=1.5).speedup is None
    assert DraftCounts(10, 10, 8, 1.5, plain_passes=2, plain_seconds=0.2).speedup == pytest.approx(0.1 * 18 / 1.5)


def test_models_without_a_head_and_odd_numbers_are_refused(hybrid: Loaded, shared: Path) -> None:
    model, checkpoint = hybrid
    with pytest.raises(HalfbyteError, match="between 1 and 8"):
        Speculation(checkpoint, model, 0)
    with pytest.raises(CheckpointError, match="no multi-token-prediction head"):
        Speculation(Checkpoint.open(shared / "data" / "models" / "qwen3-tiny-wiki"), model)
