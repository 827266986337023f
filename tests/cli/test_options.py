"""Sources that a command runs, and does not only read."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.stores.hub_server import of_folder, served

from halfbyte.cli import main
from small_models import hashes


@pytest.mark.parametrize("recipe", ["nvfp4-gptq", "nvfp4-best"])
def test_a_hub_id_whose_model_is_run_comes_through_the_cache(
    recipe: str, demo_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "text.txt").write_text("one two three four five six seven " * 400)
    more = ["--recipe", recipe, "--calibration", str(tmp_path / "text.txt"), "--samples", "4", "--length", "64"]
    with served(of_folder("acme/tiny", Path(demo_model)), monkeypatch, tmp_path / "cache"):
        assert main(["quantize", "hf://acme/tiny@main", str(tmp_path / "hub"), *more]) == 0
    assert main(["quantize", demo_model, str(tmp_path / "local"), *more]) == 0
    weights = {name: sum256 for name, sum256 in hashes(tmp_path / "hub").items() if name.endswith(".safetensors")}
    assert weights and weights.items() <= hashes(tmp_path / "local").items()
