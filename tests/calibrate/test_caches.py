"""The largest keys and values are those that a cache of the whole model holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from halfbyte.calibrate.caches import arrays_of, watch_caches
from halfbyte.calibrate.collect import CollectOptions, collect_statistics
from halfbyte.calibrate.layerwise import LayerwiseModel, enter, run_layer
from halfbyte.calibrate.observe import Observer
from halfbyte.calibrate.samples import make_samples
from halfbyte.calibration.statistics import Statistics, merge, read_description, write_description
from halfbyte.checkpoint import Reader
from halfbyte.demo import MODEL
from halfbyte.errors import CheckpointError, OutputError
from halfbyte.runtime.loading import load, load_tokenizer
from halfbyte.source.checkpoint import Checkpoint
from runtime.architectures import save

SAMPLES, LENGTH = 4, 64
ATTENTION = "model.layers.3.self_attn"


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, demo_text: str) -> Statistics:
    out = tmp_path_factory.mktemp("statistics") / "demo"
    return collect_statistics(MODEL, out, [demo_text], CollectOptions(SAMPLES, LENGTH, hessians=False))


def _of_cache(folder: Path, ids: torch.Tensor) -> dict[int, tuple[float, float]]:
    """Largest magnitudes of keys and values, by layer, in the cache that a forward pass fills."""
    model = load(folder, "float32")
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    filled = {i: layer for i, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None}
    return {i: (layer.keys.abs().max().item(), layer.values.abs().max().item()) for i, layer in filled.items()}


def _watched(folder: Path, ids: torch.Tensor) -> dict[int, tuple[float, float]]:
    checkpoint = Checkpoint.open(folder)
    found = {}
    with Reader(checkpoint.inventory) as reader, torch.inference_mode():
        blocks = LayerwiseModel(checkpoint, reader, torch.float32, torch.device("cpu"))
        with blocks.filled(blocks.decoder.get_input_embeddings()):
            hidden, calls = enter(blocks, ids)
        for i, layer in enumerate(blocks.layers):
            # which computes with narrow stacks of experts
            with blocks.filled(layer), Observer(blocks.parameters_of(layer), lambda *_: ""):
                plain = run_layer(layer, hidden, calls[i])
                with watch_caches(blocks.attentions_of(layer)) as caches:
                    hidden = run_layer(layer, hidden, calls[i])
                assert torch.equal(plain, hidden)
            for name, kinds in arrays_of(caches).items():
                assert name.endswith(f"layers.{i}.self_attn")
                found[i] = (kinds["keys"].item(), kinds["values"].item())
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "mixtral", "glm4_moe", "gpt_oss", "qwen3_5_moe"])
def test_they_are_those_of_a_forward_pass_with_a_cache(tmp_path: Path, name: str) -> None:
    folder, ids = save(name, tmp_path / name), torch.arange(3, 51).view(2, 24)
    watched, filled = _watched(folder, ids), _of_cache(folder, ids)
    assert watched.keys() == filled.keys() == ({1} if name == "qwen3_5_moe" else {0, 1})
    for layer, values in filled.items():
        np.testing.assert_allclose(watched[layer], values, rtol=1e-5)


def test_latent_attention_has_none(tmp_path: Path) -> None:
    assert _watched(save("deepseek_v3", tmp_path / "m"), torch.arange(3, 27).view(1, 24)) == {}


@pytest.mark.slow
def test_a_calibration_collects_them_over_all_samples(collected: Statistics, demo_text: str) -> None:
    samples = make_samples([demo_text], load_tokenizer(MODEL), SAMPLES, LENGTH)
    each = [_of_cache(MODEL, torch.tensor([tokens]))[3] for tokens in samples.tokens]
    for i, kind in enumerate(("keys", "values")):
        found = collected.array(ATTENTION, kind)
        assert found is not None and found.shape == () and found.dtype == np.float32
        np.testing.assert_allclose(found, max(values[i] for values in each), rtol=1e-5)
    assert collected.array("model.layers.0.linear_attn", "keys") is None
    assert ATTENTION not in collected.names


def test_merging_takes_the_larger(tmp_path: Path, demo_text: str) -> None:
    content = Path(demo_text).read_text(encoding="utf-8")
    for i, part in enumerate((content[:20000], content[20000:40000])):
        (tmp_path / f"{i}.txt").write_text(part, encoding="utf-8")
        collect_statistics(MODEL, tmp_path / str(i), [tmp_path / f"{i}.txt"], CollectOptions(2, LENGTH, hessians=False))
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "both")
    one, two, both = (Statistics(tmp_path / n) for n in ("0", "1", "both"))
    for kind in ("keys", "values"):
        pair = one.array(ATTENTION, kind), two.array(ATTENTION, kind)
        assert pair[0] != pair[1] and both.array(ATTENTION, kind) == np.maximum(*pair)


def test_statistics_of_an_older_halfbyte_are_read_but_not_continued_or_merged(
    tmp_path: Path, demo_text: str, collected: Statistics
) -> None:
    old = collect_statistics(
        MODEL, tmp_path / "old", [demo_text], CollectOptions(SAMPLES, LENGTH, hessians=False)
    ).folder
    about = read_description(old)
    write_description(old, {key: value for key, value in about.items() if key != "caches"})
    assert Statistics(old).importance().values.keys() == collected.importance().values.keys()
    with pytest.raises(CheckpointError, match="differ in 'caches'"):
        merge([collected.folder, old], tmp_path / "both")
    with pytest.raises(OutputError, match="another folder"):
        collect_statistics(MODEL, old, [demo_text], CollectOptions(SAMPLES, LENGTH, hessians=False))
