"""``halfbyte quantize``: write a quantized checkpoint, or continue an interrupted one."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli import accuracy, options, plan_command, shard_options
from halfbyte.cli.human import exact
from halfbyte.cli.output import print_json, progress, say, warn

if TYPE_CHECKING:
    from halfbyte.convert.conversion import Conversion
    from halfbyte.plan.conversion_plan import Plan
    from halfbyte.plan.keeping import Remake
    from halfbyte.recipes import Recipe

SUMMARY = "quantize a checkpoint into a new folder; run it again to continue after an interruption"
EXAMPLES = """\
  halfbyte quantize ./Qwen3.5-35B-A3B ./out --recipe mixfp4
  halfbyte quantize Qwen/Qwen3-8B ./out --recipe nvfp4 --dialect compressed-tensors --verify
  halfbyte quantize ./model ./out --recipe ud-mxfp4 --importance imatrix.gguf
  halfbyte quantize ./model ./out --recipe nvfp4-gptq --calibration text.txt --dialect compressed-tensors
  halfbyte quantize ./model ./out --recipe nvfp4 --dry-run        (the same as plan)
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("source", metavar="SRC", help=options.SOURCE)
    parser.add_argument(
        "out", metavar="OUT", help="output folder: new, empty, or with an interrupted run of this conversion"
    )
    options.add_recipe(parser)
    options.add_revision(parser)
    options.add_cache(parser)
    add_execution(parser)
    shard_options.add_shard(parser)
    parser.add_argument(
        "--allow-unrecognised",
        action="store_true",
        help="continue even if more than a tenth of the parameters is in matrices without a known role",
    )
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="keep weights that their format cannot hold unquantized, and name them, instead of stopping there",
    )


def add_execution(parser: argparse.ArgumentParser) -> None:
    """How a plan is carried out: --threads, --memory, --device, --dry-run, --verify."""
    options.add_resources(parser)
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where scale searches run that have a kernel there; the bytes are the same (default: cpu)",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan and write nothing")
    parser.add_argument("--verify", action="store_true", help="compare the result with the source afterwards")
    parser.set_defaults(resume="; finished files stay in {out}: run the same command again to continue")


def run(args: argparse.Namespace) -> int:
    """Convert, report, and verify if asked to."""
    from halfbyte.plan.unrecognised import check_recognised

    if args.shard:
        shard_options.check(args)
    made = options.plan_of(args)
    if not (args.allow_unrecognised or args.dry_run):
        check_recognised(made.items)

    def remake(recipe: Recipe) -> Plan:
        again = options.plan_of(args, recipe, made.dialect.name)
        again.notes.extend(note for note in made.notes if note.startswith(options.OTHER_DIALECT))
        return again

    if args.shard and not args.dry_run:
        return shard_options.write_shard(made, args)
    return carry_out(made, args, remake=remake)


def carry_out(made: Plan, args: argparse.Namespace, verb: str = "quantizing", remake: Remake | None = None) -> int:
    """Do what a plan says, or only show it (``--dry-run``); for every command that writes a checkpoint.

    ``remake`` is for ``--keep-going``, where the command has it.
    """
    from halfbyte.convert.conversion import source_bytes
    from halfbyte.plan.keeping import kept_by

    check_device(args.device)
    if args.dry_run:
        if args.json:
            print_json({**plan_command.document(made, args), "dry_run": True})
        else:
            plan_command.show(made, args)
        return 0
    for note in made.recipe.notes:
        warn(note)
    made, done = _converted(made, args, verb, remake)
    total = source_bytes(made)
    report_json = {
        **plan_command.document(made, args),
        "out": str(done.out),
        "seconds": done.seconds,
        "resumed_shards": done.resumed_shards,
        "already_complete": done.already_complete,
        "relmse": None if done.already_complete else done.relmse,
        "calibrated_relmse": done.calibrated_relmse,
        "not_quantized": kept_by(made),
        "folds": [asdict(group) for group in done.smoothings],
        "carried": [
            {
                "name": error.name,
                "source_format": error.source,
                "format": error.format,
                "lossless": error.lossless,
                "requantized": error.requantized,
                "max_relative_change": error.max_relative,
            }
            for error in done.errors
            if error.source
        ],
        "accuracy": accuracy.by_role(done.errors),
    }
    loads = usage_of(args.out)
    report_json["loads"] = [{"engine": engine, "command": command} for engine, command in loads]
    if done.already_complete and not args.json:
        say(f"{done.out} is already complete: nothing to do; `halfbyte verify {done.out}` checks every bit of it")
    elif not args.json:
        for note in made.notes:
            if note not in made.recipe.notes:
                say(f"note        {note}")
        accuracy.show(done.errors, done.relmse)
        _say_more(made, done)
        resumed = f", {done.resumed_shards} weight file(s) reused" if done.resumed_shards else ""
        say(
            "",
            f"{done.out}: {exact(made.repository_bytes)}, {made.bits_per_weight:.3f} bits per weight",
            f"{done.seconds:.1f} s, {total / 1e6 / max(done.seconds, 1e-9):,.0f} MB/s{resumed}",
            *(f"loads in    {engine}: {command}" for engine, command in loads),
        )
    code = 0
    if args.verify:
        from halfbyte.cli import verify_command

        result = verify_command.compare(args.out, args.source, args.revision, args.json, cache=args.cache)
        report_json["verification"] = verify_command.document(result)
        code = 0 if result.ok else 1
        if not args.json:
            verify_command.verdict(result)
    if args.json:
        print_json(report_json)
    return code


