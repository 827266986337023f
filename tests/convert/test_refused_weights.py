"""Weights that their format cannot hold: named, with nothing left of the output; or kept with ``--keep-going``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import halfbyte
from halfbyte.checkpoint import Reader
from halfbyte.cli import main
from halfbyte.errors import CheckpointError, UnconvertibleError
from halfbyte.plan.build import make_plan
from halfbyte.recipes import Recipe, load_recipe
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from small_models import (
    DATA_FREE,
    DENSE_CONFIG,
    MOE_CONFIG,
    Tensors,
    dense_tensors,
    linear,
    moe_tensors,
    read_file,
    run,
    write_checkpoint,
)

conversion = import_module("halfbyte.convert.conversion")
DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
HEADS: dict[str, float] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6}
HEADS |= {"max_position_embeddings": 64, "intermediate_size": 256, "vocab_size": 64}
SHARD_BYTES = 60_000


def with_weight(folder: Path, change: Callable[[np.ndarray], np.ndarray], name: str = DOWN) -> Path:
    """A dense model in F32 with one weight changed."""
    tensors: Tensors = {key: array.astype(np.float32) for key, array in dense_tensors().items()}
    tensors[name] = np.ascontiguousarray(change(tensors[name].copy()), dtype=np.float32)
    return write_checkpoint(folder, tensors, {**DENSE_CONFIG, **HEADS, "dtype": "float32"}, shards=3)


def tiny(array: np.ndarray) -> np.ndarray:
    return array * np.float32(1e-9)


def outlier(array: np.ndarray) -> np.ndarray:
    array[3, 5] = 1e30
    return array


EXTREMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "zeros": np.zeros_like,
    "negative zeros": lambda a: np.zeros_like(a) * np.float32(-1),
    "denormals": lambda a: np.sign(a) * np.float32(1e-41),
    "smallest": lambda a: np.full_like(a, 1e-45),
    "small": lambda a: a * np.float32(1e-30),
    "huge": lambda a: np.sign(a) * np.float32(1e38),
    "largest": lambda a: np.full_like(a, np.finfo(np.float32).max),
    "constant": lambda a: np.full_like(a, 0.02),
    "one outlier": outlier,
    "one value": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 7, np.float32(3e38), np.float32(0)),
}


def test_a_weight_that_fp16_scales_cannot_hold_is_named_with_its_error(tmp_path: Path) -> None:
    source = with_weight(tmp_path / "source", tiny)
    with pytest.raises(
        UnconvertibleError, match=rf"{DOWN} has a relative error of 1 in int4_q4_0|{DOWN} has a"
    ) as raised:
        run(source, tmp_path / "out", linear("q4_0"))
    assert set(raised.value.weights) == {DOWN}
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_the_files_that_were_finished_before(tmp_path: Path) -> None:
    source = with_weight(tmp_path / "source", tiny, "model.layers.1.mlp.down_proj.weight")
    (tmp_path / "out").mkdir()
    with pytest.raises(UnconvertibleError, match=r"layers\.1\.mlp\.down_proj\.weight has a relative error"):
        run(source, tmp_path / "out", linear("q4_0"), max_shard_bytes=SHARD_BYTES)
    assert list((tmp_path / "out").iterdir()) == []
    run(source, tmp_path / "out", linear("int4_g32"), max_shard_bytes=SHARD_BYTES)


def test_one_expert_of_many_is_refused_by_its_number(tmp_path: Path) -> None:
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    tensors = {key: array.astype(np.float32) for key, array in moe_tensors().items()}
    tensors[name][2] *= np.float32(1e-9)
    source = write_checkpoint(tmp_path / "source", tensors, MOE_CONFIG)
    with pytest.raises(UnconvertibleError, match=rf"{name} has a relative error of 1 in expert 2 in q4_0"):
        run(source, tmp_path / "out", linear("q4_0"))


def test_what_quantize_accepts_verify_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = import_module("halfbyte.convert.refusals")
    source = with_weight(tmp_path / "source", lambda a: a)
    error = max(e.relmse for e in halfbyte.quantize(str(source), tmp_path / "a", linear("nvfp4")).errors)
    for bound, right in ((error * 1.001, True), (error * 0.999, False)):
        assert verify(tmp_path / "a", source, max_relmse=bound).ok is right
        monkeypatch.setattr(refusals, "largest_relmse", lambda *_, bound=bound, **__: bound)
        if right:
            run(source, tmp_path / "b", linear("nvfp4"))
        else:
            with pytest.raises(UnconvertibleError, match=r"at most 0\.0\d+ is allowed"):
                run(source, tmp_path / "c", linear("nvfp4"))


def test_a_read_error_leaves_what_is_finished_and_says_that_it_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_weight(tmp_path / "source", lambda a: a)
    plan = make_plan(Checkpoint.open(source), linear("nvfp4"), max_shard_bytes=SHARD_BYTES)
    read = Reader.read

    def failing(reader: object, name: str, *more: object) -> object:
        if name == "model.layers.1.mlp.down_proj.weight":
            raise CheckpointError("the file cannot be read (Input/output error)")
        return read(reader, name, *more)

    monkeypatch.setattr(Reader, "read", failing)
    with pytest.raises(CheckpointError, match=r"weight files in .* are finished, and the same command continues there"):
        conversion.convert(plan, tmp_path / "out", threads=1)
    monkeypatch.undo()
    assert conversion.convert(plan, tmp_path / "out").resumed_shards > 0


def test_a_source_that_changes_during_the_work_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_weight(tmp_path / "source", lambda a: a)
    plan = make_plan(Checkpoint.open(source), linear("nvfp4"), max_shard_bytes=SHARD_BYTES)
    record, recorded = conversion.Journal.record, []

    def touching(journal: object, name: str, *more: object) -> None:
        record(journal, name, *more)
        recorded.append(name)
        if len(recorded) == 2:
            os.utime(source / "model-00003-of-00003.safetensors")

    monkeypatch.setattr(conversion.Journal, "record", touching)
    with pytest.raises(CheckpointError, match=r"00003\.safetensors changed after the plan was made"):
        conversion.convert(plan, tmp_path / "out", threads=1)
    assert len(recorded) == 2 and not (tmp_path / "out").exists()


def keeping(source: Path, out: Path, recipe: str | Recipe, **more: object) -> tuple[object, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = halfbyte.quantize(str(source), out, recipe, keep_going=True, **more)
    return done, [str(warning.message) for warning in caught]


def test_keep_going_keeps_all_such_weights_and_what_is_fused_with_them(tmp_path: Path) -> None:
    tensors = {key: array.astype(np.float32) for key, array in dense_tensors().items()}
    tensors[UP] *= np.float32(1e-9)
    tensors["model.layers.1.mlp.down_proj.weight"] *= np.float32(1e-9)
    source = write_checkpoint(tmp_path / "source", tensors, {**DENSE_CONFIG, "dtype": "float32"})
    done, said = keeping(source, tmp_path / "out", linear("q4_0"))
    kept = {name for name in tensors if "proj" in name} & set(read_file(tmp_path / "out"))
    assert kept == {UP, UP.replace("up_proj", "gate_proj"), "model.layers.1.mlp.down_proj.weight"}
    assert all(read_file(tmp_path / "out")[name].tobytes() == tensors[name].tobytes() for name in kept)
    assert [line.split(" stays unquantized")[0] for line in said[:2]] == sorted(
        [UP, "model.layers.1.mlp.down_proj.weight"]
    )
    assert verify(tmp_path / "out", source).problems == [] and len(done.errors) == 14 - 3


def test_keep_going_is_complete_when_it_is_run_again(tmp_path: Path) -> None:
    source = with_weight(tmp_path / "source", tiny)
    keeping(source, tmp_path / "out", linear("q4_0"))
    done, said = keeping(source, tmp_path / "out", linear("q4_0"))
    assert done.already_complete and said == []


def test_keep_going_continues_its_second_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_weight(tmp_path / "source", tiny)
    record, recorded = conversion.Journal.record, []

    def interrupted(journal: object, name: str, *more: object) -> None:
        record(journal, name, *more)
        recorded.append(name)
        if len(recorded) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(conversion.Journal, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        keeping(source, tmp_path / "out", linear("q4_0"), max_shard_bytes=SHARD_BYTES)
    monkeypatch.undo()
    done, said = keeping(source, tmp_path / "out", linear("q4_0"), max_shard_bytes=SHARD_BYTES)
    assert done.resumed_shards > 0 and said == []
    assert verify(tmp_path / "out", source).ok


def test_keep_going_cannot_keep_what_is_not_finite(tmp_path: Path) -> None:
    source = with_weight(tmp_path / "source", lambda a: a * np.float32(np.nan))
    with pytest.raises(UnconvertibleError, match="holds a NaN"):
        keeping(source, tmp_path / "out", linear("q4_0"))
    assert not (tmp_path / "out").exists()


def test_the_command_names_the_option_and_then_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = with_weight(tmp_path / "source", tiny)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\nrules:\n  - match: linear\n    format: q4_0\n")
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--recipe", str(recipe)]
    assert main(arguments) == 2
    assert "--keep-going leaves such weights unquantized" in capsys.readouterr().err
    assert main([*arguments, "--keep-going", "--json", "--verify"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["not_quantized"] == [DOWN] and document["verification"]["ok"]
    assert f"{DOWN} stays unquantized: has a relative error of 1 in q4_0" in " ".join(printed.err.split())
    assert main([*arguments, "--keep-going"]) == 0
    assert "already complete" in capsys.readouterr().out


FORMATS = [
    "q4_0",
    "q8_0",
    "nvfp4",
    "mxfp4",
    "mixfp4",
    "int4_g32",
    "int4_asym_g32",
    "fp8_channel",
    "affine4_g32",
    "affine2_g128",
]
FOR_EXPERTS = {"makora-mixfp4", "nvfp4-fp8", "nvidia-nvfp4"}


@pytest.mark.slow
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("recipe", [*sorted({*DATA_FREE} - FOR_EXPERTS), *FORMATS])
def test_extreme_weights_are_held_or_refused_without_a_warning(tmp_path: Path, recipe: str, extreme: str) -> None:
    source = with_weight(tmp_path / "source", EXTREMES[extreme])
    known = load_recipe(recipe) if recipe in DATA_FREE else linear(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            done = halfbyte.quantize(str(source), tmp_path / "out", known)
        except UnconvertibleError as refused:
            assert DOWN in str(refused) and not (tmp_path / "out").exists()
            return
        assert verify(tmp_path / "out", source).problems == []
    assert all(error.relmse <= (0.5 if recipe == "affine2_g128" else 0.1) for error in done.errors)


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt", "mlx", "gguf", "halfbyte"])
def test_no_warning_reaches_a_user_of_the_command(tmp_path: Path, dialect: str) -> None:
    formats = {"mlx": "affine4_g32", "gguf": "q4_0"}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: r\nrules:\n  - match: linear\n    format: {formats.get(dialect, 'nvfp4')}\n")
    for name in ("denormals", "one outlier"):
        source = with_weight(tmp_path / name, EXTREMES[name])
        arguments = ["quantize", str(source), str(tmp_path / f"{name} out"), "--recipe", str(recipe)]
        arguments += ["--dialect", dialect, "--keep-going"]
        done = subprocess.run(
            [sys.executable, "-W", "error::RuntimeWarning", "-m", "halfbyte", *arguments],
            capture_output=True,
            text=True,
        )
        assert "Warning" not in done.stderr and "Traceback" not in done.stderr and "bug" not in done.stderr
        assert done.returncode == 0 or "tokenizer" in done.stderr, done.stderr
