"""Students: the forward pass of the output, bit for bit, and gradients that pass through."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte.demo import MODEL
from halfbyte.errors import HalfbyteError
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.train.student import student_of
from small_models import linear, recipe

Saved = Callable[[str], Path]
Quantized = Callable[..., Path]
IDS = torch.arange(40).reshape(2, 20)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("master", ["cell", "decoded"])
def test_step_0_has_the_logits_of_the_loaded_checkpoint(demo_start: Path, master: str, dtype: str) -> None:
    student = halfbyte.prepare(halfbyte.load(MODEL, dtype), demo_start, master=master)
    assert torch.equal(logits(student), logits(halfbyte.load(demo_start, dtype, dequantize=True)))


@pytest.mark.parametrize("name", ["qwen3-tiny-wiki", "qwen35moe-tiny-wiki"])
def test_step_0_of_trained_models_has_the_logits_of_the_loaded_checkpoint(
    shared: Path, name: str, quantized: Quantized
) -> None:
    source = shared / "data" / "models" / name
    start = quantized(source, "mixfp4")
    student = halfbyte.prepare(halfbyte.load(source, "float32"), start)
    assert torch.equal(logits(student), logits(halfbyte.load(start, "float32", dequantize=True)))


@pytest.mark.parametrize(
    "fmt",
    ["mixfp4", "mxfp4_hadamard", "int4_g32", "hif4", "affine4_g32", "int4_asym_g32", "razer", "nf4", "fp8_channel"],
)
def test_formats_of_all_kinds_have_the_logits_of_the_loaded_checkpoint(
    fmt: str, saved: Saved, quantized: Quantized
) -> None:
    start = quantized(saved("qwen3_moe"), fmt)
    student = halfbyte.prepare(halfbyte.load(saved("qwen3_moe"), "float32"), start)
    assert torch.equal(logits(student), logits(halfbyte.load(start, "float32", dequantize=True)))
    student(IDS).logits.square().mean().backward()
    assert all(master.grad is not None and master.grad.abs().sum() > 0 for master in student_of(student).masters)


def test_experts_that_lie_transposed_are_trained(saved: Saved, quantized: Quantized) -> None:
    start = quantized(saved("gpt_oss"), "mxfp4", "gpt-oss", "experts")
    student = halfbyte.prepare(halfbyte.load(saved("gpt_oss"), "float32"), start)
    assert torch.equal(logits(student), logits(halfbyte.load(start, "float32", dequantize=True)))


@pytest.mark.parametrize("scales", ["frozen", "dynamic"])
def test_a_plan_gives_the_forward_pass_of_its_output(scales: str, saved: Saved, tmp_path: Path) -> None:
    source = saved("qwen3_moe")
    plan = halfbyte.plan(source, linear("mixfp4"))
    halfbyte.quantize(plan, tmp_path / "out")
    student = halfbyte.prepare(halfbyte.load(source, "float32"), plan, scales=scales)
    assert torch.equal(logits(student), logits(halfbyte.load(tmp_path / "out", "float32", dequantize=True)))


def test_dynamic_scales_of_a_fusion_group_follow_their_largest_master(saved: Saved) -> None:
    source = saved("qwen3")
    student = halfbyte.prepare(halfbyte.load(source, "float32"), halfbyte.plan(source, linear("nvfp4")), "dynamic")
    weights = student_of(student).weights
    q, k = (weights[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qk")
    before = q.final().global_scale
    with torch.no_grad():
        q.master.mul_(8)
    assert k.final().global_scale == q.final().global_scale != before


def test_a_two_codebook_format_chooses_again_for_each_block(saved: Saved) -> None:
    source = saved("qwen3")
    student = halfbyte.prepare(halfbyte.load(source, "float32"), halfbyte.plan(source, linear("mixfp4")), "dynamic")
    weight = next(iter(student_of(student).weights.values()))
    before = weight.final().codebooks
    with torch.no_grad():
        weight.master.copy_(weight.master.flip(-1) ** 3)
    assert (weight.final().codebooks != before).any() and set(before.flat) == {0, 1}


def test_gradients_stop_beyond_the_ends_of_a_block(saved: Saved, quantized: Quantized) -> None:
    student = halfbyte.prepare(halfbyte.load(saved("qwen3"), "float32"), quantized(saved("qwen3")))
    weight = student_of(student).weights["model.layers.0.mlp.down_proj.weight"]
    with torch.no_grad():
        weight.master[0, 0] = 1e3
    weight(weight.master).sum().backward()
    assert weight.master.grad is not None
    assert weight.master.grad[0, 0] == 0 and weight.master.grad[0, 1] == 1


def test_the_state_dict_holds_masters_codes_and_scales(saved: Saved, quantized: Quantized) -> None:
    source, start = saved("qwen3"), quantized(saved("qwen3"))
    one = halfbyte.prepare(halfbyte.load(source, "float32"), start)
    with torch.no_grad():
        for master in student_of(one).masters:
            master.mul_(1.3)
    two = halfbyte.prepare(halfbyte.load(source, "float32"), start)
    state = one.state_dict()
    assert {key.rpartition(".")[2] for key in state} >= {"original", "codes", "scales", "global_scale"}
    two.load_state_dict(state)
    assert torch.equal(logits(one), logits(two))


def test_a_copy_of_a_student_is_one_of_its_own(saved: Saved, quantized: Quantized) -> None:
    student = halfbyte.prepare(halfbyte.load(saved("qwen3_moe"), "float32"), quantized(saved("qwen3_moe")))
    before, other = logits(student), copy.deepcopy(student)
    with torch.no_grad():
        for master in student_of(other).masters:
            master.zero_()
    assert torch.equal(logits(student), before) and not torch.equal(logits(other), before)


def test_switched_off_the_student_is_its_own_teacher(saved: Saved, quantized: Quantized) -> None:
    source = saved("qwen3")
    student = halfbyte.prepare(halfbyte.load(source, "float32"), quantized(source), master="original")
    for weight in student_of(student).weights.values():
        weight.enabled = False
    assert torch.equal(logits(student), logits(halfbyte.load(source, "float32")))


def test_activations_are_rounded_and_gradients_pass(saved: Saved, quantized: Quantized) -> None:
    source = saved("qwen3_moe")
    plain = halfbyte.prepare(halfbyte.load(source, "float32"), quantized(source))
    student = halfbyte.prepare(halfbyte.load(source, "float32"), quantized(source), activations="nvfp4")
    assert not torch.equal(logits(plain), logits(student))
    student(IDS).logits.square().mean().backward()
    assert all(master.grad is not None and master.grad.abs().sum() > 0 for master in student_of(student).masters)


def test_frozen_parameters_stay_and_the_others_are_trained(saved: Saved, quantized: Quantized) -> None:
    model = halfbyte.load(saved("qwen3"), "float32")
    model.model.layers[0].requires_grad_(False)
    student = halfbyte.prepare(model, quantized(saved("qwen3")))
    trained = {id(master) for master in student_of(student).masters}
    assert {name for name, weight in student_of(student).weights.items() if id(weight.master) in trained} == {
        name for name in student_of(student).weights if ".layers.1." in name
    }


def test_wrong_students_are_refused_in_one_sentence(saved: Saved, quantized: Quantized, tmp_path: Path) -> None:
    source, start = saved("qwen3"), quantized(saved("qwen3"))

    def refused(what: str, *args: object, **more: object) -> None:
        with pytest.raises(HalfbyteError, match=what) as error:
            halfbyte.prepare(*args, **more)
        assert "\n" not in str(error.value)

    refused("holds no quantized weights", halfbyte.load(source), source)
    refused("has no parameter for|cannot be trained as one weight", halfbyte.load(saved("qwen3_moe")), start)
    refused("scales cannot be 'loose'", halfbyte.load(source), start, scales="loose")
    refused("dynamic scales do not keep", halfbyte.load(source), start, scales="dynamic")
    refused("a student already", halfbyte.prepare(halfbyte.load(source), start), start)
    frozen = halfbyte.load(source).requires_grad_(False)
    refused("are frozen", frozen, start)
    refused("packed", halfbyte.load(start), start)
    stranger = halfbyte.load(source, "float32")
    stranger.model.layers[0].mlp.down_proj.weight.data.normal_()
    refused("not what the codes of the start were made of", stranger, start)
    refused("activations cannot be rounded", halfbyte.load(source), start, activations="int3")


def test_a_tied_head_is_refused_where_it_is_quantized(saved: Saved) -> None:
    source = saved("llama-tied")
    head = recipe({"match": "all", "keep": True}, {"match": "embedding", "format": "nvfp4", "scale_search": "absmax"})
    with pytest.raises(HalfbyteError, match="tied to another layer"):
        halfbyte.prepare(halfbyte.load(source), make_plan(Checkpoint.open(source), head))
