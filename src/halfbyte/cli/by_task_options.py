"""``halfbyte evaluate --by-task``: options, table, and the rules file."""

from __future__ import annotations

import argparse

from halfbyte.cli.output import print_json, say, steps, table


def add_by_task(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a measurement by type of task."""
    group = parser.add_argument_group("by type of task, for `halfbyte serve --rules`")
    group.add_argument("--by-task", metavar="FILE.jsonl", help="requests: measure each type of task by itself")
    group.add_argument(
        "--rules", metavar="FILE", default="quantclaw", help="rules that name the types (default: quantclaw)"
    )
    group.add_argument("--max-loss", metavar="KL", type=float, default=0.05, help="mean KL to keep (default: 0.05)")
    group.add_argument("--write-rules", metavar="FILE.yaml", help="write rules that keep it at the fewest bits")


def run_by_task(args: argparse.Namespace) -> int:
    """Measure, print a row for each task and precision, and write the rules."""
    from halfbyte.checkpoint import write_file_atomic
    from halfbyte.errors import HalfbyteError
    from halfbyte.serve.by_task import learned_rules, measure_tasks, prompts_of, rules_text
    from halfbyte.serve.explain import read_prompts
    from halfbyte.serve.routing_rules import load_rules
    from halfbyte.serve.served_models import read_models

    if not args.against:
        raise HalfbyteError("--by-task needs --against SOURCE, whose answers the others are compared with")
    rules = load_rules(args.rules)
    prompts = prompts_of(list(read_prompts(args.by_task)), rules)
    *models, source = read_models([*args.paths, args.against])
    with steps("evaluating", args.json) as report:
        rows = measure_tasks(models, source, prompts, args.max_tokens or 128, report)
    learned = learned_rules(rules, rows, [model.precision for model in (*models, source)], args.max_loss)
    if args.write_rules:
        write_file_atomic(args.write_rules, rules_text(learned).encode())
    if args.json:
        print_json({"rows": rows, "max_loss": args.max_loss, "rules": learned.model_dump(exclude_defaults=True)})
        return 0
    shown = [
        [
            r["task"],
            r["precision"],
            str(r["prompts"]),
            f"{r['kl']:.5f}",
            f"{r['answer_length']:.1f}",
            r["valid_tool_calls"],
        ]
        for r in rows
    ]
    table(["task", "precision", ">prompts", ">KL", ">answer tokens", ">valid calls"], shown)
    if args.write_rules:
        say(f"rules that keep a KL of {args.max_loss:g}: {args.write_rules}")
    return 0
