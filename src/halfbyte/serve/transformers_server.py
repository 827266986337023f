"""transformers' own server, after halfbyte has taught transformers its dialect: ``serve MODEL --port N``."""

from __future__ import annotations

import halfbyte.transformers  # noqa: F401  registers the dialect


def main() -> None:
    """Run transformers' command line."""
    from transformers.cli.transformers import app

    app()


if __name__ == "__main__":
    main()
