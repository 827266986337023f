from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import evaluate
from halfbyte.evaluate import evaluation as run_module
from halfbyte.evaluate.divergence import TokenScores, divergence, log_softmax
from halfbyte.evaluate.reference_logprobs import Cache, checksum, compress, expand
from halfbyte.source.checkpoint import Checkpoint
from small_models import linear, run

DEMO = Path(halfbyte.__file__).parent / "demo_model"
KEY = {"model": "a"}


def log_probs(seed: int = 0, tokens: int = 40, vocabulary: int = 5000, spread: float = 3.0) -> torch.Tensor:
    return log_softmax(torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread)


def write(cache: Cache, values: torch.Tensor, key: dict[str, Any] = KEY) -> None:
    nll, window = np.zeros(len(values)), np.zeros(len(values), dtype=np.int64)
    with cache.write(key, values.shape[1], len(values)) as writer:
        for part in values.split(16):
            writer.add(part)
        writer.close(key, nll=nll, window=window)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 10.0])
def test_what_is_read_is_what_was_written_but_for_a_small_part_of_its_range(spread: float) -> None:
    p = log_probs(spread=spread)
    q = expand(*compress(p))
    reach = torch.minimum(p.amax(1) - p.amin(1), torch.tensor(32.0))[:, None]
    near = p > p.amax(1, keepdim=True) - 32
    # half a step by rounding, and as much at most by normalising again
    assert ((p - q).abs() <= reach / 65535 + 4e-6)[near].all()
    assert torch.exp(q).sum(1).sub(1).abs().max() < 1e-5


def test_divergences_are_those_of_the_exact_log_probabilities(
    tmp_path: Path,
) -> None:
    p, noise = log_probs(), torch.randn(40, 5000, generator=torch.Generator().manual_seed(1))
    write(Cache(tmp_path), p)
    reference = Cache(tmp_path).find(KEY)
    assert reference is not None
    for size in (0.01, 0.1, 1.0):
        q = log_softmax(p + size * noise)
        kl, same = reference.compare(0, q)
        error = kl - divergence(p, q)
        assert error.abs().max() < 5e-5 * size + 1e-6 and error.mean().abs() < 1e-5 * size + 2e-7
        assert torch.equal(same, p.argmax(1) == q.argmax(1))


def test_the_same_bits_have_no_divergence_at_all_and_others_have_some(tmp_path: Path) -> None:
    p = log_probs()
    write(Cache(tmp_path), p)
    reference = Cache(tmp_path).find(KEY)
    assert reference is not None
    kl, same = reference.compare(8, p[8:20])
    assert kl.abs().max() == 0 and same.all()
    other = p.clone()
    other[0, 17] = torch.nextafter(other[0, 17], torch.tensor(0.0))
    assert checksum(other)[0] != checksum(p)[0] and torch.equal(checksum(other)[1:], checksum(p)[1:])
    swapped = p.clone()
    swapped[0, [3, 4]] = p[0, [4, 3]]
    assert checksum(swapped)[0] != checksum(p)[0]


def test_tokens_that_the_source_rules_out_stay_ruled_out_enough() -> None:
    p = torch.cat([log_probs(), torch.full((40, 3), -torch.inf)], dim=1)
    q = expand(*compress(p))
    assert torch.isfinite(q).all() and q[:, -3:].max() < p.amax(1).max() - 31


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(KeyboardInterrupt), cache.write(KEY, 10, 4) as writer:
        writer.add(log_probs(tokens=2, vocabulary=10))
        raise KeyboardInterrupt
    assert cache.find(KEY) is None and list(cache.folder.iterdir()) == []


@pytest.mark.parametrize("name", ["codes.u16", "tokens.npz", "meta.json"])
def test_a_damaged_reference_is_none_and_is_written_anew(name: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    write(cache, log_probs())
    file = cache.path(KEY) / name
    file.write_bytes(file.read_bytes()[:-7])
    assert cache.find(KEY) is None
    write(cache, log_probs())
    assert cache.find(KEY) is not None


def test_a_reference_under_another_key_is_not_found(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    write(cache, log_probs())
    assert cache.find({"model": "b"}) is None
    os.rename(cache.path(KEY), cache.path({"model": "b"}))
    assert cache.find({"model": "b"}) is None


def test_what_killed_processes_left_is_removed_and_what_others_are_writing_is_not(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for number in (ended.pid, os.getpid()):
        (cache.folder / f"reference.{number}.x.scratch").mkdir(parents=True)
        (cache.folder / f"reference.{number}.x.scratch" / "codes.u16").write_bytes(b"x")
    write(cache, log_probs())
    assert [path.name for path in cache.folder.glob("*.scratch")] == [f"reference.{os.getpid()}.x.scratch"]


def test_a_disk_that_is_too_small_is_noticed_before_the_model_runs(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match=r"--cache DIR.*--max-tokens"), Cache(tmp_path).write(KEY, 1 << 40, 1 << 30):
        raise AssertionError("not reached")


def test_scores_are_stored_and_found(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.find_scores(KEY) is None
    scores = TokenScores(np.arange(3.0), np.arange(3), np.ones(3), np.array([True, False, True]))
    cache.store_scores(KEY, scores)
    found = cache.find_scores(KEY)
    assert found is not None
    assert all(np.array_equal(vars(found)[name], values) for name, values in vars(scores).items())


@pytest.fixture
def nvfp4(tmp_path: Path) -> Path:
    run(DEMO, tmp_path / "nvfp4", linear("nvfp4"))
    return tmp_path / "nvfp4"


@pytest.mark.slow
def test_the_source_runs_once_for_all_evaluations_on_a_text(
    nvfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    original = run_module.opened

    def opened(path: Any, *args: Any) -> Any:
        loaded.append(Path(path).name)
        return original(path, *args)

    monkeypatch.setattr(run_module, "opened", opened)
    settings: dict[str, Any] = {"length": 64, "max_tokens": 256, "cache": tmp_path / "cache"}
    first = evaluate(nvfp4, DEMO, noise_floor=True, **settings)
    assert loaded == ["demo_model", "nvfp4", "demo_model"]
    again = evaluate(nvfp4, DEMO, noise_floor=True, **settings)
    assert loaded[3:] == ["nvfp4"]
    for row in (*first, *again):
        del row["seconds"]
    assert first == again
    evaluate(nvfp4, DEMO, **{**settings, "max_tokens": 200})
    assert loaded[4:] == ["demo_model", "nvfp4"]


@pytest.mark.slow
def test_a_changed_source_is_run_again_under_the_same_name(nvfp4: Path, tmp_path: Path) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((DEMO / name).read_bytes())
    data = bytearray((DEMO / "model.safetensors").read_bytes())
    (source / "model.safetensors").write_bytes(data)
    settings: dict[str, Any] = {"text": DEMO / "heldout.txt", "length": 64, "max_tokens": 130, "cache": cache}
    before = evaluate(nvfp4, source, **settings)
    start = Checkpoint.open(source).inventory.tensors["lm_head.weight"].offset
    data[start : start + 2000] = bytes(2000)
    (source / "model.safetensors").write_bytes(data)
    after = evaluate(nvfp4, source, **settings)
    assert before[0]["fingerprint"] != after[0]["fingerprint"]
    assert before[0]["perplexity"] != after[0]["perplexity"] and before[1]["kl"] != after[1]["kl"]
