"""``halfbyte train``: the weights of a quantized model, trained back towards their source."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from halfbyte.cli.human import positive
from halfbyte.cli.logs import prepare_logs
from halfbyte.cli.output import print_json, say, steps
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.train.run_training import Training

SUMMARY = "train a quantized model back towards its source and write it without a second quantization"
EXAMPLES = """\
  halfbyte train MODEL OUT --start OUT-GPTQ --text train.txt
  halfbyte train MODEL OUT --start OUT-GPTQ --text train.txt --method local          one decoder layer in memory
  halfbyte train MODEL OUT --start OUT-INT4 --text task.txt --method task --dialect compressed-tensors
  halfbyte train MODEL OUT --start OUT-GPTQ --text train.txt --resume                continue after an interruption

MODEL is the unquantized source, --start its quantized checkpoint. docs/training.md says when training pays.
needs torch and transformers: pip install 'halfbyte[train]'
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="the unquantized source")
    parser.add_argument("out", metavar="OUT", help="folder for the trained checkpoint")
    parser.add_argument(
        "--start", metavar="DIR", required=True, help="the quantized checkpoint that training starts from"
    )
    parser.add_argument("--text", metavar="FILE", nargs="+", required=True, help="UTF-8 text to train on")
    parser.add_argument(
        "--held-out",
        metavar="FILE",
        nargs="+",
        default=[],
        help="text that chooses the best step (default: the end of --text)",
    )
    parser.add_argument(
        "--method",
        choices=("distill", "local", "task"),
        default="distill",
        help="divergence from the source, one decoder layer at a time, or the text's own loss (default distill)",
    )
    parser.add_argument(
        "--steps", metavar="N", type=positive, default=300, help="updates; with local, of each layer (default 300)"
    )
    parser.add_argument("--rate", metavar="R", type=_rate, help="learning rate (default: from the scales)")
    parser.add_argument("--length", metavar="L", type=positive, default=512, help="tokens per sequence (default 512)")
    parser.add_argument("--batch", metavar="B", type=positive, default=1, help="sequences per step (default 1)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="order of the sequences (default 0)")
    parser.add_argument(
        "--master", choices=("cell", "decoded"), default="cell", help="where weights start (default cell; see the docs)"
    )
    parser.add_argument(
        "--kept", choices=("frozen", "norms", "all"), default="frozen", help="what else is trained (default frozen)"
    )
    parser.add_argument(
        "--activations", choices=("nvfp4", "mxfp4", "fp8"), help="round the inputs of quantized layers too"
    )
    parser.add_argument("--top-k", metavar="K", type=positive, help="compare the teacher's K likeliest tokens only")
    parser.add_argument("--teacher", metavar="DIR", help="another teacher than MODEL, or its cached answers")
    parser.add_argument("--dialect", metavar="NAME", help="dialect of the output (default: that of the start)")
    parser.add_argument(
        "--answers", metavar="N", type=int, default=8, help="answers whose length is measured (default 8)"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted training")
    parser.add_argument("--device", metavar="D", default="cpu", help="torch device, such as cuda (default cpu)")
    parser.add_argument(
        "--dtype", metavar="T", default="float32", help="torch dtype of the computation (default float32)"
    )


def run(args: argparse.Namespace) -> int:
    """Train, write, and say what was gained."""
    prepare_logs()
    from halfbyte.runtime import need_torch

    need_torch()
    from halfbyte.train.run_training import StudentOptions, TextOptions, train_end_to_end
    from halfbyte.train.training_loop import TrainingOptions

    text = TextOptions(tuple(args.text), tuple(args.held_out), args.length, args.batch, args.seed)
    if args.method == "local":
        return _run_local(args, text)
    training = TrainingOptions(args.steps, args.rate)
    student = StudentOptions(
        args.master, args.activations, args.kept, args.top_k, args.teacher, args.dtype, args.device, args.dialect,
        args.answers,
    )  # fmt: skip
    with steps("training", args.json) as report:
        done = train_end_to_end(
            args.model, args.out, args.start, args.method, text, training, student, args.resume, report
        )
    if args.json:
        print_json(_document(done))
    else:
        _show(done)
    return 0


def _run_local(args: argparse.Namespace, text: Any) -> int:
    """Train layer by layer."""
    from halfbyte.train.local_training import LocalOptions
    from halfbyte.train.run_training import train_locally

    without = ("top_k", "teacher", "activations")
    given = [name for name in without if getattr(args, name) is not None] + ["kept"] * (args.kept != "frozen")
    if given:
        raise HalfbyteError(f"--method local has no --{given[0].replace('_', '-')}; leave it out, or take distill")
    options = LocalOptions(args.steps, rate=args.rate, master=args.master)
    with steps("training layers", args.json) as report:
        done = train_locally(args.model, args.out, args.start, text, options, args.dialect, args.resume, report)
    if args.json:
        print_json(
            {"out": args.out, "method": "local", "tokens": done.tokens, "before": done.before, "after": done.after}
        )
        return 0
    for number, (first, last) in enumerate(zip(done.before, done.after, strict=True)):
        change = f" ({last / first - 1:+.1%})" if first else ""
        say(f"layer {number}: held-out error {first:.3e} -> {last:.3e}{change}")
    say(f"{done.tokens:,} tokens; written to {args.out}")
    return 0


def _document(done: Training) -> dict[str, Any]:
    return {
        "out": str(done.conversion.out),
        "method": done.method,
        **done.outcome.to_dict(),
        "answers": done.answers,
    }


def _show(done: Training) -> None:
    outcome = done.outcome
    first, best = outcome.held_out[0], outcome.held_out[outcome.best]
    say(
        f"{outcome.steps} steps, {outcome.tokens:,} tokens, rate {outcome.rate:.2g}",
        f"held-out loss {first:.6f} at the start, {best:.6f} at step {outcome.best} ({(best / first - 1):+.1%})",
    )
    if outcome.stopped:
        say(f"stopped early: {outcome.stopped}")
    for name, answers in done.answers.items():
        say(
            f"answers of the {name} model: {answers['mean_length']:.1f} tokens on average, "
            f"{answers['at_limit']:.0%} of {answers['prompts']} reach {answers['limit']}"
        )
    say(f"written to {done.conversion.out}")


def _rate(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value
