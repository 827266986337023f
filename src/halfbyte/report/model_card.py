"""The model card of a checkpoint: front matter as the hub reads it, numbers from results files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import halfbyte
from halfbyte.checkpoint.foreign import Fields
from halfbyte.evaluate.fingerprint import content_hash
from halfbyte.plan.conversion_plan import PROVENANCE
from halfbyte.plan.sealed_provenance import calibrated_errors, read_provenance
from halfbyte.report.private_paths import HUB_ID, public_command
from halfbyte.report.read import Inputs, ReportError, read_results
from halfbyte.report.results_schema import Divergence, DivergenceIntervals, NoiseFloor, Row
from halfbyte.report.source_card import inherited
from halfbyte.report.studies import Study, make_studies
from halfbyte.report.wording import between, nats, size, some, task_name
from halfbyte.source import running
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.overview import Overview, overview
from halfbyte.verify.output_folder import CARD_MARK

SKIPPED = ("aliases", "source", "name", "description", "calibration")
"""Of a recipe, what says nothing about the checkpoint, or is said elsewhere."""


@dataclass
class Card:
    """A card's text; ``missing`` says what the hub likes to know and nobody has told."""

    text: str
    missing: list[str] = field(default_factory=list)


def model_card(
    out: str | Path,
    results: Sequence[str | Path],
    *,
    base_model: str | None = None,
    source: str | None = None,
    revision: str | None = None,
    place: str | None = None,
) -> Card:
    """The card of the checkpoint in the folder ``out``.

    ``results``: files that `halfbyte evaluate` wrote; each must hold this very checkpoint (by the hash of its
    contents). ``base_model``: hub id of the source; by default what the results name, if that is one. ``source``: whose
    card states the licence (``inherited``). ``place``: the repository that commands name, by default the folder.
    ReportError where numbers are not of this checkpoint.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise ReportError(f"{out} is no folder with a checkpoint")
    checkpoint = Checkpoint.open(folder)
    facts, made = overview(checkpoint), Fields(read_provenance(folder), PROVENANCE)
    if facts.dialect is None:
        raise ReportError(f"{out} holds nothing quantized, so there is no card to write")
    measured = _measured(checkpoint, folder, results)
    base = base_model or _base(measured)
    if base is not None and not HUB_ID.fullmatch(base):
        raise ReportError(f"{base!r} is no hub id of the form owner/name")
    front_matter = inherited(folder, source, revision)
    missing = []
    if base is None:
        missing.append("base_model: the results name no hub id; give --base-model OWNER/NAME")
    if "license" not in front_matter:
        missing.append("license: no card of the source states one; give --source FOLDER_OR_HUB_ID")
    body = "\n\n".join(_body(folder, facts, made, measured, base, place or f"./{folder.resolve().name}"))
    return Card(f"---\n{_front_matter(facts, front_matter, base)}\n---\n{CARD_MARK}\n\n{body}\n", missing)


def _measured(checkpoint: Checkpoint, folder: Path, results: Sequence[str | Path]) -> list[tuple[Study, Row]]:
    fingerprint = content_hash(checkpoint)
    inputs = Inputs()
    for path in results:
        document = read_results(path)
        if not any(row.fingerprint == fingerprint for row in document.rows):
            names = some([row.name for row in document.rows])
            raise ReportError(
                f"{path} has no row for {folder} in its current state (SHA-256 {fingerprint[:16]}); it measured "
                f"{names}. Evaluate this folder, or give the results that belong to it"
            )
        inputs.results.append(document)
    studies = make_studies(inputs)
    return [(study, row) for study in studies for row in study.rows if row.fingerprint == fingerprint]


def _base(measured: list[tuple[Study, Row]]) -> str | None:
    """The source as the results name it, where that is a hub id: only the hub's have a revision."""
    sources = (study.source for study, _ in measured if study.source is not None)
    return next((s.path for s in sources if s.revision and HUB_ID.fullmatch(s.path)), None)


def _front_matter(facts: Overview, front_matter: dict[str, Any], base: str | None) -> str:
    from huggingface_hub import ModelCardData

    formats = list(dict.fromkeys(name for role in facts.roles for name in role.formats))
    data = ModelCardData(
        **front_matter,
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name=running.library_of(facts),
        tags=list(dict.fromkeys(["halfbyte", *formats, *([facts.dialect] if facts.dialect else [])])),
    )
    return data.to_yaml().strip()


