"""Options that several commands share, and the plan that they describe."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from halfbyte.cli.human import parse_size, positive

if TYPE_CHECKING:
    from halfbyte.plan.conversion_plan import Plan
    from halfbyte.plan.resources import Limits
    from halfbyte.recipes import Recipe
    from halfbyte.source.checkpoint import Checkpoint

OTHER_DIALECT = "written in the dialect"
LOCAL = "a local folder, a .safetensors file, or a hub id owner/name"
SOURCE = f"{LOCAL} or hf://owner/name@revision"


def add_source(parser: argparse.ArgumentParser) -> None:
    """SRC or --inventory, and --revision."""
    parser.add_argument("source", metavar="SRC", nargs="?", help=SOURCE)
    parser.add_argument(
        "--inventory", metavar="FILE.json", help="JSON file of names, dtypes and shapes, instead of SRC"
    )
    add_revision(parser)
    add_cache(parser)


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add the option --cache to a parser."""
    parser.add_argument(
        "--cache",
        action="store_true",
        help="download a hub id to huggingface_hub's cache first, instead of reading what is needed by ranges",
    )


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Add the option --revision to a parser."""
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """What decides the output: --recipe, --dialect, --max-shard-size, --remote-code, and what activations are known."""
    parser.add_argument(
        "--recipe", metavar="NAME_OR_FILE", required=True, help="a name that `halfbyte recipes` lists, or a YAML file"
    )
    parser.add_argument(
        "--dialect",
        metavar="D",
        help="layout of the output, see `halfbyte formats` (default: the recipe's, else the one most engines load)",
    )
    parser.add_argument(
        "--for",
        dest="engine",
        choices=("vllm", "transformers", "mlx", "llama.cpp", "sglang"),
        help="engine that will load the output; chooses the dialect",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=parse_size,
        help="maximum size of a weight file, such as 500MB (default: 5GB; GGUF: one file)",
    )
    parser.add_argument(
        "--remote-code",
        action="store_true",
        help="add code that lets transformers load the dialect halfbyte (trust_remote_code=True)",
    )
    add_calibration(parser)


def add_resources(parser: argparse.ArgumentParser) -> None:
    """What bounds a conversion and decides no byte of it: --threads, --memory."""
    add_threads(parser)
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        type=parse_size,
        help="memory limit for slices of weights, such as 512MiB (default: 2GiB); the plan states the total",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """--threads, and --workers, its name before 0.2."""
    parser.add_argument("--threads", metavar="N", type=positive, help="threads (default: one per core)")
    parser.add_argument("--workers", dest="threads", type=positive, action=_OldName, help=argparse.SUPPRESS)


class _OldName(argparse.Action):
    """Store a value under the option's new name, and say so."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        print(f"halfbyte: {option} is now --{self.dest}; this release reads both", file=sys.stderr)
        setattr(namespace, self.dest, values)


def limits(args: argparse.Namespace) -> Limits:
    """The limits that ``add_resources`` sets."""
    from halfbyte.plan.resources import MEMORY, Limits, cores

    return Limits(args.threads or cores(), args.memory or MEMORY)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """What is known, or is to be found out, of activations: --importance, or --calibration, --samples, --length."""
    known = parser.add_mutually_exclusive_group()
    known.add_argument(
        "--importance",
        metavar="FILE",
        help="importance of columns: output of `halfbyte calibrate`, or llama.cpp's imatrix.gguf or imatrix.dat",
    )
    known.add_argument(
        "--calibration",
        metavar="PATH",
        nargs="+",
        help="output of `halfbyte calibrate`; or text files to calibrate with first (statistics go to OUT.statistics)",
    )
    add_calibration_of_base(parser)
    parser.add_argument(
        "--samples", metavar="N", type=positive, default=128, help="samples from the texts (default 128)"
    )
    parser.add_argument("--length", metavar="L", type=positive, default=512, help="tokens per sample (default 512)")


