"""``halfbyte evaluate``."""

from __future__ import annotations

import argparse

SUMMARY = "evaluate"
EXAMPLES = ""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare options."""


def run(args: argparse.Namespace) -> int:
    """Run."""
    return 0
