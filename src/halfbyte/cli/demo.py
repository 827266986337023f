"""``halfbyte demo``."""

from __future__ import annotations

import argparse

SUMMARY = "demo"
EXAMPLES = ""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare options."""


def run(args: argparse.Namespace) -> int:
    """Run."""
    return 0
