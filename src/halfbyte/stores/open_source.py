"""From what a user types to the inventory of a checkpoint, wherever it lies; nothing but headers is read."""

from __future__ import annotations

import re
from pathlib import Path

from halfbyte.checkpoint import Inventory
from halfbyte.checkpoint.source import is_hub_id
from halfbyte.errors import CheckpointError

_HUB = re.compile(r"hf://(?P<id>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+(?:/[^/]+)*))?/?")


def open_inventory(source: str | Path, revision: str | None = None, cache: bool = False) -> Inventory:
    """Read the headers of a checkpoint: a local path, a hub id ``owner/name``, or ``hf://owner/name@revision``.

    The hub is read by ranges, unless its cache holds all of the checkpoint, is all there is (``HF_HUB_OFFLINE=1``),
    or is to hold it afterwards (``cache``). CheckpointError as in ``Inventory.open``.
    """
    text = str(source)
    if not isinstance(source, str) or ("://" not in text and not is_hub_id(text)):
        return Inventory.open(source, revision)
    if "://" not in text:
        return _from_hub(text, revision, cache)
    match = _HUB.fullmatch(text)
    if match:
        if revision is not None and match["revision"]:
            raise CheckpointError(f"{text} names a revision, and --revision {revision} another one; leave one out")
        return _from_hub(match["id"], match["revision"] or revision, cache)
    raise CheckpointError(f"{text} is no source that can be read; hub ids are spelled hf://owner/name@revision")


def _from_hub(repository: str, revision: str | None, cache: bool) -> Inventory:
    from huggingface_hub import constants

    from halfbyte.stores.hub import HubStore

    if cache or constants.HF_HUB_OFFLINE:
        return Inventory.open(repository, revision)
    store = HubStore.open(repository, revision)
    inventory = Inventory.from_store(store, repository, store.commit)
    return Inventory.open(repository, store.commit) if _is_cached(inventory) else inventory


def _is_cached(inventory: Inventory) -> bool:
    """Whether huggingface_hub's cache holds every weight and side file of a checkpoint."""
    from huggingface_hub import try_to_load_from_cache

    names = [*inventory.files, *inventory.side_files]
    return all(
        isinstance(try_to_load_from_cache(inventory.source, name, revision=inventory.revision), str) for name in names
    )
