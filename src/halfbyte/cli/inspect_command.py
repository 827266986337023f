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

    found = overview(options.open_checkpoint(args))
    if args.json:
        print_json({**vars(found), "bits_per_weight": found.bits_per_weight})
        return 0
    _head(found)
    _weights(found, args.roles)
    _engines(found)
    return 0


def _head(found: Overview) -> None:
    revision = f" at {found.revision}" if found.revision else ""
    built = f" ({', '.join(found.architectures)})" if found.architectures else ""
    say(f"{found.source}{revision}", f"family      {found.family}{built}")
    if found.note:
        say(f"note        {found.note}")
    has = ", ".join(n for n, there in (("vision", found.vision), ("multi-token prediction", found.mtp)) if there)
    say(
        f"dialect     {found.dialect or _undeclared(found)}",
        f"also holds  {has or 'neither vision nor multi-token prediction'}",
        f"files       {len(found.files)} with weights, {len(found.side_files)} others ({size(found.side_file_bytes)})",
    )
    if found.vision_only:
        say("note        it holds a vision model and no language model")
    if found.dialect and found.packed:
        say(f"note        {found.packed} holds packed codes that the quantization_config does not cover")
    if found.ignored_files:
        say(f"ignored     {', '.join(found.ignored_files)}")
    say("")


def _undeclared(found: Overview) -> str:
    """What to say of a checkpoint in no dialect: nothing may be vouched for that was not recognised."""
    if found.method:
        return f"none that halfbyte reads: config.json says that it is quantized by {found.method[:60]!r}"
    if found.packed:
        like = f", as of {found.likely}," if found.likely else ""
        return (
            f"none that halfbyte reads: {found.packed} holds packed codes{like} and config.json does not say how they "
            "are quantized"
        )
    return _NOTHING


def _weights(found: Overview, by_role: bool) -> None:
    if by_role:
        lines = [
            (role.role, role.tensors, role.parameters, ", ".join((*role.formats, *role.dtypes)), role.nbytes)
            for role in sorted(found.roles, key=lambda role: -role.nbytes)
        ]
    else:
        lines = [
            (c.name, c.tensors, c.parameters, ", ".join(sorted(c.stored, key=lambda kind: -c.stored[kind])), c.nbytes)
            for c in found.classes
        ]
    table(
        ("role" if by_role else "class", ">tensors", ">parameters", "stored as", ">bytes", ">bits", ">share"),
        [
            (name, f"{tensors:,}", f"{parameters:,}", stored, f"{nbytes:,}", *_bits(nbytes, parameters, found))
            for name, tensors, parameters, stored, nbytes in lines
        ],
        (
            "all",
            f"{found.tensors:,}",
            f"{found.parameters:,}",
            "",
            f"{found.data_bytes:,}",
            *_bits(found.data_bytes, found.parameters, found),
        ),
    )
    say("", f"{exact(found.data_bytes)} of tensors", "")


def _bits(nbytes: int, parameters: int, found: Overview) -> tuple[str, str]:
    return f"{8 * nbytes / max(parameters, 1):.2f}", f"{100 * nbytes / max(found.data_bytes, 1):.1f} %"


def _engines(found: Overview) -> None:
    """What is lost where; engines that nothing is known of share a line."""
    each = found.engines.items()
    if rows := [_row(f) for _, known in each for f in known if f.effect != "unknown"]:
        table(("engine", "effect", "~what is known"), rows)
        say("")
    recognised = not found.packed and (found.dialect or _undeclared(found) == _NOTHING)
    if recognised and (silent := [name for name, known in each if not known]):
        say(f"no known loss in {', '.join(silent)}")
    untried: dict[str, list[str]] = {}
    for name, known in each:
        for fact in known:
            if fact.effect == "unknown":
                untried.setdefault(fact.what, []).append(name)
    for what, names in untried.items():
        say(f"{what}: {', '.join(names)}")
    say("", "versions    " + "; ".join(f"{name} {version}" for name, version in _versions(found)))


def _row(found: CompatibilityNote) -> tuple[str, str, str]:
    where = f" on {found.hardware}" if found.hardware else ""
    much = f" [{found.tensors:,} tensors, {size(found.nbytes)}]" if found.tensors else ""
    source = " (only read in its source)" if found.known == "read" else ""
    link = f"; {found.link}" if found.link else ""
    return f"{found.engine}{where}", EFFECTS[found.effect], f"{found.what}{much}{link}{source}"


def _versions(found: Overview) -> list[tuple[str, str]]:
    from halfbyte.compatibility.engine_facts import engines

    return [(e.name, e.version) for e in engines() if e.version and e.name in found.engines]
