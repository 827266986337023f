"""``import halfbyte``: the words of the command line as functions, and nothing imported too early."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import halfbyte
from halfbyte.plan.conversion_plan import Plan

MODEL = resources.files("halfbyte") / "demo_model"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_neither_torch_nor_transformers() -> None:
    code = "import halfbyte, sys; halfbyte.plan, halfbyte.load, halfbyte.evaluate, halfbyte.encode; "
    assert python(code + "print([m for m in ('torch', 'transformers', 'safetensors') if m in sys.modules])") == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("word", ["encode", "evaluate", "inspect", "load", "plan", "quantize", "verify"])
def test_words_are_functions_whatever_was_imported_before(word: str) -> None:
    before = "import halfbyte.plan, halfbyte.verify, halfbyte.search, halfbyte.convert, halfbyte.source.checkpoint; "
    assert python(f"{before}import halfbyte; print(type(halfbyte.{word}).__name__)") == "function"
    assert python(f"from halfbyte import {word}; print(type({word}).__name__)") == "function"


def test_modules_with_the_name_of_a_word_can_still_be_imported() -> None:
    code = "import halfbyte; halfbyte.plan; from halfbyte.plan.conversion_plan import Plan; "
    code += "from halfbyte.verify.weights import Verification; "
    assert python(code + "print(Plan.__name__, Verification.__name__)") == "Plan Verification"


def test_every_public_name_is_there_and_listed() -> None:
    for name in halfbyte.__all__:
        assert getattr(halfbyte, name) is not None
        assert name in dir(halfbyte)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = halfbyte.quantise


def test_plan_quantize_verify_inspect(tmp_path: Path) -> None:
    source = str(MODEL)
    made = halfbyte.plan(source, "mxfp4")
    assert isinstance(made, Plan)
    done = halfbyte.quantize(source, tmp_path / "out", "mxfp4", threads=1)
    assert halfbyte.verify(done.out, source).ok
    found = halfbyte.inspect(done.out)
    assert (found.dialect, found.data_bytes) == ("halfbyte", made.data_bytes)


def test_quantize_takes_a_plan_and_reports_every_source_byte(tmp_path: Path) -> None:
    made = halfbyte.plan(str(MODEL), "mxfp4", dialect="compressed-tensors", max_shard_bytes=1_000_000)
    seen: list[int] = []
    halfbyte.quantize(made, tmp_path / "out", progress=seen.append)
    assert sum(seen) == made.checkpoint.inventory.total_bytes
    assert halfbyte.inspect(tmp_path / "out").dialect == "compressed-tensors"


def test_quantize_needs_a_recipe_exactly_where_there_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="recipe is missing"):
        halfbyte.quantize(str(MODEL), tmp_path / "out")
    with pytest.raises(
        TypeError, match="max_shard_bytes, remote_code cannot be given, since they are part of the plan"
    ):
        made = halfbyte.plan(MODEL, "mxfp4")
        halfbyte.quantize(made, tmp_path / "out", max_shard_bytes=1 << 20, remote_code=True)
    with pytest.raises(TypeError, match="part of the plan"):
        halfbyte.quantize(halfbyte.plan(str(MODEL), "mxfp4"), tmp_path / "out", "nvfp4")


def test_an_inventory_is_a_source() -> None:
    inventory = halfbyte.Inventory.open(str(MODEL))
    assert halfbyte.plan(inventory, "mxfp4").fingerprint == halfbyte.plan(str(MODEL), "mxfp4").fingerprint


def test_encode_quantizes_an_array() -> None:
    tensor = halfbyte.encode(np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32), "mxfp4")
    assert isinstance(tensor, halfbyte.QuantizedTensor)
    assert tensor.decode().shape == (2, 32)