def text_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of the text to measure on say, as arguments of ``halfbyte.evaluate.TextSettings``."""
    names = ("text", "length", "stride", "max_tokens", "bos", "dtype", "device")
    return {"preset": args.protocol, **{name: getattr(args, name) for name in names}}


def add_bos(parser: argparse._ActionsContainer) -> None:
    """Add the option --bos to a parser."""
    parser.add_argument(
        "--bos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="begin every sample with the BOS token: auto (default) if the tokenizer adds it to a text",
    )


def add_calibration_of_base(parser: argparse.ArgumentParser) -> None:
    """Add the option --calibration-of-base to a parser."""
    parser.add_argument(
        "--calibration-of-base",
        action="store_true",
        help="accept statistics of the base model of this fine-tune; statistics of other models are refused otherwise",
    )


def calibration_texts(args: argparse.Namespace) -> list[str]:
    """The texts that --calibration names, which are run through the model; [] where it names statistics or nothing."""
    from pathlib import Path

    given: list[str] = args.calibration or []
    return [] if len(given) == 1 and Path(given[0]).is_dir() else given


def activations_of(args: argparse.Namespace, checkpoint: Checkpoint, recipe: Recipe, dialect: str | None) -> str | None:
    """The importance file or statistics that the options name, or those collected from the texts that they name.

    Where the ``recipe`` refits weights, a text also rounds those of the ``checkpoint``, for the ``dialect``.
    """
    from halfbyte.errors import HalfbyteError

    given = calibration_texts(args)
    if not given:
        return args.calibration[0] if args.calibration else args.importance  # type: ignore[no-any-return]
    out = getattr(args, "out", None)
    if out is None or args.source is None or getattr(args, "dry_run", False):
        raise HalfbyteError(
            "a plan reads no weights, so it needs existing statistics: run `halfbyte calibrate` and give its folder"
        )
    from halfbyte.cli.calibrate_command import collect

    folder = f"{out.rstrip('/')}.statistics"
    settings = {"samples": args.samples, "length": args.length}
    if recipe.refits:
        from halfbyte.cli.calibrate_command import round_layers

        round_layers(checkpoint, recipe, dialect, folder, given, args.json, **settings)
    else:
        back = recipe.needs_output_hessians
        collect(model_to_run(args, checkpoint), folder, given, args.json, output_hessians=back, **settings)
    return folder


def open_checkpoint(args: argparse.Namespace, runs_model: bool = False) -> Checkpoint:
    """The checkpoint that ``add_source`` names; ``runs_model``: with all files here, so by way of a cache."""
    from halfbyte.checkpoint import Inventory
    from halfbyte.errors import CheckpointError
    from halfbyte.source.checkpoint import Checkpoint
    from halfbyte.stores.open_source import open_inventory

    inventory = getattr(args, "inventory", None)
    if (args.source is None) == (inventory is None):
        raise CheckpointError("give either a checkpoint SRC or --inventory FILE.json")
    if inventory is not None:
        return Checkpoint(Inventory.from_json(inventory))
    return Checkpoint(open_inventory(args.source, args.revision, args.cache or runs_model))


def model_to_run(args: argparse.Namespace, checkpoint: Checkpoint) -> str:
    """The source as it was named, or the folder with the revision that was asked for."""
    named = args.revision is None and "://" not in args.source
    return str(args.source if named else checkpoint.inventory.root or args.source)


def dialect_of(args: argparse.Namespace) -> str | None:
    """The dialect that is asked for, by its name or by that of an engine, or the one that most engines load."""
    from halfbyte.errors import HalfbyteError
    from halfbyte.plan.dialect_choice import best_dialect, suggestion
    from halfbyte.recipes import load_recipe

    if args.dialect and args.engine:
        raise HalfbyteError("--dialect and --for both choose the dialect; leave one out")
    if args.dialect and (advice := suggestion(args.dialect)):
        raise HalfbyteError(f"there is no dialect {args.dialect!r}: {advice} (or say --for {args.dialect})")
    recipe = load_recipe(args.recipe)
    if args.dialect or (recipe.dialect and not args.engine):
        return args.dialect or recipe.dialect
    return "halfbyte" if args.remote_code else best_dialect(recipe, args.engine)


def _dialect_that_holds(
    checkpoint: Checkpoint, recipe: Recipe, chosen: str | None, args: argparse.Namespace
) -> str | None:
    """The dialect in which weights are rounded: halfbyte's own where none was asked for and ``chosen`` has no place."""
    from halfbyte.errors import FormatError, HalfbyteError, PlanError
    from halfbyte.plan.build import plan_to_round
    from halfbyte.plan.dialect_choice import OWN

    try:
        plan_to_round(checkpoint, recipe, chosen)
    except (PlanError, FormatError):
        if chosen == OWN or args.dialect or args.engine or recipe.dialect:
            raise
        try:
            plan_to_round(checkpoint, recipe, OWN)
        except HalfbyteError:
            return chosen
        return OWN
    return chosen


def plan_of(args: argparse.Namespace, recipe: Recipe | None = None, dialect: str | None = None) -> Plan:
    """The plan that the options describe; ``recipe``: by another recipe than they name, in this ``dialect``."""
    from halfbyte.api import plan
    from halfbyte.errors import FormatError, HalfbyteError, PlanError
    from halfbyte.plan.dialect_choice import OWN
    from halfbyte.recipes import load_recipe

    checkpoint = open_checkpoint(args, bool(calibration_texts(args)) and not getattr(args, "dry_run", False))
    chosen = dialect or dialect_of(args)
    wanted = recipe or load_recipe(args.recipe)
    if wanted.refits and args.calibration and not dialect:
        chosen = _dialect_that_holds(checkpoint, wanted, chosen, args)
    known = activations_of(args, checkpoint, wanted, chosen)

    def make(dialect: str | None) -> Plan:
        return plan(
            checkpoint,
            recipe or args.recipe,
            dialect=dialect,
            max_shard_bytes=args.max_shard_size,
            remote_code=args.remote_code,
            importance=known,
            calibration_of_base=args.calibration_of_base,
        )

    try:
        return make(chosen)
    except (PlanError, FormatError) as error:
        if recipe or chosen == OWN or args.dialect or args.engine or load_recipe(args.recipe).dialect:
            raise
        try:
            made = make(OWN)
        except HalfbyteError:
            raise error from None
        made.notes.append(f"{OTHER_DIALECT} {OWN}, because {chosen} cannot store it ({error})")
        return made
