"""``halfbyte inspect``: a checkpoint at a glance."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from halfbyte.cli import options
from halfbyte.cli.human import exact, size
from halfbyte.cli.output import print_json, say, table

if TYPE_CHECKING:
    from halfbyte.compatibility.engine_facts import CompatibilityNote
    from halfbyte.source.overview import Overview

SUMMARY = "show the contents of a checkpoint, from its headers alone"
EFFECTS = {
    "wrong": "WRONG NUMBERS",
    "refuses": "does not load",
    "loses": "loses",
    "rounds": "rounds",
    "needs": "needs",
}
EXAMPLES = """\
  halfbyte inspect ./Qwen3.5-35B-A3B
  halfbyte inspect Qwen/Qwen3.5-35B-A3B --json
  halfbyte inspect ./my-model --roles
  halfbyte inspect --inventory tensors.json
"""
_NOTHING = "none: nothing is quantized"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    options.add_source(parser)
    parser.add_argument("--roles", action="store_true", help="one line per role instead of one per class")


def run(args: argparse.Namespace) -> int:
    """Read the headers and print the overview."""
    from halfbyte.source.overview import overview

    summary = overview(options.open_checkpoint(args))
    if args.json:
        print_json({**vars(summary), "bits_per_weight": summary.bits_per_weight, "installed": _installed(summary)})
        return 0
    _head(summary)
    _weights(summary, args.roles)
    _engines(summary)
    return 0


def _head(summary: Overview) -> None:
    revision = f" at {summary.revision}" if summary.revision else ""
    built = f" ({', '.join(summary.architectures)})" if summary.architectures else ""
    say(f"{summary.source}{revision}", f"family      {summary.family}{built}")
    if summary.note:
        say(f"note        {summary.note}")
    has = ", ".join(n for n, there in (("vision", summary.vision), ("multi-token prediction", summary.mtp)) if there)
    say(
        f"dialect     {summary.dialect or _undeclared(summary)}",
        f"also holds  {has or 'neither vision nor multi-token prediction'}",
        f"files       {len(summary.files)} with weights, {len(summary.side_files)} others "
        f"({size(summary.side_file_bytes)})",
    )
    if summary.vision_only:
        say("note        it holds a vision model and no language model")
    if summary.dialect and summary.packed:
        say(f"note        {summary.packed} holds packed codes that the quantization_config does not cover")
    if summary.ignored_files:
        say(f"ignored     {', '.join(summary.ignored_files)}")
    say("")


def _undeclared(summary: Overview) -> str:
    """What to say of a checkpoint in no dialect: nothing may be vouched for that was not recognised."""
    if summary.method:
        return f"none that halfbyte reads: config.json says that it is quantized by {summary.method[:60]!r}"
    if summary.packed:
        like = f", as of {summary.likely}," if summary.likely else ""
        return (
            f"none that halfbyte reads: {summary.packed} holds packed codes{like} and config.json does not say how "
            "they are quantized"
        )
    return _NOTHING


def _weights(summary: Overview, by_role: bool) -> None:
    if by_role:
        lines = [
            (role.role, role.tensors, role.parameters, ", ".join((*role.formats, *role.dtypes)), role.nbytes)
            for role in sorted(summary.roles, key=lambda role: -role.nbytes)
        ]
    else:
        lines = [
            (c.name, c.tensors, c.parameters, ", ".join(sorted(c.stored, key=lambda kind: -c.stored[kind])), c.nbytes)
            for c in summary.classes
        ]
    table(
        ("role" if by_role else "class", ">tensors", ">parameters", "stored as", ">bytes", ">bits", ">share"),
        [
            (name, f"{tensors:,}", f"{parameters:,}", stored, f"{nbytes:,}", *_bits(nbytes, parameters, summary))
            for name, tensors, parameters, stored, nbytes in lines
        ],
        (
            "all",
            f"{summary.tensors:,}",
            f"{summary.parameters:,}",
            "",
            f"{summary.data_bytes:,}",
            *_bits(summary.data_bytes, summary.parameters, summary),
        ),
    )
    say("", f"{exact(summary.data_bytes)} of tensors", "")


def _bits(nbytes: int, parameters: int, summary: Overview) -> tuple[str, str]:
    return f"{8 * nbytes / max(parameters, 1):.2f}", f"{100 * nbytes / max(summary.data_bytes, 1):.1f} %"


def _engines(summary: Overview) -> None:
    """What is lost where; engines that nothing is known of share a line."""
    each = summary.engines.items()
    if rows := [_row(f) for _, known in each for f in known if f.effect != "unknown"]:
        table(("engine", "effect", "checked with", "~what is known"), rows)
        say("")
    recognised = not summary.packed and (summary.dialect or _undeclared(summary) == _NOTHING)
    if recognised and (silent := [name for name, known in each if not known]):
        say(f"no known loss in {', '.join(silent)}")
    untried: dict[str, list[str]] = {}
    for name, known in each:
        for fact in known:
            if fact.effect == "unknown":
                untried.setdefault(fact.what, []).append(name)
    for what, names in untried.items():
        say(f"{what}: {', '.join(names)}")
    installed = [f"{name} {version}" for each in _installed(summary).values() for name, version in each.items()]
    say("", f"installed   {'; '.join(installed) or 'none of these engines'}")


def _row(note: CompatibilityNote) -> tuple[str, str, str, str]:
    where = f" on {note.hardware}" if note.hardware else ""
    much = f" [{note.tensors:,} tensors, {size(note.nbytes)}]" if note.tensors else ""
    source = " (only read in its source)" if note.known == "read" else ""
    link = f"; {note.link}" if note.link else ""
    return f"{note.engine}{where}", EFFECTS[note.effect], note.version, f"{note.what}{much}{link}{source}"


def _installed(summary: Overview) -> dict[str, dict[str, str]]:
    """By engine, the versions of its packages in this environment."""
    from halfbyte.compatibility.engine_facts import engines

    return {e.name: versions for e in engines() if e.name in summary.engines and (versions := e.installed())}
