"""Drafts of a multi-token-prediction head: counted as an engine would, one position after the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import halfbyte  # noqa: E402
from halfbyte.errors import CheckpointError, HalfbyteError  # noqa: E402
from halfbyte.evaluate import draft_acceptance  # noqa: E402
from halfbyte.evaluate.draft_acceptance import continue_greedily, measure_drafts, prompts_of  # noqa: E402
from halfbyte.runtime.draft_head import DraftHead  # noqa: E402
from halfbyte.source.checkpoint import Checkpoint  # noqa: E402

DEMO = Path(halfbyte.__file__).parent / "demo_model"
TOKENS = list(range(40, 400))


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Checkpoint]:
    return halfbyte.load(DEMO, "float32", dequantize=True), Checkpoint.open(DEMO)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_acceptance, "PROMPTS", 2)
    monkeypatch.setattr(draft_acceptance, "PROMPT_LENGTH", 8)
    monkeypatch.setattr(draft_acceptance, "CONTINUATION", 10)


@torch.no_grad()
def one_by_one(head: DraftHead, model: Any, tokens: Any, begin: int, drafts: int) -> list[int]:
    """The same counts by growing a sequence per position, as a cache of the head would."""
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    result = []
    for i in range(begin - 1, tokens.shape[1] - 1 - drafts):
        joined = head.joined(head.embed(tokens[:, 1 : i + 2]), hidden[:, : i + 1])
        right = 0
        for k in range(1, drafts + 1):
            length = joined.shape[1]
            mask = torch.full((length, length), torch.finfo(joined.dtype).min).triu(1)[None, None]
            states = head.run_layer(joined, torch.arange(length)[None], mask)
            state, logits = head.states_and_logits(states[:, -1:])
            guess = logits.argmax(-1)
            if int(guess) != int(tokens[0, i + 1 + k]):
                break
            right = k
            joined = torch.cat([joined, head.joined(head.embed(guess), state)], 1)
        result.append(right)
    return result


def test_all_positions_at_once_give_what_one_after_the_other_gives(demo: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = demo
    head = DraftHead(checkpoint, model)
    written = continue_greedily(model, prompts_of(TOKENS), 10)
    with torch.no_grad():
        at_once = [draft_acceptance._right_drafts(head, model, row[None], 8, 3).tolist() for row in written]
    assert at_once == [one_by_one(head, model, row[None], 8, 3) for row in written]


def test_shares_fall_with_every_draft_and_add_up_to_tokens_per_step(demo: tuple[Any, Checkpoint]) -> None:
    measured = measure_drafts(*demo, TOKENS, 3)
    first, second, third = measured["accepted"]
    assert 1 >= first >= second >= third >= 0 and first > 0
    assert measured["tokens_per_step"] == pytest.approx(1 + first + second + third, abs=1e-3)
    assert measured["positions"] == 2 * (10 - 3)


def test_the_continuation_is_the_models_own(demo: tuple[Any, Checkpoint]) -> None:
    model, _ = demo
    written = continue_greedily(model, prompts_of(TOKENS), 5)
    with torch.no_grad():
        again = model(input_ids=written).logits.argmax(-1)
    assert torch.equal(again[:, 7:-1], written[:, 8:])


def test_a_quantized_head_drafts_too(tmp_path: Path) -> None:
    recipe = tmp_path / "all.yaml"
    recipe.write_text("name: all\nrules:\n  - {match: linear, format: nvfp4}\n  - {match: mtp, format: nvfp4}\n")
    with pytest.raises(HalfbyteError):  # norms of the head are no matrices
        halfbyte.plan(DEMO, recipe=recipe)
    recipe.write_text(
        "name: all\nrules:\n  - {match: linear, format: nvfp4}\n"
        "  - {match: [mtp.attention, mtp.experts, mtp.fc], format: nvfp4}\n"
    )
    halfbyte.quantize(DEMO, tmp_path / "out", recipe=recipe)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert any(name.startswith("mtp.") for name in checkpoint.formats)
    model = halfbyte.load(tmp_path / "out", "float32", dequantize=True)
    assert measure_drafts(model, checkpoint, TOKENS, 1)["accepted"][0] > 0


def test_a_layer_after_the_last_one_is_a_head(tmp_path: Path) -> None:
    """GLM-4.5 and DeepSeek-V3: with norms of its own, embeddings and an output head."""
    config = transformers.Glm4MoeConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 24, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "pad_token_id": 0},
    )
    torch.manual_seed(0)
    transformers.Glm4MoeForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = {k.replace("layers.1.", "layers.2."): v.clone() for k, v in tensors.items() if ".layers.1." in k}
    own = {"enorm": torch.ones(32), "hnorm": torch.ones(32), "shared_head.norm": torch.ones(32)}
    own |= {
        "eh_proj": torch.randn(32, 64),
        "embed_tokens": torch.randn(64, 32),
        "shared_head.head": torch.randn(64, 32),
    }
    layer |= {f"model.layers.2.{name}.weight": value for name, value in own.items()}
    save_file(tensors | layer, tmp_path / "model.safetensors", {"format": "pt"})
    model, checkpoint = halfbyte.load(tmp_path, "float32", dequantize=True), Checkpoint.open(tmp_path)
    head = DraftHead(checkpoint, model)
    written = continue_greedily(model, prompts_of([t % 64 for t in TOKENS]), 10)
    with torch.no_grad():
        at_once = [draft_acceptance._right_drafts(head, model, row[None], 8, 2).tolist() for row in written]
    assert at_once == [one_by_one(head, model, row[None], 8, 2) for row in written]
    assert torch.equal(head.embed(torch.tensor([[3]]))[0, 0], own["embed_tokens"][3])


def test_a_checkpoint_without_a_head_is_refused_by_name(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if not name.startswith("mtp.")}
    save_file(tensors, path, {"format": "pt"})
    index = tmp_path / "model" / "model.safetensors.index.json"
    if index.exists():
        document = json.loads(index.read_text())
        document["weight_map"] = {k: v for k, v in document["weight_map"].items() if not k.startswith("mtp.")}
        index.write_text(json.dumps(document))
    checkpoint = Checkpoint.open(tmp_path / "model")
    with pytest.raises(CheckpointError, match="has no multi-token-prediction head"):
        DraftHead(checkpoint, halfbyte.load(tmp_path / "model", "float32", dequantize=True))


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(HalfbyteError, match="too short to draft on"):
        prompts_of(TOKENS[:10])


def test_heads_and_drafts_are_checked_before_anything_is_measured(
    demo: tuple[Any, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.evaluate import Settings, evaluation, measure

    monkeypatch.setattr(evaluation._Run, "_row", lambda self, index: pytest.fail("measured"))
    with pytest.raises(HalfbyteError, match="between 1 and 8"):
        measure(DEMO, None, Settings(drafts=9))


def test_too_many_drafts_are_refused(demo: tuple[Any, Checkpoint]) -> None:
    with pytest.raises(HalfbyteError, match="between 1 and 8"):
        measure_drafts(*demo, TOKENS, 9)
