"""Losses of precisions by type of task, measured on a user's own prompts, and the routing rules that follow.

The source answers every prompt greedily. Each quantized model then reads prompt and answer: the KL divergence is
that of its next-token distributions over the answer. It also answers itself, which gives lengths and tool calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from halfbyte.errors import HalfbyteError
from halfbyte.serve.decision import Precision, matching_rule, resolve
from halfbyte.serve.request_facts import facts_of
from halfbyte.serve.routing_rules import DEFAULT_RULE, RoutingRules
from halfbyte.serve.served_models import ServedModel

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """One request of the user's file and the task that it belongs to: the name of a rule, or ``default``."""

    task: str
    request: Mapping[str, Any]


def prompts_of(requests: Sequence[Mapping[str, Any]], rules: RoutingRules) -> list[Prompt]:
    """Return each request with its ``task``, else the first rule that matches; HalfbyteError for an unknown task."""
    known = {DEFAULT_RULE, *(rule.name for rule in rules.rules)}
    prompts = []
    for number, request in enumerate(requests, 1):
        rule, _ = matching_rule(facts_of(request), rules)
        task = request.get("task", rule.name if rule else DEFAULT_RULE)
        if task not in known:
            raise HalfbyteError(
                f"prompt {number}: the task {task!r} is no rule of {rules.name}, nothing could route it"
            )
        prompts.append(Prompt(str(task), request))
    if not prompts:
        raise HalfbyteError("there are no prompts to measure with")
    return prompts


def measure_tasks(
    models: Sequence[ServedModel],
    source: ServedModel,
    prompts: Sequence[Prompt],
    max_tokens: int,
    report: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure every model against the source; one row per task and precision, those of the source first.

    ``report(models, of)`` is called as they are done.
    """
    references: list[tuple[list[int], list[int], Any]] = []
    rows = []
    for number, model in enumerate((source, *models), 1):
        losses, answers = _run_model(model, prompts, max_tokens, references)
        rows += _rows(model.precision, prompts, losses, answers)
        if report:
            report(number, len(models) + 1)
    return rows


def learned_rules(
    rules: RoutingRules, rows: Sequence[Mapping[str, Any]], precisions: Sequence[Precision], most_loss: float
) -> RoutingRules:
    """Return the rules with the fewest bits for each measured task whose mean KL is at most ``most_loss``.

    A precision whose tool calls are valid less often than the source's is not taken. The last of ``precisions`` is the
    source, which always may answer. Tasks without a prompt keep their precision, as far as it is served.
    """
    source = precisions[-1].name
    by_task: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], {})[row["precision"]] = row

    def chosen(task: str, before: str) -> str:
        measured = by_task.get(task)
        if not measured:
            return resolve(before, precisions)
        calls = measured[source]["valid_tool_calls"]
        for precision in sorted(precisions, key=lambda p: p.bits):
            row = measured[precision.name]
            worse_calls = calls is not None and row["valid_tool_calls"] < calls
            if precision.name == source or (row["kl"] <= most_loss and not worse_calls):
                return precision.name
        return source

    keys = ("kl", "answer_length", "valid_tool_calls", "prompts")
    document = rules.model_dump(exclude_defaults=True)
    document["name"] = f"{rules.name}-measured"
    document["description"] = f"at most {most_loss:g} KL on the prompts measured, at the fewest bits"
    document["default"] = chosen(DEFAULT_RULE, rules.default)
    document["rules"] = [
        {
            **rule.model_dump(exclude_defaults=True),
            "precision": chosen(rule.name, rule.precision),
            "measured": {p: {k: row[k] for k in keys} for p, row in by_task.get(rule.name, {}).items()},
        }
        for rule in rules.rules
    ]
    return RoutingRules.model_validate(document)


def rules_text(rules: RoutingRules) -> str:
    """Write rules as YAML."""
    plain = json.loads(rules.model_dump_json(exclude_defaults=True, exclude_none=True))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


def is_valid_call(answer: str, tools: Sequence[Any]) -> bool:
    """Whether an answer calls one of the tools, with all arguments that it requires."""
    functions = [t.get("function", t) for t in tools if isinstance(t, dict)]
    required = {f.get("name"): (f.get("parameters") or {}).get("required", []) for f in functions}
    for text in _CALL.findall(answer) or [answer]:
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return False
        arguments = call.get("arguments") if isinstance(call, dict) else None
        if not isinstance(arguments, dict) or call.get("name") not in required:
            return False
        if not set(required[call["name"]]) <= set(arguments):
            return False
    return True


def _run_model(
    model: ServedModel, prompts: Sequence[Prompt], max_tokens: int, references: list[tuple[list[int], list[int], Any]]
) -> tuple[list[float], list[tuple[int, str]]]:
    """Return each prompt's mean KL and the model's own answer; the first model fills ``references``."""
    import torch

    from halfbyte.evaluate.divergence import divergence, log_softmax
    from halfbyte.runtime.generation import Generator, Sampling
    from halfbyte.runtime.loading import load, load_tokenizer

    generator = Generator(load(model.path, "float32"), load_tokenizer(model.path))
    sampling = Sampling(0.0, 1.0, 0, None, max_tokens, ())
    is_source = not references
    losses, answers = [], []
    for number, prompt in enumerate(prompts):
        ids = references[number][0] if not is_source else _tokens_of(prompt.request, generator.tokenizer)
        text = "".join(generator.continue_tokens(ids, sampling))
        answers.append((generator.counts.tokens, text))
        if is_source:
            references.append(
                (ids, generator.tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens], None)
            )
        _, answer, reference = references[number]
        with torch.inference_mode():
            logits = generator.model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 :].float()
            log_probs = log_softmax(logits)
            if is_source:
                references[number] = (ids, answer, log_probs)
                losses.append(0.0)
            else:
                losses.append(max(0.0, float(divergence(reference, log_probs).mean())))
    return losses, answers


def _tokens_of(request: Mapping[str, Any], tokenizer: Any) -> list[int]:
    from halfbyte.runtime.templates import apply_template

    messages = request.get("messages")
    if isinstance(messages, list) and getattr(tokenizer, "chat_template", None):
        given = {"tools": request["tools"]} if request.get("tools") else {}
        text = apply_template(tokenizer, messages, tokenize=False, add_generation_prompt=True, **given)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(facts_of(request).everything)["input_ids"])
    if not ids:
        raise HalfbyteError("a prompt has no text")
    return ids


def _rows(
    precision: Precision, prompts: Sequence[Prompt], losses: Sequence[float], answers: Sequence[tuple[int, str]]
) -> list[dict[str, Any]]:
    rows = []
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        those = [i for i, prompt in enumerate(prompts) if prompt.task == task]
        calls = [
            is_valid_call(answers[i][1], prompts[i].request["tools"]) for i in those if prompts[i].request.get("tools")
        ]
        rows.append(
            {
                "task": task,
                "precision": precision.name,
                "kl": sum(losses[i] for i in those) / len(those),
                "answer_length": sum(answers[i][0] for i in those) / len(those),
                "valid_tool_calls": sum(calls) / len(calls) if calls else None,
                "prompts": len(those),
            }
        )
    return rows