def _body(
    folder: Path, facts: Overview, made: Fields, measured: list[tuple[Study, Row]], base: str | None, place: str
) -> Iterable[str]:
    recipe = made.fields("recipe")
    named = escape(made.fields("source").text("name") or "an unnamed source")
    source = f"[{base}](https://huggingface.co/{base})" if base else named
    by = f" with the recipe `{code(recipe.text('name'))}`" if recipe.text("name") else ""
    yield f"# {escape(folder.resolve().name)}"
    yield f"{source}, quantized by halfbyte{by}. {escape(recipe.text('description'))}".rstrip()
    yield "## Size"
    yield from _size(measured[0][1])
    yield "## Evaluation"
    for study, row in measured:
        yield from _evaluation(study, row)
    yield "## Use"
    yield from _use(facts, place)
    yield "## Provenance"
    yield from _provenance(made, measured)


def _size(row: Row) -> Iterable[str]:
    bits = f", {row.bits_per_weight:.3f} bits per weight" if row.bits_per_weight else ""
    parts = [
        f"vision: {'included' if row.vision else 'none'}",
        f"multi-token prediction: {'included' if row.mtp else 'none'}",
    ]
    yield f"{row.bytes or 0:,} bytes of tensors ({size(row.bytes or 0)}){bits}; {'; '.join(parts)}."
    lines = [
        (f"`{code(c.storage)}`", f"{c.parameters:,}", f"{c.bytes:,}", escape(", ".join(c.roles))) for c in row.contains
    ]
    yield table(("stored as", ">weights", ">bytes", "contents"), lines)


def _evaluation(study: Study, row: Row) -> Iterable[str]:
    source = study.source
    if row.invalid:
        yield f"**Not valid**: {escape(row.invalid)}."
        return
    lines: list[tuple[str, ...]] = []
    if row.kl is not None and row is not source:
        lines += _divergence(row.kl, row.kl_ci)
    if row.perplexity is not None:
        of_source = "" if source is None or source.perplexity is None else f"{source.perplexity:.4f}"
        lines.append(("perplexity", f"{row.perplexity:.4f}", between(row.perplexity_ci, ".4f"), of_source))
        if row.perplexity_ratio and row is not source:
            ratio = row.perplexity_ratio
            lines.append(("perplexity / the source's", f"{ratio.value:.5f}", between(ratio.ci, ".5f"), "1"))
    for name, task in row.tasks.items():
        theirs = source.tasks.get(name) if source else None
        of_source = f"{theirs.value:.2%}" if theirs else ""
        lines.append(
            (
                f"{escape(task_name(name))}, {escape(task.metric)}",
                f"{task.value:.2%}",
                between(task.ci, ".2%"),
                of_source,
            )
        )
    if not lines:
        yield "The results contain no measurement of this checkpoint except its size."
        return
    yield table(("", ">value", ">95 % interval", ">source"), lines)
    notes = [*_protocols(study, row), *_judgement(row, study.noise_floor), *_significance(study, row)]
    for document in study.results:
        versions = ", ".join(f"{name} {number}" for name, number in document.environment.versions.items())
        notes.append(f"Measured {document.created} on {document.environment.machine}: {versions}.")
    yield "\n".join(f"- {escape(note)}" for note in notes)


def _divergence(kl: Divergence, intervals: DivergenceIntervals | None) -> Iterable[tuple[str, ...]]:
    ci = intervals or DivergenceIntervals()
    yield "KL divergence from the source, mean, nats per token", nats(kl.mean), between(ci.mean), "0"
    yield "KL, median", nats(kl.median), between(ci.median), "0"
    yield "KL, 90th percentile", nats(kl.p90), between(ci.p90), "0"
    yield "KL, 99th percentile", nats(kl.p99), between(ci.p99), "0"
    yield "same most likely token as the source", f"{kl.top1:.2%}", between(ci.top1, ".2%"), "100 %"


def _protocols(study: Study, row: Row) -> Iterable[str]:
    if row.protocol:
        both = row.kl_protocol is not None and row.kl_protocol.key == row.protocol.key
        yield f"{'Perplexity and KL divergence' if both else 'Perplexity'}: {row.protocol.note}."
    if row.kl_protocol and row.kl is not None and (row.protocol is None or row.kl_protocol.key != row.protocol.key):
        yield f"KL divergence: {row.kl_protocol.note}."
    for name, task in row.tasks.items():
        yield f"{task_name(name)}: {task.questions:,} questions. {task.protocol}."
    if row.activations:
        yield f"Activations rounded to {row.activations} in the layers whose weights are quantized."


