"""``halfbyte evaluate``: perplexity, and how far quantized models are from their source."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from halfbyte.cli import by_task_options, options
from halfbyte.cli.human import positive, size
from halfbyte.cli.json_files import write_json
from halfbyte.cli.logs import prepare_logs
from halfbyte.cli.output import print_json, say, steps, table, warn

SUMMARY = "measure perplexity, KL divergence and top-1 agreement with the source, and accuracy on tasks"
EXAMPLES = """\
  halfbyte evaluate ./out --against ./Qwen3.5-35B-A3B --text held-out.txt
  halfbyte evaluate ./nvfp4 ./mixfp4 --against ./model --text wiki.test.raw --protocol wikitext2 -o results.json
  halfbyte evaluate ./nvfp4 --against ./model --conversations sharegpt.json --activations nvfp4
  halfbyte evaluate ./nvfp4 --against ./model --tasks mmlu_pro --questions mmlu_pro_test.jsonl

needs torch and transformers: pip install 'halfbyte[transformers]'; tasks also: pip install 'halfbyte[eval]'
"""

OK, FOUND_PROBLEMS = 0, 1
NOT_VALID = "not valid"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("paths", metavar="PATH", nargs="+", help="checkpoints to measure")
    parser.add_argument("--against", metavar="SOURCE", help="the source, for KL divergence and top-1 agreement")
    on = parser.add_argument_group("measurement")
    on.add_argument("--text", metavar="FILE", help="UTF-8 text (only the demo model includes one)")
    on.add_argument(
        "--protocol",
        choices=("wikitext2", "chunks-512"),
        help="wikitext2: the rows of a raw file that are not blank, joined by blank lines, length and stride 2048; "
        "chunks-512: length and stride 512",
    )
    on.add_argument("--length", metavar="N", type=positive, help="tokens in a window (default 512)")
    on.add_argument("--stride", metavar="N", type=positive, help="tokens between windows (default: the length)")
    on.add_argument("--max-tokens", metavar="N", type=positive, help="use only the first N tokens of the text")
    options.add_bos(on)
    on.add_argument(
        "--conversations", metavar="FILE", help="JSON in ShareGPT form: KL divergence on conversations, not on the text"
    )
    on.add_argument(
        "--conversation-count", metavar="N", type=positive, default=100, help="number of conversations (default 100)"
    )
    on.add_argument(
        "--conversation-length", metavar="N", type=positive, default=256, help="tokens of each (default 256)"
    )
    on.add_argument("--tasks", metavar="NAMES", help="tasks of lm-evaluation-harness, separated by commas; mmlu_pro")
    on.add_argument("--questions", metavar="FILE", help="questions of mmlu_pro as JSON lines")
    on.add_argument("--limit", metavar="N", type=positive, help="only the first N questions of each task")
    on.add_argument(
        "--errors", action="store_true", help="also measure the error of every tensor, like `halfbyte errors`"
    )
    on.add_argument(
        "--mtp",
        metavar="K",
        type=positive,
        nargs="?",
        const=3,
        default=0,
        help="let the multi-token-prediction head draft K tokens (default 3) and count those that its model accepts",
    )
    on.add_argument("--importance", metavar="FILE", help="importance file that weights these errors")
    by_task_options.add_by_task(parser)
    how = parser.add_argument_group("computation")
    how.add_argument(
        "--activations",
        choices=("nvfp4", "mxfp4", "fp8"),
        help="also round the inputs of quantized layers, as engines do on such hardware",
    )
    how.add_argument("--device", metavar="D", help="torch device, such as cuda (default: cpu)")
    how.add_argument("--dtype", metavar="T", default="float32", help="torch dtype of the computation (default float32)")
    how.add_argument("--dequantize", action="store_true", help="decode weights once: faster, but takes more memory")
    how.add_argument("--no-noise-floor", action="store_true", help="do not measure the source against itself")
    how.add_argument(
        "--cache",
        metavar="DIR",
        help="folder for the source's log-probabilities (default: $HALFBYTE_CACHE, else ~/.cache/halfbyte)",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the JSON document to this file")


def run(args: argparse.Namespace) -> int:
    """Measure and print a row per checkpoint."""
    prepare_logs()
    if args.by_task:
        return by_task_options.run_by_task(args)
    from halfbyte.evaluate import Settings, measure
    from halfbyte.evaluate.cache_folder import default_cache

    settings = Settings(
        **options.text_settings(args),
        conversations=args.conversations,
        conversation_count=args.conversation_count,
        conversation_length=args.conversation_length,
        dequantize=args.dequantize,
        activations=args.activations,
        noise_floor=not args.no_noise_floor,
        cache=Path(args.cache) if args.cache else default_cache(),
        tasks=tuple(name for name in (args.tasks or "").split(",") if name),
        questions=args.questions,
        limit=args.limit,
        drafts=args.mtp,
        errors=args.errors,
        importance=args.importance,
    )
    with steps("evaluating", args.json) as report:
        document = measure(args.paths, args.against, settings, report, warn)
    if args.output:
        write_json(args.output, document)
    if args.json:
        print_json(document)
    else:
        show(document)
    return FOUND_PROBLEMS if invalid(document) else OK


def invalid(document: dict[str, Any]) -> list[str]:
    """Sentences about what could not be measured, since its numbers are not finite."""
    rows = [row["invalid"] for row in document["rows"]]
    return [sentence for sentence in (*rows, (document["noise_floor"] or {}).get("invalid")) if sentence]


def show(document: dict[str, Any]) -> None:
    """Print the results as tables."""
    rows, floor = document["rows"], document["noise_floor"]
    if any(row["protocol"] or row["kl"] or row["invalid"] for row in rows):
        _show_rows(rows, floor)
    _show_drafts(rows)
    for name in dict.fromkeys(name for row in rows for name in row["tasks"]):
        _show_task(name, document)
    for line in _protocols(rows):
        say(line)
    for sentence in invalid(document):
        say(f"not valid   {sentence}")


def _show_drafts(rows: list[dict[str, Any]]) -> None:
    """What the multi-token-prediction heads are worth."""
    measured = [(row["name"], row["mtp_drafts"]) for row in rows if row["mtp_drafts"]]
    if not measured:
        return
    most = max(len(drafts["accepted"]) for _, drafts in measured)
    table(
        ["checkpoint", *(f">{k} accepted" for k in range(1, most + 1)), ">tokens per step"],
        [
            [name, *(f"{100 * share:.1f} %" for share in drafts["accepted"]), f"{drafts['tokens_per_step']:.2f}"]
            for name, drafts in measured
        ],
    )
    first = measured[0][1]
    say(
        "",
        f"drafts of the multi-token-prediction head, greedy: {first['positions']:,} positions in continuations of "
        f"{first['prompts']} prompts of {first['prompt_length']} tokens by {first['continuation']}",
        "",
    )


def _show_rows(rows: list[dict[str, Any]], floor: dict[str, Any] | None) -> None:
    columns = ["checkpoint", ">size", ">bits/weight", ">perplexity", ">KL mean", ">95 % interval"]
    columns += [">median", ">p90", ">p99", ">same top-1"]
    notes: list[str] = []
    lines = [_cells(row, notes) for row in rows]
    if floor is not None:
        value = NOT_VALID if floor["invalid"] else _number(floor["perplexity"], ".4f")
        lines.append(["noise floor", "", "", value, *_divergence(floor)])
    table(columns, lines)
    say("")
    for mark, note in enumerate(notes, 1):
        say(f"[{mark}] {note}")
    if floor is not None:
        say(f"noise floor: {floor['how']}")


def _cells(row: dict[str, Any], notes: list[str]) -> list[str]:
    name = row["name"] if not row["activations"] else f"{row['name']} + {row['activations']} activations"
    same = row["indistinguishable"]
    if row["kl"] is not None:
        if same["noise"]:
            notes.append(f"{row['name']}: its KL divergence is within the noise floor")
        elif same["kl"]:
            notes.append(f"{row['name']}: its KL divergence is not distinguishable from that of {_some(same['kl'])}")
        if same["noise"] or same["kl"]:
            name += f" [{len(notes)}]"
    value = NOT_VALID if row["invalid"] else _number(row["perplexity"], ".4f")
    first = [name, size(row["bytes"]), f"{row['bits_per_weight']:.2f}", value]
    return [*first, *_divergence(row)]


def _divergence(row: dict[str, Any]) -> list[str]:
    kl = row["kl"]
    if kl is None:
        return [""] * 6
    interval = row["kl_ci"]["mean"]
    between = f"{interval[0]:.5f}..{interval[1]:.5f}" if interval else ""
    return [f"{kl['mean']:.5f}", between, *(f"{kl[k]:.5f}" for k in ("median", "p90", "p99")), f"{kl['top1']:.2%}"]


def _show_task(name: str, document: dict[str, Any]) -> None:
    rows, source = document["rows"], document["source"]
    pairs = {(c["a"], c["b"]): c for c in document["comparisons"] if c["task"] == name}
    lines = []
    answered = [row for row in rows if name in row["tasks"]]
    for row in answered:
        score = row["tasks"][name]
        low, high = score["ci"] or (None, None)
        between = "" if low is None else f"{low:.2%}..{high:.2%}"
        versus = pairs.get((source, row["name"]))
        test = "" if versus is None else f"{versus['only_a']} lost, {versus['only_b']} won, p = {versus['p']:.3g}"
        lines.append([row["name"], _number(score["value"], ".2%"), between, f"{score['questions']:,}", test])
    table(["checkpoint", f">{name}", ">95 % interval", ">questions", "against the source (McNemar)"], lines)
    say("", f"{name}: {answered[0]['tasks'][name]['protocol']}")


def _protocols(rows: list[dict[str, Any]]) -> list[str]:
    """What was measured on what; perplexity's protocol comes last."""
    text, kl = (next((row[key] for row in rows if row[key]), None) for key in ("protocol", "kl_protocol"))
    lines = []
    if kl is not None and kl != text:
        lines.append(f"KL in nats per token on {kl['note']}")
    if text is not None:
        lines.append(f"{text['note']}{'; KL in nats per token' if kl == text else ''}")
    return lines


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
