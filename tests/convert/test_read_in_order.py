from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.plan.build import make_plan
from halfbyte.plan.resources import Limits
from halfbyte.recipes import load_recipe
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.stores.hub import HubStore
from halfbyte.stores.open_source import open_inventory
from halfbyte.verify.weights import verify
from small_models import MOE_CONFIG, hashes, moe_tensors, run, spell_per_expert, write_checkpoint
from stores.hub_server import of_folder, served


@pytest.mark.parametrize("per_expert", [False, True])
def test_a_conversion_from_the_hub_writes_what_one_of_a_download_does_and_reads_every_byte_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_expert: bool
) -> None:
    tensors = moe_tensors()
    if per_expert:
        tensors = spell_per_expert(tensors)
    local = write_checkpoint(tmp_path / "tiny", tensors, MOE_CONFIG, shards=2)
    run(local, tmp_path / "local", load_recipe("nvfp4"), max_shard_bytes=100_000)
    with served(of_folder("acme/tiny", local), monkeypatch, tmp_path / "cache") as hub:
        plan = make_plan(Checkpoint(open_inventory("acme/tiny")), load_recipe("nvfp4"), "halfbyte", 100_000)
        store = plan.checkpoint.inventory.remote
        assert isinstance(store, HubStore)
        before = store.bytes_read
        from halfbyte.convert.conversion import convert

        convert(plan, tmp_path / "streamed")
        side = sum(plan.checkpoint.inventory.side_files.values())
        assert store.bytes_read - before <= 1.02 * plan.checkpoint.inventory.total_bytes + side + 100
        ours, theirs = hashes(tmp_path / "streamed"), hashes(tmp_path / "local")
        ours.pop("halfbyte.json"), theirs.pop("halfbyte.json")  # they name the source
        assert ours == theirs
        assert verify(tmp_path / "streamed", "hf://acme/tiny@main").problems == []
        assert not any((tmp_path / "cache").rglob("*.safetensors")) and hub.counts[206]


def test_the_plan_states_the_bytes_that_are_fetched_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = write_checkpoint(tmp_path / "tiny", moe_tensors(), MOE_CONFIG)
    with served(of_folder("acme/tiny", local), monkeypatch, tmp_path / "cache"):
        streamed = make_plan(Checkpoint(open_inventory("acme/tiny")), load_recipe("nvfp4"), "halfbyte")
        plan = make_plan(Checkpoint.open(local), load_recipe("nvfp4"), "halfbyte")
        limits = Limits(memory=1 << 30)
        assert streamed.resources(limits).memory == plan.resources(limits).memory + (1 << 27)
