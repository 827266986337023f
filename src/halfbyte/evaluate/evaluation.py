"""``evaluate``: checkpoints on a text, on conversations and on tasks, against their source, one model at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.checkpoint.scratch import scratch_folder
from halfbyte.errors import HalfbyteError, MeasurementError
from halfbyte.evaluate import conversations as chat
from halfbyte.evaluate.confidence import paired
from halfbyte.evaluate.divergence import TokenScores
from halfbyte.evaluate.fingerprint import content_hash
from halfbyte.evaluate.forward import reference_key, score, store_reference
from halfbyte.evaluate.models import check_length, loaded_by, opened, vocabulary
from halfbyte.evaluate.reference_logprobs import Cache, Reference
from halfbyte.evaluate.results import PACKAGES, VERSION, command, describe, distinct_names, environment, now
from halfbyte.evaluate.row_summary import Scored, judge, summarize
from halfbyte.evaluate.settings import Settings
from halfbyte.evaluate.text import Passage, passage_of
from halfbyte.runtime.loading import load_tokenizer
from halfbyte.source.checkpoint import Checkpoint

Progress = Callable[[int, int], None]
_SETTINGS = [field.name for field in fields(Settings) if field.name != "text"]


def evaluate(
    paths: Sequence[str | Path] | str | Path,
    against: str | Path | None = None,
    text: str | Path | None = None,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Measure the perplexity of checkpoints on a text and, with ``against``, their divergence from that one.

    ``settings`` are fields of ``Settings``. The text is tokenized by the tokenizer of ``against``, or else of the
    first checkpoint, and each token is scored once. One row per checkpoint, ``against`` first; docs/evaluation.md
    lists its keys.

    One model is in memory at a time (4-bit checkpoints in 4 bit, unless ``dequantize``); the source's
    log-probabilities wait on disk. ``progress`` is called with the number of windows done and their total.
    HalfbyteError for what cannot be measured, TypeError for a setting that there is not.
    """
    unknown = [name for name in settings if name not in _SETTINGS]
    if unknown:
        raise TypeError(f"evaluate() has no setting {unknown[0]!r}; there are {', '.join(_SETTINGS)}")
    settings["dtype"] = str(settings.get("dtype", "float32")).removeprefix("torch.")
    rows: list[dict[str, Any]] = measure(paths, against, Settings(text, **settings), progress)["rows"]
    return rows