def _judgement(row: Row, floor: NoiseFloor | None) -> Iterable[str]:
    if floor is not None and floor.kl is not None:
        within = "; this checkpoint's is no larger" if row.indistinguishable.noise else ""
        yield f"Noise floor ({floor.how}): KL {nats(floor.kl.mean)}{within}."


def _significance(study: Study, row: Row) -> Iterable[str]:
    source = study.source.name if study.source else None
    for c in study.comparisons:
        if {c.a, c.b} == {source, row.name}:
            lost, won = (c.only_a, c.only_b) if c.a == source else (c.only_b, c.only_a)
            verdict = "significant" if c.significant else "not significant"
            changes = f"{lost} answers lost and {won} won against the source"
            yield f"{task_name(c.task)}: {changes}, {verdict} (McNemar, p = {c.p:.2g})."


def _use(facts: Overview, place: str) -> Iterable[str]:
    for engine, language, snippet in running.usage(facts, place):
        yield f"{engine}:\n\n```{language}\n{snippet}\n```"
    notes = running.cautions(facts)
    if notes:
        yield (
            "Known facts about engines in the named versions (about formats and families, not this checkpoint):\n\n"
            + "\n".join(f"- {escape(note, links=True)}" for note in notes)
        )


def _provenance(made: Fields, measured: list[tuple[Study, Row]]) -> Iterable[str]:
    recipe, origin = made.fields("recipe"), made.fields("source")
    lines = [f"- checkpoint: SHA-256 `{measured[0][1].fingerprint}` over weight files and config.json"]
    if origin:
        at = f" at revision `{code(origin.text('revision'))}`" if origin.text("revision") else ""
        digest = code(origin.text("fingerprint"))
        lines.append(f"- source: {escape(origin.text('name'))}{at}, fingerprint of its headers `{digest}`")
    if importance := made.fields("importance"):
        digest = code(importance.text("digest"))
        lines.append(f"- importance: {escape(importance.text('name'))}, digest `{digest}`")
    weighted = calibrated_errors(made.values).values()
    if squares := sum(energy for _, energy in weighted):
        relmse = sum(error for error, _ in weighted) / squares
        lines.append(
            f"- squared error of the outputs of {len(weighted)} calibrated weights, relative to their squares: "
            f"{relmse:.5f}, weighted by the activations of the calibration text"
        )
    if part := made.fields("rounded_with_hessian"):
        rounded, wanted = part.count("weights", 0), part.count("of", 0)
        lines.append(f"- rounded with Hessians: {rounded} of the {wanted} weights that the recipe names")
    commands = dict.fromkeys(public_command(document) for study, _ in measured for document in study.results)
    lines += [f"- measured by `{code(command)}`" for command in commands]
    lines.append(f"- card written by halfbyte {halfbyte.__version__}")
    yield "\n".join(lines)
    if recipe:
        noted = {key: value for key, value in recipe.values.items() if key not in SKIPPED and value}
        rules = recipe.objects("rules")
        noted["rules"] = [{k: v for k, v in rule.values.items() if v is not False} for rule in rules]
        text = yaml.safe_dump(noted, sort_keys=False, width=100).strip().replace("`", "'")
        yield f"The recipe recorded in `{PROVENANCE}`:\n\n```yaml\n{text}\n```"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; a column whose title begins with ">" is set to the right."""
    rule = ["---:" if title.startswith(">") else "---" for title in columns]
    lines = [[title.lstrip(">") for title in columns], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(text: str, links: bool = False) -> str:
    """Text that Markdown and HTML leave as it is: no markup, heading or list, and unless ``links`` no address."""
    line = re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", " ".join(str(text).split()))
    line = re.sub(r"^(?=[#+=!-])", r"\\", line)
    line = re.sub(r"^(\d+)(?=[.)])", r"\1\\", line)
    # an address becomes a link, and a name after @ a mention, without any markup
    return line if links else re.sub(r"(:|\bwww\.|@)(?=//|(?<!:)\S)", r"\1 ", line, flags=re.IGNORECASE)


def code(text: str) -> str:
    """Make text fit between backticks."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
