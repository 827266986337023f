"""The commands that load a checkpoint follow the facts about engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.source import running
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.overview import overview
from small_models import DENSE_CONFIG, dense_tensors, linear, run, write_checkpoint


@pytest.mark.parametrize(("fmt", "plugin"), [("mixfp4", True), ("int4_g32", False)])
def test_vllm_gets_its_plugin_for_formats_that_it_misreads(tmp_path: Path, fmt: str, plugin: bool) -> None:
    source = write_checkpoint(tmp_path / "model", dense_tensors(), DENSE_CONFIG)
    run(source, tmp_path / "out", linear(fmt), dialect="compressed-tensors")
    commands = {engine: text for engine, _, text in running.usage(overview(Checkpoint.open(tmp_path / "out")), "./out")}
    assert "vllm serve ./out" in commands["vLLM"]
    assert ("pip install halfbyte" in commands["vLLM"]) == plugin
