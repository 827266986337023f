"""A conversion whose searches run by the kernels for devices (here in Triton's interpreter) writes the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli import main
from halfbyte.gpu import device_encode


@pytest.fixture
def model(tmp_path: Path) -> Path:
    import json

    import numpy as np
    from safetensors.numpy import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
    save_file({name: values * (i + 1) for i, name in enumerate(names)}, folder / "model.safetensors")
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_the_bytes_are_those_of_a_conversion_on_the_cpu(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["quantize", str(model), "--recipe", "mixfp4", "--allow-unrecognised"]
    assert main([*arguments[:2], str(tmp_path / "cpu"), *arguments[2:]]) == 0
    calls: list[str] = []
    kernel = device_encode.encode_on_device

    def here(*args: Any, device: str, **keywords: Any) -> Any:
        calls.append(device)
        return kernel(*args, device="cpu", **keywords)

    monkeypatch.setattr(device_encode, "encode_on_device", here)
    monkeypatch.setattr("halfbyte.gpu.device_products.cuda_is_here", lambda: True)
    assert main([*arguments[:2], str(tmp_path / "gpu"), *arguments[2:], "--device", "cuda"]) == 0
    assert calls == ["cuda"] * 4
    assert bytes_of(tmp_path / "cpu") == bytes_of(tmp_path / "gpu")


def test_without_a_cuda_device_it_is_refused_in_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(model), str(tmp_path / "out"), "--recipe", "mixfp4", "--device", "cuda"]) != 0
    assert "--device cuda needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
