"""The Python API: the same words as on the command line. Import them from ``halfbyte`` itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.checkpoint import Inventory
from halfbyte.convert import Conversion, Progress, convert
from halfbyte.overview import Overview, overview
from halfbyte.plan import MAX_SHARD_BYTES, Plan, make_plan
from halfbyte.recipes import Recipe, load_recipe
from halfbyte.search import encode
from halfbyte.verify import MAX_RELMSE, Verification
from halfbyte.verify import verify as verify_output
from halfbyte.view import Checkpoint

Source = str | Path | Inventory | Checkpoint
"""A local folder, a ``.safetensors`` file, a hub id ``owner/name``, or one of these already opened."""


def inspect(source: Source, *, revision: str | None = None) -> Overview:
    """What a checkpoint holds, from its headers alone; CheckpointError if it is damaged or incomplete."""
    return overview(_open(source, revision))


def plan(
    source: Source,
    recipe: str | Path | Recipe,
    *,
    dialect: str | None = None,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Plan:
    """Decide every tensor's fate and every output byte's place without reading a weight.

    ``recipe`` is a built-in name (``halfbyte.list_recipes()``), a YAML file's path or a Recipe; ``dialect`` is
    ``halfbyte``, ``compressed-tensors``, ... (None: the recipe's own). Raises RecipeError, FormatError or PlanError
    for what cannot be done, before any work.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return make_plan(_open(source, revision), loaded, dialect, max_shard_bytes)


def quantize(
    source: Source | Plan,
    out: str | Path,
    recipe: str | Path | Recipe | None = None,
    *,
    dialect: str | None = None,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Quantize a checkpoint to the folder ``out``, or continue there after an interruption.

    Give a source and a recipe, or a Plan (then everything but ``workers`` and ``progress`` is already decided).
    ``workers`` threads, default one per core; ``progress`` is called with numbers of source bytes dealt with.
    """
    if not isinstance(source, Plan):
        if recipe is None:
            raise TypeError("quantize(source, out, recipe): the recipe is missing")
        source = plan(source, recipe, dialect=dialect, revision=revision, max_shard_bytes=max_shard_bytes)
    elif recipe is not None or dialect is not None:
        raise TypeError("quantize(plan, out): the recipe and the dialect are part of the plan")
    return convert(source, out, workers, progress)


def verify(
    out: str | Path,
    against: str | Path,
    *,
    revision: str | None = None,
    max_relmse: float = MAX_RELMSE,
    progress: Progress | None = None,
) -> Verification:
    """Compare a quantized checkpoint with its source, byte for byte where kept; ``.problems`` is empty if it is right.

    ``max_relmse`` is the largest squared error, relative to the sum of squares, that a quantized weight may have.
    """
    return verify_output(out, against, revision, max_relmse, progress)


def evaluate(*args: Any, **kwargs: Any) -> Any:
    """Perplexity and KL divergence of checkpoints on a text: see ``halfbyte.evaluate.evaluate``. Needs torch."""
    from halfbyte.evaluate import evaluate as run

    return run(*args, **kwargs)


def load(*args: Any, **kwargs: Any) -> Any:
    """A quantized checkpoint as a transformers model: see ``halfbyte.runtime.load``. Needs torch and transformers."""
    from halfbyte.runtime import load as run

    return run(*args, **kwargs)


def _open(source: Source, revision: str | None) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    return Checkpoint(source if isinstance(source, Inventory) else Inventory.open(source, revision))


__all__ = ["encode", "evaluate", "inspect", "load", "plan", "quantize", "verify"]
