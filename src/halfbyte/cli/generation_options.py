"""Options that ``generate`` and ``chat`` share, the model that they load, and the line that ends an answer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.runtime.generation import Counts, Generator, Sampling


def add_generation(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Declare how tokens are chosen and how the model runs."""
    parser.add_argument("path", metavar="MODEL", help="a checkpoint of any dialect, quantized or not: folder or hub id")
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=256, help="maximum length of the answer (default: 256)"
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=temperature,
        help=f"0 takes the likeliest token (default: {temperature:g})",
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens with total probability P",
    )
    parser.add_argument("--top-k", metavar="K", type=int, default=0, help="sample from the K likeliest tokens")
    parser.add_argument("--seed", metavar="S", type=int, help="seed for repeatable sampling")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="stop at this text; may be given several times"
    )
    parser.add_argument(
        "--mode",
        choices=("exact", "int8", "auto"),
        default="exact",
        help="activations of products with quantized weights: as they are, or rounded to int8 (default: exact)",
    )
    parser.add_argument(
        "--speculative",
        metavar="K",
        type=int,
        nargs="?",
        const=1,
        help="let the model's multi-token-prediction head guess K tokens at a time (default: 1) and check them in one "
        "pass: the same text; the last line shows the gain",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the model's own")
    parser.add_argument("--threads", metavar="N", type=int, help="threads of the CPU (default: all cores)")
    parser.add_argument("--revision", metavar="R", help="commit, branch or tag of a hub id")


def prepared(args: argparse.Namespace) -> tuple[Generator, Sampling]:
    """Load the model and its tokenizer; HalfbyteError for options that do not fit."""
    from halfbyte.runtime import need_torch

    need_torch()
    import torch

    from halfbyte.errors import HalfbyteError
    from halfbyte.runtime.generation import Generator, Sampling
    from halfbyte.runtime.loading import load, load_tokenizer
    from halfbyte.runtime.speculation import Speculation, check_head
    from halfbyte.source.checkpoint import Checkpoint

    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.seed, args.max_tokens, tuple(args.stop))
    if args.threads is not None:
        if args.threads < 1:
            raise HalfbyteError("--threads must be 1 or more")
        torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.path, args.revision)
    checkpoint = None
    if args.speculative is not None:
        checkpoint = Checkpoint.open(args.path, args.revision)
        check_head(checkpoint, args.speculative)
    model = load(args.path, args.dtype, revision=args.revision, mode=args.mode)
    speculation = Speculation(checkpoint, model, args.speculative) if checkpoint else None
    return Generator(model, tokenizer, speculation), sampling


def described(counts: Counts) -> str:
    """What an answer took, in one line."""
    text = f"{counts.tokens} tokens, {counts.tokens_per_second:.1f} tokens/s"
    if counts.drafts:
        text += f"; {counts.drafts.accepted} of {counts.drafts.drafted} drafts accepted"
        speedup = counts.drafts.speedup
        text += f", {speedup:.2f} times as fast as without drafts" if speedup else ""
    return f"{text}; {counts.prompt_tokens} tokens of prompt in {counts.prompt_seconds:.2f} s"


def document(text: str, counts: Counts) -> dict[str, Any]:
    """An answer as JSON."""
    drafts = counts.drafts
    speculation = drafts and {
        "passes": drafts.passes,
        "drafted": drafts.drafted,
        "accepted": drafts.accepted,
        "speedup": drafts.speedup,
    }
    return {
        "text": text,
        "finish": counts.finish,
        "tokens": counts.tokens,
        "tokens_per_second": counts.tokens_per_second,
        "prompt_tokens": counts.prompt_tokens,
        "prompt_seconds": counts.prompt_seconds,
        "speculation": speculation,
    }
