"""The command line: one thin file per command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NoReturn, Protocol

from halfbyte import __version__, plugins
from halfbyte.cli import (
    allocate_command,
    apply_command,
    audit_command,
    bench_command,
    calibrate_command,
    card_command,
    chat_command,
    convert_command,
    demo_command,
    diff_command,
    errors_command,
    evaluate_command,
    finish_command,
    formats_command,
    generate_command,
    inspect_command,
    plan_command,
    quantize_command,
    recipes_command,
    repair_command,
    report_command,
    sensitivity_command,
    serve_command,
    train_command,
    verify_command,
)
from halfbyte.cli.json_stdout import divert_the_rest, only_documents
from halfbyte.cli.signals import as_interrupt, remove_unfinished
from halfbyte.errors import HalfbyteError

OK, FOUND_PROBLEMS, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


class Command(Protocol):
    """A module of this package, or an object of a plugin: SUMMARY is one line, EXAMPLES are shown below the options."""

    SUMMARY: str
    EXAMPLES: str

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options of a command."""

    def run(self, args: argparse.Namespace) -> int:
        """Carry out the command and return the exit code."""


COMMANDS: dict[str, Command] = {
    "inspect": inspect_command,
    "plan": plan_command,
    "quantize": quantize_command,
    "convert": convert_command,
    "finish": finish_command,
    "verify": verify_command,
    "audit": audit_command,
    "repair": repair_command,
    "diff": diff_command,
    "apply": apply_command,
    "chat": chat_command,
    "generate": generate_command,
    "serve": serve_command,
    "bench": bench_command,
    "errors": errors_command,
    "evaluate": evaluate_command,
    "sensitivity": sensitivity_command,
    "report": report_command,
    "card": card_command,
    "calibrate": calibrate_command,
    "allocate": allocate_command,
    "train": train_command,
    "recipes": recipes_command,
    "formats": formats_command,
    "demo": demo_command,
}


def register_command(name: str, command: Command) -> None:
    """Add a command; HalfbyteError where the name is taken."""
    if name in COMMANDS:
        raise HalfbyteError(f"there is already a command {name!r}; give the new one another name")
    COMMANDS[name] = command


_EPILOG = """\
examples:
  halfbyte demo                                             a bundled model, quantized and compared, offline
  halfbyte plan Qwen/Qwen3.5-35B-A3B --recipe mixfp4        what would happen, and the exact size
  halfbyte quantize MODEL OUT --recipe nvfp4 --dialect compressed-tensors
  halfbyte verify OUT --against MODEL

exit codes: 0 success; 1 verify found problems; 2 invalid input or usage; 130 interrupted
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Leaves room for the names of commands, which argparse forgets are indented."""

    def add_argument(self, action: argparse.Action) -> None:
        """Measure a command's name where it stands."""
        super().add_argument(action)
        indent = self._current_indent + self._indent_increment
        names = (sub.metavar or sub.dest for sub in getattr(action, "_get_subactions", list)())
        self._action_max_length = max([self._action_max_length, *(indent + len(str(name)) for name in names)])


class _Parser(argparse.ArgumentParser):
    """One sentence for a wrong usage, as for every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"halfbyte: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="halfbyte",
        description="Quantize language models to 4 bits, from disk to disk.",
        epilog=_EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"halfbyte {__version__}")
    _add_plugin(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.SUMMARY[0].upper() + command.SUMMARY[1:] + ".",
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.arguments(sub)
        sub.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
        _add_plugin(sub)
    return parser


def _add_plugin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin",
        metavar="FILE.py",
        action="append",
        default=argparse.SUPPRESS,
        help="first load formats, dialects, recipes, commands, ... from this file (docs/extending.md)",
    )


def _load_plugins(argv: Sequence[str]) -> None:
    """Load the plugins of installed packages, and those named in the arguments, before the commands are known."""
    from halfbyte.cli.output import warn

    for problem in plugins.load_installed():
        warn(problem)
    early = _Parser(prog="halfbyte", add_help=False, allow_abbrev=False)
    _add_plugin(early)
    for path in getattr(early.parse_known_args(argv)[0], "plugin", []):
        plugins.load_plugin(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give its exit code; errors become one sentence on stderr.

    Without ``argv`` this is the whole program: after ``--json`` nothing more reaches stdout until the process ends.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        _load_plugins(sys.argv[1:] if argv is None else argv)
        args = build_parser().parse_args(argv)
    except HalfbyteError as error:
        return _fail(str(error), error.exit_code)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    try:
        with as_interrupt(), only_documents() if args.json else nullcontext():
            code = COMMANDS[args.command].run(args)
        if args.json and argv is None:
            divert_the_rest()
        sys.stdout.flush()
        return code
    except HalfbyteError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        remove_unfinished()
        resume = getattr(args, "resume", "").format_map(vars(args))
        return _fail(f"interrupted{resume}", INTERRUPTED)
    except BrokenPipeError:
        _forget_output()
        return BROKEN_PIPE
    except OSError as error:
        _forget_output()
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", BAD_INPUT)
    except Exception as error:
        return _unexpected(error)


def _forget_output() -> None:
    """What could not be printed: without this, Python tries once more at exit and complains."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unexpected(error: Exception) -> int:
    """One sentence for what nobody has thought of; ``HALFBYTE_DEBUG=1`` shows where it happened."""
    from halfbyte.cli.extras import missing_extra

    missing = missing_extra(error)
    if missing:
        return _fail(missing, BAD_INPUT)
    if os.environ.get("HALFBYTE_DEBUG") == "1":
        traceback.print_exc()
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    what = f"{type(error).__name__}{place}: {str(error)[:200]}"
    return _fail(f"this is a bug, or a damaged file: {what} (HALFBYTE_DEBUG=1 shows more)", BAD_INPUT)


def _fail(message: str, code: int) -> int:
    from halfbyte.cli.human import clean

    print(f"halfbyte: {clean(' '.join(message.split()))}", file=sys.stderr)
    return code
