"""Checkpoints of llm-compressor itself: read to the values of its library, and carried over."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import halfbyte
from dialects.library import decompress
from halfbyte.checkpoint import Reader
from halfbyte.demo import MODEL
from halfbyte.source.checkpoint import Checkpoint
from small_models import read_file

pytest.importorskip("llmcompressor")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from compressed_tensors.quantization import QuantizationConfig  # noqa: E402

SCHEMES = {
    "NVFP4A16": "nvfp4",
    "MXFP4A16": "mxfp4",
    "W4A16": "int4_g128",
    "W4A16_ASYM": "int4_asym_g128",
    "FP8_DYNAMIC": "fp8_channel",
    "FP8_BLOCK": "fp8_block128",
    "MXFP8A16": "mxfp8",
}
LINEAR_MODULES = 7  # attention and MLP of the only layer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer, with the tokenizer of the bundled model."""
    folder = tmp_path_factory.mktemp("llmcompressor") / "source"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def compress(source: Path, scheme: str, out: Path) -> Path:
    """Let llm-compressor quantize all linear layers but the last, without data."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
    model.save_pretrained(out, save_compressed=True)
    return out


@pytest.mark.parametrize("scheme", SCHEMES)
def test_its_checkpoints_decode_to_the_values_of_its_library(source: Path, tmp_path: Path, scheme: str) -> None:
    checkpoint = Checkpoint.open(compress(source, scheme, tmp_path / "out"))
    assert checkpoint.dialect is not None and checkpoint.dialect.name == "compressed-tensors"
    assert {fmt.name for fmt in checkpoint.formats.values()} == {SCHEMES[scheme]}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    group = group.model_copy(update={"format": group.format or config["format"]})
    stored, infos = read_file(tmp_path / "out"), checkpoint.inventory.tensors
    with Reader(checkpoint.inventory) as reader:
        for name in checkpoint.formats:
            module = name.removesuffix(".weight")
            parts = {n.rpartition(".")[2]: n for n in stored if n.rpartition(".")[0] == module}
            theirs = decompress(
                {short: stored[n] for short, n in parts.items()}, {s: infos[n].dtype for s, n in parts.items()}, group
            )
            weight = next(w for w in checkpoint.weights if w.name == name)
            ours = np.ascontiguousarray(checkpoint.read(reader, weight))
            assert torch.equal(torch.from_numpy(ours).to(theirs.dtype), theirs), name
    assert len(checkpoint.formats) == LINEAR_MODULES


@pytest.mark.parametrize("scheme", SCHEMES)
def test_its_checkpoints_are_carried_to_another_dialect_with_the_same_values(
    source: Path, tmp_path: Path, scheme: str
) -> None:
    made = compress(source, scheme, tmp_path / "made")
    halfbyte.convert(made, tmp_path / "out", dialect="halfbyte")
    result = halfbyte.verify(tmp_path / "out", made)
    assert result.ok, result.problems
