"""The Python API: the same words as on the command line. Import them from ``halfbyte`` itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from halfbyte.calibration import Importance, calibration_for
from halfbyte.checkpoint import Inventory
from halfbyte.checkpoint.files import collector_paused
from halfbyte.convert.conversion import Conversion, Progress
from halfbyte.convert.conversion import convert as run_conversion
from halfbyte.convert.keep_going import convert_keeping
from halfbyte.convert.workers import convert_files, finish
from halfbyte.dialects.halfbyte import HALFBYTE
from halfbyte.errors import PlanError
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.dialect_choice import find_dialect
from halfbyte.plan.respelling import recipe_for
from halfbyte.recipes import Recipe, load_recipe
from halfbyte.renamed import accepts_old_names
from halfbyte.search import encode
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.overview import Overview, overview
from halfbyte.stores.open_source import open_inventory
from halfbyte.verify.weights import MAX_RELMSE, Verification
from halfbyte.verify.weights import verify as verify_output

Source = str | Path | Inventory | Checkpoint
"""A local folder, a ``.safetensors`` file, ``owner/name`` or ``hf://owner/name@revision`` of the hub, which is read by
ranges, or one of these already opened."""


@dataclass(frozen=True)
class PlanOptions:
    """What decides an output beside source and recipe; ``plan`` explains the fields."""

    dialect: str | None = None
    revision: str | None = None
    max_shard_bytes: int | None = None
    remote_code: bool = False
    importance: str | Path | Importance | None = None
    calibration_of_base: bool = False

    def given(self) -> list[str]:
        """Name the options that differ from their defaults."""
        return [option.name for option in fields(self) if getattr(self, option.name) is not option.default]


def inspect(source: Source, *, revision: str | None = None) -> Overview:
    """What a checkpoint holds, from its headers alone; CheckpointError if it is damaged or incomplete."""
    return overview(_open(source, revision))


@collector_paused()
def plan(
    source: Source,
    recipe: str | Path | Recipe,
    *,
    dialect: str | None = None,
    revision: str | None = None,
    max_shard_bytes: int | None = None,
    remote_code: bool = False,
    importance: str | Path | Importance | None = None,
    calibration_of_base: bool = False,
) -> Plan:
    """Decide every tensor's fate and every output byte's place without reading a weight.

    ``recipe`` is a built-in name (``halfbyte.list_recipes()``), a YAML file's path or a Recipe; ``dialect`` is
    ``halfbyte``, ``compressed-tensors``, ... (None: the recipe's own). ``remote_code`` puts the code beside the weights
    that lets transformers load the dialect ``halfbyte`` with ``trust_remote_code=True``, without halfbyte installed.
    ``importance`` is a file of halfbyte or llama.cpp (``halfbyte.calibration.read_importance``): it weighs the errors
    of every search unless the recipe says otherwise, and AWQ smoothing needs it. Other models' statistics are refused
    unless ``calibration_of_base`` says that this one is a fine-tune of it. Raises RecipeError, FormatError or PlanError
    for what cannot be done, before any work.
    """
    return _plan(
        source, recipe, PlanOptions(dialect, revision, max_shard_bytes, remote_code, importance, calibration_of_base)
    )


@accepts_old_names(workers="threads")
def quantize(
    source: Source | Plan,
    out: str | Path,
    recipe: str | Path | Recipe | None = None,
    *,
    dialect: str | None = None,
    revision: str | None = None,
    max_shard_bytes: int | None = None,
    remote_code: bool = False,
    importance: str | Path | Importance | None = None,
    calibration_of_base: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    keep_going: bool = False,
) -> Conversion:
    """Quantize a checkpoint to the folder ``out``, or continue there after an interruption.

    Give a source and a recipe, or a Plan (then only ``threads``, ``memory`` and ``progress`` are left to choose).
    ``threads`` (default: one per core) hold slices of ``memory`` bytes at most, default 2 GiB;
    ``progress`` is called with numbers of source bytes dealt with. A weight that its format cannot hold within the
    bound of ``verify`` is an UnconvertibleError; with ``keep_going`` such weights stay unquantized, and the warnings
    of the module ``warnings`` name them.
    """
    options = PlanOptions(dialect, revision, max_shard_bytes, remote_code, importance, calibration_of_base)
    if isinstance(source, Plan):
        given = (["recipe"] if recipe is not None else []) + options.given() + (["keep_going"] if keep_going else [])
        if given:
            raise TypeError(f"quantize(plan, out): {', '.join(given)} cannot be given, since they are part of the plan")
        return run_conversion(source, out, threads, progress, memory)
    if recipe is None:
        raise TypeError("quantize(source, out, recipe): the recipe is missing")
    if not keep_going:
        return run_conversion(_plan(source, recipe, options), out, threads, progress, memory)
    return convert_keeping(
        _plan(source, recipe, options),
        Path(out).expanduser(),
        lambda other: _plan(source, other, options),
        lambda made: run_conversion(made, out, threads, progress, memory, collect_refused=True),
        lambda line: warnings.warn(line, stacklevel=2),
    )[1]


@accepts_old_names(workers="threads")
def convert(
    source: Source,
    out: str | Path,
    dialect: str,
    *,
    requantize: str | None = None,
    revision: str | None = None,
    max_shard_bytes: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write a quantized checkpoint in another dialect with the same codes and scales.

    PlanError names the weights whose format the dialect cannot spell; they get the format ``requantize`` where one is
    given, and the result says with which error.
    """
    return run_conversion(respelling(source, dialect, requantize, revision, max_shard_bytes), out, threads, progress)


def respelling(
    source: Source,
    dialect: str,
    requantize: str | None = None,
    revision: str | None = None,
    max_shard_bytes: int | None = None,
) -> Plan:
    """Make the plan that ``convert`` carries out."""
    checkpoint = _open(source, revision)
    spelling = find_dialect(dialect).for_model(checkpoint.inventory)
    return make_plan(checkpoint, recipe_for(checkpoint, spelling, requantize), spelling, max_shard_bytes)


def verify(
    out: str | Path,
    against: str | Path | None = None,
    *,
    revision: str | None = None,
    max_relmse: float = MAX_RELMSE,
    progress: Progress | None = None,
) -> Verification:
    """Check every file of an output against its checksums; ``.problems`` is empty if it is right.

    With ``against``, its source, all weights are compared with that too, byte for byte where kept.
    ``max_relmse`` is the largest squared error, relative to the sum of squares, that a quantized weight may have.
    """
    return verify_output(out, against, revision, max_relmse, progress)


def evaluate(
    paths: str | Path | Sequence[str | Path],
    against: str | Path | None = None,
    text: str | Path | None = None,
    *,
    length: int | None = None,
    max_tokens: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    """Perplexity of checkpoints on a text and, with ``against``, their KL divergence from that one; needs torch.

    One row per checkpoint, ``against`` first, with ``name``, ``perplexity``, ``kl`` (mean, median, p90, p99, top1),
    ``bytes``, ``bits_per_weight`` and the ``protocol``; docs/evaluation.md lists all. ``length``: tokens in a window
    (default 512). ``more``: stride, dequantize, conversations, tasks, emulated activations and the like, see
    ``halfbyte.evaluate.Settings``.
    """
    from halfbyte.evaluate import evaluate as run

    text_settings = {"length": length, "max_tokens": max_tokens, "device": device, "dtype": dtype}
    return run(paths, against, text, progress=progress, **text_settings, **more)


def load(
    path: str | Path,
    dtype: Any = None,
    *,
    dequantize: bool = False,
    device: Any = None,
    revision: str | None = None,
    mode: str = "exact",
) -> Any:
    """A transformers model, in eval mode, of a plain checkpoint or one of any dialect; needs torch.

    Quantized weights stay in 4 or 8 bits and run by compiled products on the CPU, unless ``dequantize``; ``mode``:
    "exact", "int8" or "auto". CheckpointError if a tensor is missing or has no place: nothing is initialised at
    random. Details: ``halfbyte.runtime.loading.load``.
    """
    from halfbyte.runtime import load as run

    return run(path, dtype, dequantize, device, revision, mode)


def generate(
    model: Any,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> str:
    """What a model writes behind a prompt; needs torch. ``model``: a checkpoint's path or hub id, loaded each time.

    The likeliest tokens, or with a ``temperature`` samples from the ``top_k`` likeliest and the likeliest ``top_p`` of
    all mass. ``halfbyte.runtime.generation.Generator`` keeps a model, streams its text and holds conversations.
    """
    from halfbyte.runtime import need_torch

    need_torch()
    from halfbyte.runtime.generation import Generator, Sampling
    from halfbyte.runtime.loading import load_tokenizer

    sampling = Sampling(temperature, top_p, top_k, seed, max_tokens, tuple(stop))
    return "".join(Generator(load(model), load_tokenizer(model)).complete(prompt, sampling))


def _plan(source: Source, recipe: str | Path | Recipe, options: PlanOptions) -> Plan:
    checkpoint = _open(source, options.revision)
    known = None
    if options.importance is not None:
        known = calibration_for(options.importance, checkpoint, options.calibration_of_base)
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    dialect = find_dialect(options.dialect or loaded.dialect or HALFBYTE)
    if not options.remote_code:
        return make_plan(checkpoint, loaded, dialect, options.max_shard_bytes, calibration=known)
    if dialect is not HALFBYTE:
        raise PlanError(f"remote code is for the dialect halfbyte; engines read {dialect.name} by themselves")
    from halfbyte.runtime.remote_code import remote_code_config, remote_code_files

    files = remote_code_files(checkpoint.inventory.config)
    return make_plan(checkpoint, loaded, dialect, options.max_shard_bytes, files, remote_code_config(), known)


def _open(source: Source, revision: str | None) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    return Checkpoint(source if isinstance(source, Inventory) else open_inventory(source, revision))


__all__ = [
    "convert",
    "convert_files",
    "encode",
    "evaluate",
    "finish",
    "generate",
    "inspect",
    "load",
    "plan",
    "quantize",
    "verify",
]
