"""Nothing is vouched for that was not recognised."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from checkpoint.builders import entry, write_floats, write_index, write_raw
from halfbyte.checkpoint import Inventory
from halfbyte.cli import main
from halfbyte.errors import CheckpointError

MLP = "model.layers.0.mlp."


def checkpoint(folder: Path, quantization: dict[str, object] | None) -> Path:
    table = {f"{MLP}experts.down_proj_blocks": entry("U8", [2, 4, 1, 16], 0, 128)}
    table[f"{MLP}experts.down_proj_scales"] = entry("U8", [2, 4, 1], 128, 136)
    table["model.layers.0.self_attn.q_proj.weight"] = entry("BF16", [32, 32], 136, 136 + 2048)
    write_raw(folder / "model.safetensors", table, np.zeros(136 + 2048, np.uint8).tobytes())
    config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    config |= {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "quark", "fbgemm_fp8", "quanto", "hqq", "torchao"])
def test_inspect_names_a_foreign_method_and_vouches_for_nothing(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(checkpoint(tmp_path, {"quant_method": method}))]) == 0
    text = capsys.readouterr().out
    assert repr(method) in text and "nothing is quantized" not in text and "no known loss" not in text


def test_packed_codes_without_a_configuration_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(checkpoint(tmp_path, None)), "--recipe", "nvfp4"]) == 2
    assert "down_proj_blocks" in (text := capsys.readouterr().err) and "packed codes (U8)" in text
    assert main(["inspect", str(tmp_path)]) == 0
    assert "nothing is quantized" not in capsys.readouterr().out


def test_the_index_decides_between_two_copies_and_the_other_one_is_named(tmp_path: Path) -> None:
    write_floats(tmp_path / "a.safetensors", "x", "y")
    write_floats(tmp_path / "b.safetensors", "x", "z", rows=3)
    for placed, other, rows in (("a.safetensors", "b.safetensors", 2), ("b.safetensors", "a.safetensors", 3)):
        write_index(tmp_path, {"x": placed, "y": "a.safetensors", "z": "b.safetensors"})
        inventory = Inventory.open(tmp_path)
        assert inventory.tensors["x"].shape == (rows, 2)
        assert inventory.ignored_files == [f"{other}: x (the index takes the one in {placed})"]


def test_a_scale_in_another_spelling_is_not_supported_rather_than_missing(tmp_path: Path) -> None:
    from halfbyte.source.checkpoint import Checkpoint

    table = {"layers.0.w1.weight": entry("F8_E4M3", [2, 2], 0, 4), "layers.0.w1.scale": entry("F8_E8M0", [1, 1], 4, 5)}
    write_raw(tmp_path / "model.safetensors", table, bytes(5))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CheckpointError, match=r"called layers\.0\.w1\.scale, a spelling that is not supported"):
        Checkpoint.open(tmp_path)
