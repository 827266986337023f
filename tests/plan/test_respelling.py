"""A quantized checkpoint in another dialect keeps its codes; what cannot be kept is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import halfbyte
from halfbyte.checkpoint import Reader
from halfbyte.cli import main
from halfbyte.demo import MODEL
from halfbyte.errors import PlanError
from halfbyte.source.checkpoint import Checkpoint
from matrix.sources import write
from small_models import linear, recipe, run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    halfbyte.quantize(MODEL, folder / "mxfp4", "mxfp4", dialect="compressed-tensors")
    halfbyte.quantize(MODEL, folder / "nvfp4", "nvfp4", dialect="compressed-tensors")
    halfbyte.quantize(MODEL, folder / "mixfp4", "mixfp4")
    return folder


@pytest.mark.parametrize("target", ["halfbyte", "mlx"])
def test_codes_and_scales_are_the_same_in_the_other_dialect(made: Path, tmp_path: Path, target: str) -> None:
    halfbyte.convert(made / "mxfp4", tmp_path / "out", target)
    before, after = Checkpoint.open(made / "mxfp4"), Checkpoint.open(tmp_path / "out")
    assert set(before.formats) == set(after.formats)
    weights = {w.name: w for w in after.weights}
    with Reader(before.inventory) as one, Reader(after.inventory) as two:
        for weight in (w for w in before.weights if w.name in before.formats):
            a = before.read_quantized(one, weight)
            b = after.read_quantized(two, weights[weight.name])
            np.testing.assert_array_equal(a.codes, b.codes)
            np.testing.assert_array_equal(a.scales, b.scales)
    assert halfbyte.verify(tmp_path / "out", made / "mxfp4").ok


def _bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    inventory = halfbyte.Inventory.open(folder)
    with Reader(inventory) as reader:
        return {n: (t.dtype, t.shape, reader.read(n).tobytes()) for n, t in inventory.tensors.items()}


def test_there_and_back_gives_the_same_tensors(made: Path, tmp_path: Path) -> None:
    halfbyte.convert(made / "mxfp4", tmp_path / "there", "halfbyte")
    halfbyte.convert(tmp_path / "there", tmp_path / "back", "compressed-tensors")
    assert _bytes(tmp_path / "back") == _bytes(made / "mxfp4")


def test_only_tensor_scales_are_rounded_where_a_dialect_stores_their_reciprocals(made: Path, tmp_path: Path) -> None:
    halfbyte.convert(made / "mixfp4", tmp_path / "there", "compressed-tensors")
    halfbyte.convert(tmp_path / "there", tmp_path / "back", "halfbyte")
    before, after = _bytes(made / "mixfp4"), _bytes(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all("_tensor_scale" in name for name in before if before[name] != after[name])


def test_weights_that_the_dialect_cannot_hold_are_named(made: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"modelopt cannot hold .*in_proj_qkv.* and 28 more \(mixfp4\)"):
        halfbyte.convert(made / "mixfp4", tmp_path / "out", "modelopt")
    assert not (tmp_path / "out").exists()


def test_they_can_be_requantized_and_the_error_is_told(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["convert", str(made / "mixfp4"), out, "--dialect", "modelopt", "--requantize", "nvfp4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {entry["format"] for entry in told["carried"]} == {"nvfp4"}
    assert not any(entry["lossless"] for entry in told["carried"])
    assert 0.001 < told["relmse"] < 0.01


def test_a_checkpoint_that_is_not_quantized_has_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no quantized weights"):
        halfbyte.convert(MODEL, tmp_path / "out", "modelopt")


def refused(out: Path, *argv: object) -> None:
    """Exit code 2, and not even a folder."""
    assert main(["convert", *(str(word) for word in argv)]) == 2
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["modelopt", "fp8", "mlx"])
def test_a_refusal_has_exit_code_2_names_weights_and_ways_out_and_writes_nothing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dialect: str
) -> None:
    refused(tmp_path / "out", made / "mixfp4", tmp_path / "out", "--dialect", dialect)
    told = capsys.readouterr().err
    assert (
        f"the dialect {dialect} cannot hold model.layers.0.linear_attn.in_proj_qkv.weight, " in told
        and "(mixfp4)" in told
    )
    assert "choose another dialect" in told and "--requantize FORMAT" in told


def test_gguf_is_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    run(write(tmp_path / "source", "dense", 32), tmp_path / "gguf", linear("q8_0"), "gguf")
    refused(tmp_path / "out", tmp_path / "gguf", tmp_path / "out", "--dialect", "fp8")
    assert "start from the original checkpoint" in capsys.readouterr().err


def test_an_unquantized_source_is_sent_to_quantize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path / "out", MODEL, tmp_path / "out", "--dialect", "modelopt")
    assert "use `halfbyte quantize`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fmt", "said"), [("nvfp5", "did you mean nvfp4"), ("mxfp4", "modelopt has no spelling for mxfp4")]
)
def test_a_format_that_helps_nothing_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fmt: str, said: str
) -> None:
    refused(tmp_path / "out", made / "mixfp4", tmp_path / "out", "--dialect", "modelopt", "--requantize", fmt)
    assert said in capsys.readouterr().err


def test_nvfp4_goes_into_mlx_requantized_only(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MLX has a global scale in experts alone, and stores powers of two."""
    arguments = [made / "nvfp4", tmp_path / "out", "--dialect", "mlx"]
    refused(tmp_path / "out", *arguments)
    assert "in nvfp4_unscaled and not in nvfp4" in capsys.readouterr().err
    halfbyte.convert(made / "nvfp4", tmp_path / "out", "mlx", requantize="nvfp4")
    formats = {weight: fmt.name for weight, fmt in Checkpoint.open(tmp_path / "out").formats.items()}
    assert {fmt for name, fmt in formats.items() if name.endswith(("gate_up_proj", "down_proj"))} == {"nvfp4"}
    assert {fmt for name, fmt in formats.items() if ".self_attn." in name} == {"nvfp4_unscaled"}


