"""``target: residual`` from text to files: better than GPTQ alone, the same after a kill, and honest about itself."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.calibrate.models import dense_model

from halfbyte import quantize, verify
from halfbyte.api import plan as make
from halfbyte.calibrate.collect import CollectOptions, collect_statistics
from halfbyte.calibrate.residual import round_layers
from halfbyte.calibration.rounded import objective_of, read_rounded
from halfbyte.calibration.statistics import Statistics, merge
from halfbyte.checkpoint import Reader
from halfbyte.demo import MODEL
from halfbyte.errors import CheckpointError, RecipeError
from halfbyte.plan.build import plan_to_round
from halfbyte.recipes import Recipe, load_recipe, parse_recipe
from halfbyte.runtime.loading import load, load_tokenizer
from halfbyte.source.checkpoint import Checkpoint

SAMPLES = CollectOptions(samples=8, length=64)


def recipe(fmt: str = "nvfp4", **keys: Any) -> Recipe:
    rule = {"match": ["linear"], "format": fmt, "rounding": "gptq", "order": "act", "if_not_divisible": "keep"}
    return Recipe.model_validate({"name": "refit", "rules": [{**rule, "target": "residual", **keys}]})


def rounded(source: Path, out: Path, text: str, wanted: Recipe, dialect: str = "halfbyte") -> Statistics:
    checkpoint = Checkpoint.open(source)
    return round_layers(plan_to_round(checkpoint, wanted, dialect), wanted, out, [text], SAMPLES)


def divergence(source: Path, out: Path, text: str) -> float:
    """Mean KL on text behind the calibration's."""
    ids = torch.tensor(load_tokenizer(source)(Path(text).read_text(), add_special_tokens=False)["input_ids"][-1024:])
    with torch.inference_mode():
        logs = [
            load(m, "float32", dequantize=True)(input_ids=ids.view(4, -1)).logits.log_softmax(-1) for m in (source, out)
        ]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_model(tmp_path_factory.mktemp("dense") / "m")


@pytest.fixture(scope="module")
def statistics(dense: Path, demo_text: str) -> Statistics:
    return rounded(dense, dense.parent / "s", demo_text, recipe())


def test_it_lowers_the_divergence_below_that_of_gptq(dense: Path, demo_text: str, tmp_path: Path) -> None:
    many = CollectOptions(samples=64, length=64)
    collect_statistics(dense, tmp_path / "plain", [demo_text], many)
    quantize(dense, tmp_path / "gptq", recipe(target="weight"), importance=tmp_path / "plain")
    round_layers(
        plan_to_round(Checkpoint.open(dense), recipe(), "halfbyte"), recipe(), tmp_path / "s", [demo_text], many
    )
    quantize(dense, tmp_path / "refit", recipe(), importance=tmp_path / "s")
    found = {name: divergence(dense, tmp_path / name, demo_text) for name in ("gptq", "refit")}
    assert found["refit"] < 0.95 * found["gptq"], found


def test_the_output_holds_what_was_rounded_and_says_how(dense: Path, statistics: Statistics) -> None:
    out = dense.parent / "said"
    done = quantize(dense, out, recipe(), importance=statistics.folder)
    assert done.calibrated_relmse is not None and done.calibrated_relmse < done.relmse
    assert not verify(out, dense).problems
    checkpoint = Checkpoint.open(out)
    weight = next(w for w in checkpoint.weights if w.name.endswith("1.mlp.down_proj.weight"))
    with Reader(checkpoint.inventory) as reader:
        stored = checkpoint.read_quantized(reader, weight)
    mine = read_rounded(statistics, weight.name, stored.format, stored.shape, 0, stored.shape[0])
    np.testing.assert_array_equal(mine.decode(), stored.decode())
    said = json.loads((out / "halfbyte.json").read_text())["importance"]
    assert said["target"] == "residual" and (said["samples"], said["length"]) == (8, 64) and said["tokens_sha256"]


def test_slices_of_what_was_rounded_are_those_of_the_whole(statistics: Statistics, dense: Path) -> None:
    name = next(n for n in statistics.names if n.endswith("0.mlp.up_proj.weight"))
    item = next(i for i in plan_to_round(Checkpoint.open(dense), recipe(), "halfbyte").items if i.weight.name == name)
    assert item.format is not None
    whole = read_rounded(statistics, name, item.format, item.weight.shape, 0, 128).decode()
    part = read_rounded(statistics, name, item.format, item.weight.shape, 40, 56).decode()
    np.testing.assert_array_equal(part, whole[40:56])
    assert objective_of(statistics, name, 0, 40)[1] > 0 and objective_of(statistics, name, 40, 128) == (0.0, 0.0)
    with pytest.raises(CheckpointError, match="not as"):
        read_rounded(statistics, name, item.format, (128, 128), 0, 1)


def test_matrices_that_engines_fuse_share_one_global_scale(statistics: Statistics) -> None:
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        first, other = (
            statistics.array(next(n for n in statistics.names if f"0.{k}" in n), "global_scale")
            for k in ("self_attn.q_proj", kind)
        )
        assert first == other


