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

    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.seed, args.max_tokens, tuple(args.stop))
    if args.threads is not None:
        if args.threads < 1:
            raise HalfbyteError("--threads must be 1 or more")
        torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.path, args.revision)
    model = load(args.path, args.dtype, revision=args.revision, mode=args.mode)
    return Generator(model, tokenizer), sampling


def described(counts: Counts) -> str:
    """What an answer took, in one line."""
    prompt = f"{counts.prompt_tokens} tokens of prompt in {counts.prompt_seconds:.2f} s"
    return f"{counts.tokens} tokens, {counts.tokens_per_second:.1f} tokens/s; {prompt}"


def document(text: str, counts: Counts) -> dict[str, Any]:
    """An answer as JSON."""
    return {
        "text": text,
        "finish": counts.finish,
        "tokens": counts.tokens,
        "tokens_per_second": counts.tokens_per_second,
        "prompt_tokens": counts.prompt_tokens,
        "prompt_seconds": counts.prompt_seconds,
    }