def _converted(made: Plan, args: argparse.Namespace, verb: str, remake: Remake | None) -> tuple[Plan, Conversion]:
    """The plan that was carried out, and what that did."""
    from halfbyte.convert.conversion import convert, source_bytes
    from halfbyte.convert.keep_going import convert_keeping
    from halfbyte.errors import UnconvertibleError

    keep_going = remake is not None and args.keep_going

    def run(plan: Plan) -> Conversion:
        with progress(verb, source_bytes(plan), args.json) as report:
            return convert(plan, args.out, args.threads, report, args.memory, warn, keep_going, device=args.device)

    if remake is not None and keep_going:
        return convert_keeping(made, Path(args.out).expanduser(), remake, run, warn)
    try:
        return made, run(made)
    except UnconvertibleError as error:
        if remake is None or not error.weights:
            raise
        raise UnconvertibleError(f"{error}; --keep-going leaves such weights unquantized", error.weights) from error


def check_device(device: str) -> None:
    """Raise HalfbyteError where ``--device`` names a device that is not here."""
    if device == "cpu":
        return
    from halfbyte.errors import HalfbyteError
    from halfbyte.gpu.device_products import available, cuda_is_here

    if not available():
        raise HalfbyteError("--device cuda needs Triton: pip install 'halfbyte[gpu]'; or leave --device out")
    if not cuda_is_here():
        raise HalfbyteError("--device cuda needs a CUDA device and a torch that was built for it; leave --device out")


def usage_of(out: str) -> list[tuple[str, str]]:
    """Engines that load a checkpoint, the most general first, and the command of each in one line."""
    from halfbyte.source import running
    from halfbyte.source.checkpoint import Checkpoint
    from halfbyte.source.overview import overview

    path = out if out.startswith(("/", ".", "~")) else f"./{out}"
    snippets = running.usage(overview(Checkpoint.open(running.file_of(out))), path)
    return [(engine, _one_line(snippet)) for engine, _, snippet in snippets]


def _one_line(snippet: str) -> str:
    """A snippet without comments, its statements one after the other."""
    lines = [line.partition("  # ")[0].partition("    # ")[0].strip() for line in snippet.splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith("#"))


def _say_more(made: Plan, done: Conversion) -> None:
    """What the table does not show: weights that the recipe wants quantized and that stay, and what was smoothed."""
    kept = [entry for entry in made.summary()["kept"] if entry["declined"]]
    lines = [
        f"kept        {entry['tensors']} of {entry['role']}, not {entry['declined']}: {entry['reason']} "
        f"({'such as ' if entry['tensors'] > 1 else ''}{entry['example']})"
        for entry in kept
    ]
    if done.smoothings:
        smoothed = [group for group in done.smoothings if group.alpha]
        gain = 1 - sum(f.loss for f in done.smoothings) / (sum(f.unfolded for f in done.smoothings) or 1)
        lines.append(
            f"AWQ         {len(smoothed)} of {len(done.smoothings)} groups smoothed; "
            f"weighted error {100 * gain:.1f}% smaller"
        )
        rounding = max((error for group in smoothed for error in group.rounding.values()), default=0)
        if rounding:
            lines.append(
                f"            unquantized weights in them are rounded again: relative error up to {rounding:.1g}"
            )
    if lines:
        say("", *lines)
