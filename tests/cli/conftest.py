"""Inputs of the commands: the bundled model, a quantized copy of it, an inventory without weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli import main


@pytest.fixture(scope="session")
def demo_model() -> str:
    return str(resources.files("halfbyte") / "demo_model")


@pytest.fixture(scope="session")
def quantized(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model in MXFP4 (the quickest recipe); tests must not change it."""
    out = tmp_path_factory.mktemp("cli") / "mxfp4"
    assert main(["quantize", demo_model, str(out), "--recipe", "mxfp4", "--json"]) == 0
    return str(out)


@pytest.fixture
def inventory(tmp_path: Path) -> str:
    """Two Llama layers as an inventory file."""
    layer = "model.layers.{0..1}"
    tensors = {
        "model.embed_tokens.weight": ["BF16", [256, 64]],
        **{f"{layer}.self_attn.{p}_proj.weight": ["BF16", [64, 64]] for p in "qkvo"},
        f"{layer}.mlp.gate_proj.weight": ["BF16", [128, 64]],
        f"{layer}.mlp.up_proj.weight": ["BF16", [128, 64]],
        f"{layer}.mlp.down_proj.weight": ["BF16", [64, 128]],
        f"{layer}.input_layernorm.weight": ["BF16", [64]],
    }
    path = tmp_path / "inventory.json"
    config = {"model_type": "llama", "hidden_size": 64, "architectures": ["LlamaForCausalLM"]}
    path.write_text(json.dumps({"config": config, "meta": {"side_file_bytes": 1000}, "tensors": tensors}))
    return str(path)


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command with --json and give its document; the exit code must be ``code``."""

    def run(*argv: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([*argv, "--json"]) == code
        captured = capsys.readouterr()
        assert all(line.startswith("halfbyte: ") for line in captured.err.splitlines())
        return json.loads(captured.out)

    return run


@pytest.fixture
def run_text(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command and give what it prints; the exit code must be ``code``."""

    def run(*argv: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(list(argv)) == code
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with exit code 2, print nothing, and say one sentence on stderr: that one."""

    def run(*argv: str, code: int = 2) -> str:
        capsys.readouterr()
        assert main(list(argv)) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("halfbyte: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return run