def measure(
    paths: Sequence[str | Path] | str | Path,
    against: str | Path | None,
    settings: Settings,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure checkpoints and return the whole results document (docs/evaluation.md).

    ``announce`` is called with a line where the source's log-probabilities are those of an earlier run.
    """
    chosen = [paths] if isinstance(paths, (str, Path)) else list(paths)
    every = ([against] if against is not None else []) + [p for p in chosen if p != against]
    if not every:
        raise HalfbyteError("there is no checkpoint to evaluate")
    if len({str(path) for path in every}) < len(every):
        raise HalfbyteError("a checkpoint is given twice; leave one out")
    place = nullcontext(settings.cache) if settings.cache else scratch_folder("halfbyte")
    with place as folder:
        return _Run(every, against is not None, settings, Cache(str(folder)), progress, announce).document()


@dataclass
class _Run:
    """One measurement: what is on the way between its steps."""

    paths: list[str | Path]
    compare: bool
    settings: Settings
    cache: Cache
    progress: Progress | None
    announce: Callable[[str], None] | None = None
    done: int = 0
    total: int = 0
    correct: dict[str, dict[str, str]] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Measure all checkpoints and return the results document."""
        s = self.settings
        self.checkpoints = [Checkpoint.open(path) for path in self.paths]
        self.names = distinct_names(self.paths)
        self._check_vocabularies()
        if s.drafts:
            from halfbyte.evaluate.draft_acceptance import check_drafts

            check_drafts(self.checkpoints, s.drafts)
        tokenizer = load_tokenizer(self.paths[0])
        self.on_text, self.on_kl = self._passages(tokenizer)
        self.passages = list({id(p): p for p in (self.on_text, self.on_kl) if p is not None}.values())
        noisy = s.noise_floor and self.compare
        windows = sum(len(p.windows) for p in self.passages)
        self.total = windows * (len(self.paths) + noisy)
        if s.tasks:
            from halfbyte.evaluate.tasks import prepare

            self.tasks = prepare(s.tasks, s.questions, s.limit)
        self.hashes = [content_hash(checkpoint) for checkpoint in self.checkpoints]
        self.references: dict[int, Reference] = {}
        measured = [self._row(i) for i in range(len(self.paths))]
        floor = self._noise_floor() if noisy else None
        judge(measured, floor)
        comparisons = [
            paired(task, a, b, answers)
            for task, answers in self.correct.items()
            for k, a in enumerate(answers)
            for b in list(answers)[k + 1 :]
        ]
        return {
            "halfbyte": "results",
            "version": VERSION,
            "created": now(),
            "command": command(),
            "environment": environment(s.device, PACKAGES if s.tasks else PACKAGES[:3]),
            "source": self.names[0] if self.compare else None,
            "rows": [entry.row for entry in measured],
            "noise_floor": floor.row if floor else None,
            "comparisons": comparisons,
        }

    def _passages(self, tokenizer: Any) -> tuple[Passage | None, Passage | None]:
        """What perplexity and what divergence are measured on."""
        s = self.settings
        on_text = None
        if s.names_text or not (s.conversations or s.tasks):
            on_text = passage_of(s, self.checkpoints[0].inventory.root, tokenizer)
        if s.conversations is None:
            return on_text, on_text
        if not self.compare:
            raise HalfbyteError("divergence on conversations needs a source (--against SOURCE)")
        count, length = s.conversation_count, s.conversation_length
        return on_text, chat.conversations_of(s.conversations, tokenizer, s.dtype, count, length)

    def _check_vocabularies(self) -> None:
        sizes = [_stated(checkpoint) for checkpoint in self.checkpoints]
        for size, path in zip(sizes, self.paths, strict=True):
            if size and sizes[0] and size != sizes[0]:
                raise HalfbyteError(
                    f"{path} has a vocabulary of {size} tokens, {self.paths[0]} one of {sizes[0]}; only checkpoints "
                    "of one model can be compared"
                )

    def _row(self, index: int) -> Scored:
        """Measure one checkpoint; one whose logits are not finite is marked, unless all others are compared with it."""
        began = time.monotonic()
        s, path, checkpoint = self.settings, self.paths[index], self.checkpoints[index]
        is_source = self.compare and index == 0
        row = {**describe(path, checkpoint), "name": self.names[index], "fingerprint": self.hashes[index]}
        row |= {
            "loaded_by": loaded_by(checkpoint),
            "dtype": s.dtype,
            "activations": None if is_source else s.activations,
        }
        try:
            scores, tasks, drafts = self._run(index)
            row["invalid"] = None
        except MeasurementError as error:
            if is_source:
                raise
            scores, tasks, drafts, row["invalid"] = {}, {}, None, str(error)
        entry = self._scored(row, scores)
        summarize(entry)
        row |= {
            "tasks": tasks,
            "mtp_drafts": drafts,
            "errors": None if is_source or not s.errors else self._errors(index),
        }
        row["seconds"] = round(time.monotonic() - began, 3)
        return entry

    def _run(self, index: int) -> tuple[dict[int, TokenScores], dict[str, Any], dict[str, Any] | None]:
        """Scores by passage, answers by task, and accepted drafts of one checkpoint."""
        s, path, checkpoint = self.settings, self.paths[index], self.checkpoints[index]
        is_source = self.compare and index == 0
        scores: dict[int, TokenScores] = {}
        tasks: dict[str, Any] = {}
        drafts: dict[str, Any] | None = None
        if is_source:
            scores = self._stored_source()
        activations = None if is_source else s.activations
        if len(scores) < len(self.passages) or s.tasks or s.drafts:
            with opened(path, s.dtype, s.dequantize, s.device) as model:
                if activations:
                    from halfbyte.evaluate.emulated_activations import round_activations

                    round_activations(model, checkpoint, activations)
                for passage in self.passages:
                    if id(passage) not in scores:
                        check_length(model, path, passage.protocol.length)
                        scores[id(passage)] = self._score(model, passage, index)
                if s.tasks:
                    tasks = self._answer(model, index)
                if s.drafts:
                    from halfbyte.evaluate.draft_acceptance import measure_drafts

                    passage = self.passages[0]
                    drafts = measure_drafts(model, checkpoint, passage.tokens, s.drafts, passage.bos)
        return scores, tasks, drafts

    def _scored(self, row: dict[str, Any], scores: dict[int, TokenScores]) -> Scored:
        """A row with its scores; without any where it is not valid."""
        passages = (self.on_text, self.on_kl)
        text, kl = (None if p is None or id(p) not in scores else (p.protocol, scores[id(p)]) for p in passages)
        return Scored(row, text, kl, self.compare)

    def _score(self, model: Any, passage: Passage, index: int) -> TokenScores:
        if self.compare and index == 0:
            return self._score_source(model, passage)
        reference = self.references.get(id(passage))
        if reference is not None and reference.vocabulary != vocabulary(model):
            raise HalfbyteError(
                f"{self.paths[index]} has a vocabulary of {vocabulary(model)} tokens, {self.paths[0]} one of "
                f"{reference.vocabulary}; only checkpoints of one model can be compared"
            )
        return score(model, passage, reference, progress=self._report(passage))

    # --- the source ---

    def _key(self, passage: Passage, **more: Any) -> dict[str, Any]:
        s = self.settings
        return reference_key(self.hashes[0], passage, s.dtype, s.device, s.dequantize, **more)

    def _keeps(self, passage: Passage) -> bool:
        """Whether the log-probabilities of this passage are needed, and not the likelihoods only."""
        return passage is self.on_kl and (len(self.paths) > 1 or self.settings.noise_floor)

    def _stored_source(self) -> dict[int, TokenScores]:
        """What earlier runs have stored of the source's scores."""
        scores = {}
        for passage in self.passages:
            if self._keeps(passage):
                reference = self.cache.find(self._key(passage))
                if reference is not None:
                    self.references[id(passage)] = reference
                    scores[id(passage)] = _of_source(reference.nll, reference.window)
            elif (stored := self.cache.find_scores(self._key(passage, only="scores"))) is not None:
                scores[id(passage)] = _of_source(stored.nll, stored.window)
        self.done += sum(len(p.windows) for p in self.passages if id(p) in scores)
        if scores and self.announce:
            self.announce(f"{self.names[0]} was measured before: its log-probabilities are in {self.cache.folder}")
        return scores

    def _score_source(self, model: Any, passage: Passage) -> TokenScores:
        report = self._report(passage)
        if not self._keeps(passage):
            scores = score(model, passage, progress=report)
            self.cache.store_scores(self._key(passage, only="scores"), scores)
            return _of_source(scores.nll, scores.window)
        reference = store_reference(self.cache, self._key(passage), model, passage, report)
        self.references[id(passage)] = reference
        return _of_source(reference.nll, reference.window)

    def _noise_floor(self) -> Scored:
        """The source in another dtype against itself: what differs without any quantization."""
        s = self.settings
        other = "float32" if s.dtype == "bfloat16" else "bfloat16"
        scores: dict[int, TokenScores] = {}
        for p in self.passages:
            if (stored := self.cache.find_scores(self._key(p, only="noise", other=other))) is not None:
                scores[id(p)] = stored
        row: dict[str, Any] = {"how": f"the source in {other} against itself in {s.dtype}", "dtype": other}
        row["invalid"] = None
        try:
            if len(scores) < len(self.passages):
                with opened(self.paths[0], other, s.dequantize, s.device) as model:
                    for p in self.passages:
                        scores[id(p)] = score(model, p, self.references.get(id(p)), progress=self._report(p))
                        self.cache.store_scores(self._key(p, only="noise", other=other), scores[id(p)])
        except MeasurementError as error:
            scores, row["invalid"] = {}, str(error)
        floor = self._scored(row, scores)
        summarize(floor)
        floor.row = {key: row[key] for key in ("how", "dtype", "perplexity", "kl", "kl_ci", "invalid")}
        return floor

    # --- beside text ---

    def _answer(self, model: Any, index: int) -> dict[str, Any]:
        from halfbyte.evaluate.tasks import run_tasks

        results = run_tasks(self.tasks, model, load_tokenizer(self.paths[0]), self.settings.limit)
        for name, result in results.items():
            if result["correct"] is not None:
                self.correct.setdefault(name, {})[self.names[index]] = result["correct"]
        return results

    def _errors(self, index: int) -> dict[str, Any] | None:
        from halfbyte.evaluate.errors_document import tensor_errors

        if not self.compare or not self.checkpoints[index].formats:
            return None
        return tensor_errors(self.paths[index], self.paths[0], self.settings.importance)

    def _report(self, passage: Passage) -> Progress | None:
        if self.progress is None:
            return None
        report, before, total = self.progress, self.done, self.total
        self.done += len(passage.windows)
        return lambda done, _: report(before + done, total)


def _of_source(nll: Any, window: Any) -> TokenScores:
    """The source's log-probabilities are those of the reference, bit for bit."""
    return TokenScores(nll, window, np.zeros(len(nll)), np.ones(len(nll), dtype=bool))


def _stated(checkpoint: Checkpoint) -> int | None:
    config = checkpoint.inventory.config
    text = config.get("text_config")
    vocabulary_size = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    return vocabulary_size if isinstance(vocabulary_size, int) else None