def test_a_scale_that_mlx_cannot_store_is_named_although_its_stacks_have_tensor_scales(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "per expert", 32)
    rule = {"match": "experts", "format": "nvfp4", "scale_search": "absmax"}
    run(source, tmp_path / "experts", recipe(rule), "compressed-tensors")
    with pytest.raises(PlanError, match=r"experts\.gate_up_proj, .* only where they are powers of two"):
        halfbyte.convert(tmp_path / "experts", tmp_path / "out", "mlx")


def test_a_block_that_does_not_fit_the_dialect_is_named(tmp_path: Path) -> None:
    run(write(tmp_path / "source", "dense", 48), tmp_path / "own", linear("nvfp4_unscaled"), "halfbyte")
    with pytest.raises(PlanError, match=r"mlx cannot hold .*q_proj\.weight.*K = 48 is not a multiple of 32"):
        halfbyte.convert(tmp_path / "own", tmp_path / "out", "mlx")


def test_a_recipe_that_keeps_such_weights_is_refused_too(tmp_path: Path) -> None:
    run(write(tmp_path / "source", "dense", 48), tmp_path / "own", linear("nvfp4_unscaled"), "halfbyte")
    keep = recipe({"match": "all", "keep": True, "reason": "as it is"})
    with pytest.raises(PlanError, match=r"q_proj\.weight is nvfp4_unscaled in the source and kept by the recipe"):
        run(tmp_path / "own", tmp_path / "out", keep, "mlx")


def test_a_checkpoint_that_is_in_the_dialect_already_has_nothing_to_convert(made: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="in the dialect compressed-tensors already"):
        halfbyte.convert(made / "nvfp4", tmp_path / "out", "compressed-tensors")


def test_only_what_the_dialect_cannot_hold_is_requantized(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "per expert", 32)
    rules = [
        {"match": "attention", "format": "nvfp4", "scale_search": "absmax"},
        {"match": "experts", "format": "mixfp4", "scale_search": "absmax"},
    ]
    run(source, tmp_path / "both", recipe(*rules), "compressed-tensors")
    done = halfbyte.convert(tmp_path / "both", tmp_path / "out", "modelopt", requantize="nvfp4")
    errors = {error.name: error.squared_error for error in done.errors}
    assert all((error > 1e-6) == (".experts." in name) for name, error in errors.items())


def test_verify_proves_the_conversion(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["convert", str(made / "mxfp4"), str(tmp_path / "out"), "--dialect", "halfbyte", "--verify", "--json"]
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verification"]["ok"] and all(entry["lossless"] for entry in told["carried"])
