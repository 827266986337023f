"""Statistics collected layer by layer are those of the whole model."""

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

from halfbyte.calibrate.collect import CollectOptions, collect_statistics
from halfbyte.calibrate.samples import make_samples
from halfbyte.calibration import match_importance
from halfbyte.calibration.statistics import Statistics, merge
from halfbyte.demo import MODEL
from halfbyte.errors import CheckpointError, HalfbyteError, OutputError
from halfbyte.runtime.loading import load, load_tokenizer
from halfbyte.source.checkpoint import Checkpoint

SAMPLES, LENGTH = 6, 64


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, demo_text: str) -> Statistics:
    out = tmp_path_factory.mktemp("statistics") / "demo"
    return collect_statistics(MODEL, out, [demo_text], CollectOptions(samples=SAMPLES, length=LENGTH))


def _inputs(module_name: str, text: str) -> torch.Tensor:
    """What a module of the whole model sees over the same samples."""
    model = load(MODEL, "float32")
    seen: list[torch.Tensor] = []
    model.get_submodule(module_name).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    samples = make_samples([text], load_tokenizer(MODEL), SAMPLES, LENGTH)
    with torch.inference_mode():
        for tokens in samples.tokens:
            model(input_ids=torch.tensor([tokens]), use_cache=False)
    return torch.cat(seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["model.layers.0.linear_attn.in_proj_z", "model.layers.3.self_attn.o_proj", "model.layers.2.mlp.gate", "lm_head"],
)
def test_sums_are_those_of_the_whole_model_run_at_once(collected: Statistics, demo_text: str, name: str) -> None:
    x = _inputs(name, demo_text).double()
    weight = next(w for w in collected.names if w.endswith(name.removeprefix("model.") + ".weight"))
    hessian, count = collected.hessian(weight), collected.array(weight, "count")
    assert hessian is not None and count == len(x) == SAMPLES * LENGTH
    expected = (x.T @ x / len(x)).numpy()
    np.testing.assert_allclose(hessian, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(collected.importance().values[weight], np.diag(expected), rtol=1e-3)
    np.testing.assert_allclose(collected.array(weight, "amax"), x.abs().max(), rtol=1e-4)


def test_every_matrix_of_the_main_model_is_covered(collected: Statistics) -> None:
    matched = match_importance(collected.importance(), Checkpoint.open(MODEL).weights)
    assert not matched.unmatched
    assert all(name.startswith("mtp.") for name in matched.uncovered)


def test_each_expert_counts_the_tokens_that_the_router_sent_to_it(collected: Statistics) -> None:
    config = Checkpoint.open(MODEL).inventory.config
    per_token = config.get("text_config", config)["num_experts_per_tok"]
    for kind in ("gate_up_proj", "down_proj"):
        name = next(n for n in collected.names if n.endswith(f"layers.1.mlp.experts.{kind}"))
        count = collected.array(name, "count")
        assert count is not None and count.sum() == SAMPLES * LENGTH * per_token
        hessian = collected.hessian(name, int(count.argmax()))
        assert hessian is not None and hessian.shape == (hessian.shape[0],) * 2


def test_shared_inputs_are_stored_once(collected: Statistics) -> None:
    owner = {collected.same.get(n, n) for n in collected.names if "layers.3.self_attn" in n and "_norm" not in n}
    assert len(owner) == 2  # q, k and v see the same; o sees another


@pytest.mark.slow
def test_all_experts_see_all_tokens_where_that_is_wanted(tmp_path: Path, demo_text: str, collected: Statistics) -> None:
    every = collect_statistics(MODEL, tmp_path / "s", [demo_text], CollectOptions(SAMPLES, LENGTH, all_experts=True))
    name = next(n for n in every.names if n.endswith("layers.1.mlp.experts.down_proj"))
    count, routed = every.array(name, "count"), every.array(name, "routed")
    assert count is not None and (count == SAMPLES * LENGTH).all()
    np.testing.assert_array_equal(routed, collected.array(name, "count"))
    # and the layers after it see what they always do
    last = next(n for n in every.names if n.endswith("lm_head.weight"))
    np.testing.assert_array_equal(every.hessian(last), collected.hessian(last))


def test_experts_whose_hessians_need_too_much_share_one(tmp_path: Path, demo_text: str, collected: Statistics) -> None:
    pooled = collect_statistics(
        MODEL, tmp_path / "s", [demo_text], CollectOptions(SAMPLES, LENGTH, hessian_bytes=1 << 19)
    )
    name = next(n for n in pooled.names if n.endswith("layers.1.mlp.experts.gate_up_proj"))
    own, together = collected.array(name, "hessian"), pooled.array(name, "hessian")
    assert own is not None and together is not None and together.ndim == 2
    np.testing.assert_allclose(together, own.sum(0), rtol=1e-3, atol=1e-3 * own.max())


@pytest.mark.slow
def test_merged_statistics_are_those_of_both_texts(tmp_path: Path, demo_text: str) -> None:
    content = Path(demo_text).read_text(encoding="utf-8")
    for i, part in enumerate((content[:20000], content[20000:40000])):
        (tmp_path / f"{i}.txt").write_text(part, encoding="utf-8")
        collect_statistics(MODEL, tmp_path / str(i), [tmp_path / f"{i}.txt"], CollectOptions(3, LENGTH))
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "both")
    one, two, both = (Statistics(tmp_path / n) for n in ("0", "1", "both"))
    for name in both.names:
        for kind, add in (("count", np.add), ("squares", np.add), ("hessian", np.add), ("amax", np.maximum)):
            np.testing.assert_array_equal(both.array(name, kind), add(one.array(name, kind), two.array(name, kind)))
    assert both.description["tokens"] == 6 * LENGTH