def test_it_serves_its_recipe_and_its_dialect_alone(dense: Path, statistics: Statistics, demo_text: str) -> None:
    with pytest.raises(RecipeError, match="rounded by recipe refit"):
        make(dense, "nvfp4-gptq", importance=statistics.folder)
    with pytest.raises(RecipeError, match="for the dialect halfbyte"):
        make(dense, recipe(), dialect="compressed-tensors", importance=statistics.folder)
    collect_statistics(dense, dense.parent / "alone", [demo_text], SAMPLES)
    with pytest.raises(RecipeError, match="give the text itself"):
        make(dense, recipe(), importance=dense.parent / "alone")
    with pytest.raises(CheckpointError, match="cannot be added up"):
        merge([statistics.folder, dense.parent / "alone"], dense.parent / "sum")


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["mixfp4", "mxfp4", "int4_g32", "if4", "razer"])
def test_every_format_with_fixed_codebooks_can_be_refitted(
    dense: Path, demo_text: str, tmp_path: Path, fmt: str
) -> None:
    wanted = recipe(fmt, static_groups=True) if fmt == "mxfp4" else recipe(fmt)
    found = rounded(dense, tmp_path / "s", demo_text, wanted)
    quantize(dense, tmp_path / "out", wanted, importance=found.folder)
    assert not verify(tmp_path / "out", dense).problems


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bytes(
    dense: Path, statistics: Statistics, demo_text: str, tmp_path: Path
) -> None:
    script = f"""
        import os, signal, sys
        import torch
        torch.set_num_threads(1)
        from halfbyte.calibrate import residual
        from halfbyte.calibrate.collect import CollectOptions
        from halfbyte.plan.build import plan_to_round
        from halfbyte.recipes import parse_recipe
        from halfbyte.source.checkpoint import Checkpoint
        wanted = parse_recipe({recipe().model_dump_json(exclude_none=True)!r}, "test")
        steps = []
        run = residual.run_quantized
        def counted(*args):
            steps.append(0)
            if len(steps) == 7 and "kill" in sys.argv:
                os.kill(os.getpid(), signal.SIGKILL)
            run(*args)
        residual.run_quantized = counted
        plan = plan_to_round(Checkpoint.open({str(dense)!r}), wanted, "halfbyte")
        residual.round_layers(plan, wanted, {str(tmp_path / "s")!r}, [{demo_text!r}], CollectOptions(8, 64))
        print(len(steps))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    killed = subprocess.run([*command, "kill"], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    resumed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert resumed.stdout.strip() == "4"  # the steps of the second layer alone
    for part in statistics.description["parts"]:
        file = f"{part}.safetensors"
        assert (tmp_path / "s" / file).read_bytes() == (statistics.folder / file).read_bytes()
    assert not (tmp_path / "s" / "work").exists()


@pytest.mark.slow
def test_experts_are_refitted_each_for_its_own_tokens(tmp_path: Path, demo_text: str) -> None:
    found = rounded(MODEL, tmp_path / "s", demo_text, recipe())
    name = next(n for n in found.names if n.endswith("layers.1.mlp.experts.down_proj"))
    count, objective = found.array(name, "count"), found.array(name, "objective")
    config = Checkpoint.open(MODEL).inventory.config
    per_token = config.get("text_config", config)["num_experts_per_tok"]
    assert count is not None and count.sum() == 8 * 64 * per_token
    assert objective is not None and ((objective[:, 1] > 0) == (count >= 32)).all()
    quantize(MODEL, tmp_path / "out", recipe(), importance=found.folder)
    assert not verify(tmp_path / "out", MODEL).problems


def test_gradients_at_outputs_and_descent_go_with_it(dense: Path, demo_text: str, tmp_path: Path) -> None:
    wanted = recipe(output="fisher", refine="descent")
    found = rounded(dense, tmp_path / "s", demo_text, wanted)
    plain = rounded(dense, tmp_path / "plain", demo_text, recipe(refine="descent"))
    name = next(n for n in found.names if n.endswith("0.self_attn.q_proj.weight"))
    assert (found.array(name, "codes") != plain.array(name, "codes")).any()
    assert not (tmp_path / "s" / "work").exists()
    done = quantize(dense, tmp_path / "out", wanted, importance=found.folder)
    assert done.calibrated_relmse is not None and not verify(tmp_path / "out", dense).problems


def test_the_dialect_s_way_of_global_scales_is_kept(dense: Path, demo_text: str, tmp_path: Path) -> None:
    found = rounded(dense, tmp_path / "s", demo_text, recipe(), "compressed-tensors")
    name = next(n for n in found.names if n.endswith("mlp.down_proj.weight"))
    assert found.array(name, "global_scale_inv") is not None
    quantize(dense, tmp_path / "out", recipe(), dialect="compressed-tensors", importance=found.folder)
    assert not verify(tmp_path / "out", dense).problems


def test_keys_that_contradict_it_are_refused() -> None:
    text = "rules: [{match: linear, format: nvfp4, rounding: gptq, target: residual, transform: awq}]"
    with pytest.raises(RecipeError, match="refits"):
        parse_recipe(text, "test", "test")
    with pytest.raises(RecipeError, match="no meaning without `rounding: gptq`"):
        parse_recipe("rules: [{match: linear, format: nvfp4, target: residual}]", "test", "test")
    assert recipe().refits and not load_recipe("nvfp4-gptq").refits
