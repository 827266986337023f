"""``halfbyte chat``: a conversation with a model in the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from halfbyte.cli.generation_options import add_generation, described, document, prepared
from halfbyte.cli.human import clean
from halfbyte.cli.output import print_json, say

if TYPE_CHECKING:
    from halfbyte.runtime.generation import Generator, Sampling

SUMMARY = "talk to a model in the terminal, on this machine"
EXAMPLES = """\
  halfbyte chat ./out
  halfbyte chat ./out --system "Answer in one sentence." --temperature 0.7
  echo "Why is the sky blue?" | halfbyte chat ./out --json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare options."""
    add_generation(parser, 0.7)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")


def run(args: argparse.Namespace) -> int:
    """Read lines, answer each; an empty line or the end of the input ends the conversation."""
    generator, sampling = prepared(args)
    messages: list[dict[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    answers: list[dict[str, Any]] = []
    if not args.json and sys.stdin.isatty():
        say("An empty line ends the conversation; Ctrl-C ends an answer.")
    while line := _read(args.json):
        messages.append({"role": "user", "content": line})
        text = _answer(generator, messages, sampling, args.json)
        messages.append({"role": "assistant", "content": text})
        answers.append({"question": line, **document(text, generator.counts)})
    if args.json:
        print_json({"answers": answers})
    return 0


def _read(quiet: bool) -> str:
    if not quiet and sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline().strip()


def _answer(generator: Generator, messages: list[dict[str, str]], sampling: Sampling, quiet: bool) -> str:
    pieces = []
    try:
        for piece in generator.chat(messages, sampling):
            pieces.append(piece)
            if not quiet:
                print(clean(piece, keep="\n\t"), end="", flush=True)
    except KeyboardInterrupt:
        if quiet:
            raise
    if not quiet:
        print()
        print(described(generator.counts), file=sys.stderr)
    return "".join(pieces)