@pytest.mark.slow
def test_statistics_collected_in_different_ways_are_not_merged(tmp_path: Path, demo_text: str) -> None:
    collect_statistics(MODEL, tmp_path / "a", [demo_text], CollectOptions(2, LENGTH))
    collect_statistics(MODEL, tmp_path / "b", [demo_text], CollectOptions(2, LENGTH, hessians=False))
    with pytest.raises(CheckpointError, match="differ in 'hessians'"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_killed_calibration_continues_and_gives_the_same(
    tmp_path: Path, demo_text: str, collected: Statistics
) -> None:
    script = f"""
        import os, signal, sys
        import torch
        torch.set_num_threads(1)
        from halfbyte.calibrate.collect import CollectOptions, collect_statistics
        seen = []
        def progress(done, total):
            seen.append(done)
            if len(seen) == 3 and "kill" in sys.argv:
                os.kill(os.getpid(), signal.SIGKILL)
        where = {str(MODEL)!r}, {str(tmp_path / "s")!r}, [{demo_text!r}]
        collect_statistics(*where, CollectOptions({SAMPLES}, {LENGTH}), progress=progress)
        print(seen)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    killed = subprocess.run([*command, "kill"], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    with pytest.raises(CheckpointError, match="not complete"):
        Statistics(tmp_path / "s")
    resumed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert resumed.stdout.strip() == "[2, 3, 4, 5]"
    after = Statistics(tmp_path / "s")
    for name in collected.names:
        np.testing.assert_array_equal(after.array(name, "hessian"), collected.array(name, "hessian"))
    assert not (tmp_path / "s" / "work").exists()


@pytest.mark.slow
def test_another_calibration_s_folder_is_left_alone(tmp_path: Path, demo_text: str) -> None:
    collect_statistics(MODEL, tmp_path / "s", [demo_text], CollectOptions(2, LENGTH))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(OutputError, match="another folder"):
        collect_statistics(MODEL, tmp_path / "s", [demo_text], CollectOptions(3, LENGTH))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_finished_calibration_is_not_run_again(tmp_path: Path, demo_text: str) -> None:
    calls: list[Any] = []
    collect_statistics(MODEL, tmp_path / "s", [demo_text], CollectOptions(2, LENGTH))
    collect_statistics(
        MODEL, tmp_path / "s", [demo_text], CollectOptions(2, LENGTH), progress=lambda *args: calls.append(args)
    )
    assert calls == []


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "What is a tuple?"}, {"from": "gpt", "value": "A sequence that stays as it is."}]
    (tmp_path / "chat.json").write_text(json.dumps([{"conversations": talk}] * 20))
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    drawn = make_samples([tmp_path / "chat.json"], tokenizer, 2, 16)
    assert tokenizer.decode(drawn.tokens[0]).startswith("user: What is a tuple?")


def test_conversations_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text("[]")
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = None
    with pytest.raises(HalfbyteError, match="no chat template"):
        make_samples([tmp_path / "chat.json"], tokenizer, 2, 16)


def test_a_text_without_one_whole_sample_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(HalfbyteError, match="fewer than one sample of 64"):
        collect_statistics(MODEL, tmp_path / "s", [tmp_path / "short.txt"], CollectOptions(2, LENGTH))
    assert not (tmp_path / "s").exists()


def test_a_tied_head_that_the_checkpoint_does_not_hold_is_left_out(tmp_path: Path, shared: Path) -> None:
    assert _of_stories(tmp_path, shared, "stories260K") == set()


def test_tied_embeddings_may_be_stored_as_the_head_alone(tmp_path: Path, shared: Path) -> None:
    assert _of_stories(tmp_path, shared, "TinyStories-656K") == {"lm_head.weight"}


def _of_stories(tmp_path: Path, shared: Path, model: str) -> set[str]:
    """What is collected of a tied model besides its linear layers, which all are."""
    source = shared / "data" / "models" / model
    found = collect_statistics(
        source, tmp_path / "s", [shared / "data/text/calibration/tiny.utf8"], CollectOptions(1, LENGTH)
    )
    linear = {w.name for w in Checkpoint.open(source).weights if w.role.startswith(("attention", "mlp"))}
    assert linear <= set(found.names)
    return set(found.names) - linear
