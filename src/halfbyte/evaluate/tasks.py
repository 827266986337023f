"""Accuracy on tasks, by lm-evaluation-harness; MMLU-Pro in instruct mode without reasoning, from a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.files import parse_object, read_small
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.confidence import wilson

MMLU_PRO = "mmlu_pro"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PREFIX = "The answer is"
BATCH = 8
_METRICS = ("acc", "exact_match")


@dataclass(frozen=True)
class Tasks:
    """``names`` of the harness's own tasks, its ``manager`` of them, questions of MMLU-Pro (None: not asked for)."""

    names: tuple[str, ...]
    manager: Any
    questions: list[dict[str, Any]] | None


def prepare(names: Sequence[str], questions: str | Path | None, limit: int | None = None) -> Tasks:
    """Check what is asked for before any model is loaded; HalfbyteError with the install command without lm-eval."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise HalfbyteError(
            f"tasks need lm-evaluation-harness ({error}); install it with: pip install 'halfbyte[eval]'"
        ) from error
    asks_mmlu_pro = MMLU_PRO in names
    if asks_mmlu_pro and questions is None:
        raise HalfbyteError(f"{MMLU_PRO} needs its questions as JSON lines (--questions FILE.jsonl)")
    if questions is not None and not asks_mmlu_pro:
        raise HalfbyteError(f"questions are for the task {MMLU_PRO}, which is not among {', '.join(names)}")
    rest = tuple(name for name in names if name != MMLU_PRO)
    from lm_eval.tasks import TaskManager

    with _quiet():
        # to look through its thousands of tasks takes seconds
        manager = TaskManager(include_defaults=bool(rest))
    unknown = [name for name in rest if name not in set(manager.all_tasks)]
    if unknown:
        raise HalfbyteError(f"lm-evaluation-harness has no task {unknown[0]!r}")
    return Tasks(rest, manager, read_questions(questions)[:limit] if questions is not None else None)


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """Questions of MMLU-Pro: JSON lines with ``question``, ``options``, ``answer_index`` and ``category``."""
    path = Path(path)
    questions = []
    for number, line in enumerate(read_small(path).splitlines(), 1):
        if not line.strip():
            continue
        what = f"line {number} of {path.name}"
        item = parse_object(line, what, strict=False)
        text, options, answer = (item.get(key) for key in ("question", "options", "answer_index"))
        if not isinstance(text, str) or not isinstance(options, list) or not all(isinstance(o, str) for o in options):
            raise HalfbyteError(f"{what} is no question: it needs `question` and `options`")
        if type(answer) is not int or not 0 <= answer < len(options) <= len(LETTERS):
            raise HalfbyteError(f"{what} has no `answer_index` among its {len(options)} options")
        questions.append({**item, "category": str(item.get("category", ""))})
    if not questions:
        raise HalfbyteError(f"{path} holds no question")
    return questions


def prompt(item: dict[str, Any]) -> str:
    """Spell a question as the user asks it."""
    options = "\n".join(f"{LETTERS[i]}. {option.strip()}" for i, option in enumerate(item["options"]))
    subject = f" about {item['category']}" if item["category"] else ""
    return (
        f"The following is a multiple choice question{subject}. Answer with the letter of the right option only.\n\n"
        f"Question: {item['question']}\nOptions:\n{options}"
    )


def run_tasks(tasks: Tasks, model: Any, tokenizer: Any, limit: int | None = None) -> dict[str, Any]:
    """``tasks`` of a row: an object per task (docs/evaluation.md)."""
    from lm_eval import simple_evaluate

    from halfbyte.evaluate.harness import HalfbyteLM

    chat = bool(getattr(tokenizer, "chat_template", None))
    with _quiet():
        lm = HalfbyteLM(model, tokenizer=tokenizer, batch_size=BATCH, enable_thinking=False)
        todo = [*tasks.names, *([_mmlu_pro(tasks.questions)] if tasks.questions is not None else [])]
        evaluated = simple_evaluate(
            lm, tasks=todo, task_manager=tasks.manager, limit=limit, apply_chat_template=chat, bootstrap_iters=0
        )
    assert evaluated is not None
    results = {}
    for name, samples in evaluated["samples"].items():
        ordered = sorted(samples, key=lambda sample: sample["doc_id"])
        shots = evaluated["n-shot"].get(name, 0)
        results[name] = _result(name, ordered, evaluated["results"][name], shots, chat, lm.truncated, limit)
    return results


def _mmlu_pro(questions: list[dict[str, Any]]) -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    docs = [{"number": i, "content": json.dumps(item)} for i, item in enumerate(questions)]
    config = {
        "task": MMLU_PRO,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(docs)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: prompt(json.loads(doc["content"])),
        "doc_to_choice": lambda doc: list(LETTERS[: len(json.loads(doc["content"])["options"])]),
        "doc_to_target": lambda doc: json.loads(doc["content"])["answer_index"],
        "gen_prefix": PREFIX,
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    return ConfigurableTask(config=config)


def _result(
    name: str,
    samples: list[dict[str, Any]],
    values: dict[str, Any],
    shots: int,
    chat: bool,
    truncated: int,
    limit: int | None,
) -> dict[str, Any]:
    metric = next((m for m in _METRICS if m in samples[0]), None)
    spelled = "through the chat template, thinking off" if chat else "without a chat template"
    cut = f", the first {limit:,} questions only" if limit else ""
    cut += (
        f"; {truncated} prompt(s) were longer than the model's positions and lost their beginning" if truncated else ""
    )
    result: dict[str, Any] = {
        "metric": metric,
        "ci": None,
        "questions": len(samples),
        "by_category": {},
        "correct": None,
        "questions_sha256": _digest(samples),
        "truncated": truncated,
        "protocol": f"lm-evaluation-harness, {shots}-shot, {spelled}{cut}",
    }
    if name == MMLU_PRO:
        result["protocol"] = (
            f"MMLU-Pro, 0-shot, {spelled}, no reasoning: the likeliest letter after `{PREFIX}`, by "
            f"lm-evaluation-harness{cut}"
        )
    if metric is None or any(sample[metric] not in (0, 1) for sample in samples):
        first = next((k for k in values if k.endswith(",none") and "stderr" not in k), None)
        return {
            **result,
            "metric": first and first.removesuffix(",none"),
            "value": values.get(first) if first else None,
        }
    right = [int(sample[metric]) for sample in samples]
    result |= {"value": sum(right) / len(right), "ci": wilson(sum(right), len(right))}
    result["correct"] = "".join(map(str, right))
    if name == MMLU_PRO:
        groups: dict[str, list[int]] = {}
        for sample, one in zip(samples, right, strict=True):
            groups.setdefault(json.loads(sample["doc"]["content"])["category"], []).append(one)
        result["by_category"] = {
            category: {"value": sum(ones) / len(ones), "questions": len(ones)}
            for category, ones in sorted(groups.items())
            if category
        }
    return result


def _digest(samples: list[dict[str, Any]]) -> str:
    text = json.dumps([sample["doc"] for sample in samples], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs, draws bars on stderr, and asks git for a commit, whose refusal goes to the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    terminal = os.dup(2)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stderr(nothing):
            os.dup2(nothing.fileno(), 2)
            yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        logging.disable(before)
