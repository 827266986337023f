"""Tables of what loads where, from halfbyte/compatibility/engine_facts.yaml, put into docs/engines.md and README.md.

    python scripts/engine_tables.py [--check]

``--check`` writes nothing and fails where a table is not current.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from halfbyte.compatibility.engine_facts import Engine, Fact, Load, engines
from halfbyte.dialects import list_dialects
from halfbyte.formats import list_formats

REPOSITORY = Path(__file__).resolve().parent.parent
START, END = "<!-- {} of scripts/engine_tables.py -->", "<!-- end of {} -->"
# label -> patterns of formats; the first row that a format matches is its own
ROWS = {
    "NVFP4": ("nvfp4",),
    "NVFP4 without global scale": ("nvfp4_unscaled",),
    "MXFP4": ("mxfp4",),
    "MXFP4 of rotated weights": ("mxfp4_*",),
    "MixFP4": ("mixfp4",),
    "INT4 in groups": ("int4_g*",),
    "INT4 with zero points": ("int4_asym_*",),
    "FP8 per channel": ("fp8_channel",),
    "FP8 per tensor": ("fp8_tensor",),
    "FP8 in 128 × 128 blocks": ("fp8_block128",),
    "MXFP8": ("mxfp8",),
    "affine, 2 to 8 bits": ("affine*",),
    "Q4_0, IQ4_NL, Q8_0": ("q4_0", "iq4_nl_g32", "q8_0"),
    "IF4, RaZeR, HiF4, NF4": ("if4", "razer", "hif4", "nf4"),
    "others": ("*",),
}
SIGN = {"ran": "**R**", "library": "**L**", "read": "*S*"}
WORD = {"wrong": "wrong", "refuses": "not loaded", "rounds": "rounded", "needs": "needs"}


def row_of(fmt: str) -> str:
    """The label of a format's row."""
    return next(label for label, patterns in ROWS.items() if any(fnmatchcase(fmt, p) for p in patterns))


def members(label: str) -> list[str]:
    """The formats of a row."""
    return [fmt for fmt in list_formats() if row_of(fmt) == label]


def about(fact: Fact, dialect: str, formats: list[str]) -> bool:
    """Whether a fact speaks of some of these formats in a dialect."""
    named = any(fnmatchcase(fmt, pattern) for fmt in formats for pattern in fact.formats)
    return named and (not fact.dialects or dialect in fact.dialects)


def loads_of(engine: Engine, label: str) -> list[Load]:
    """What is known of the formats of a row, a load for each dialect that can spell them."""
    found: list[Load] = []
    for dialect in dict.fromkeys(load.dialect for load in engine.loads):
        spelled = [fmt for fmt in members(label) if fmt in HELD[dialect]]
        entries = [load for fmt in spelled if (load := engine.load(dialect, fmt))]
        found += list(dict.fromkeys(entries))
    return found


def table() -> Iterator[str]:
    """Formats by engines, and notes."""
    names = [
        " ".join((engine.name if engine.name != "halfbyte" else "`halfbyte.load`", short(engine))).strip()
        for engine in engines()
    ]
    yield "| format | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    notes: dict[str, int] = {}
    for label in ROWS:
        cells = []
        for engine in engines():
            parts = []
            for load in loads_of(engine, label):
                text = SIGN[load.known] if engine.name == "halfbyte" else f"{SIGN[load.known]} {load.dialect}"
                where = [f"{engine.name}, {load.dialect}: {load.where}."] if load.where else []
                parts.append(text + marks(engine, load.dialect, label, notes, where))
            for dialect in refused(engine, label):
                parts.append(f"no {dialect}{marks(engine, dialect, label, notes, [])}")
            cells.append("; ".join(dict.fromkeys(parts)) or "–")
        yield f"| {label} | " + " | ".join(cells) + " |"
    yield ""
    for text, number in notes.items():
        yield f"{number}. {text}"


def refused(engine: Engine, label: str) -> list[str]:
    """Dialects in which an engine is known to fail on a row's formats, and of which nothing better is known."""
    known = {load.dialect for load in loads_of(engine, label)}
    return [
        dialect
        for dialect, held in HELD.items()
        if dialect not in known and (mine := [f for f in members(label) if f in held])
        for fact in engine.facts
        if fact.effect in ("refuses", "wrong") and about(fact, dialect, mine)
    ]


def marks(engine: Engine, dialect: str, label: str, notes: dict[str, int], more: list[str]) -> str:
    """References to notes; new ones get a number."""
    formats = [fmt for fmt in members(label) if fmt in HELD[dialect]]
    facts = [fact for fact in engine.facts if fact.effect != "loses" and about(fact, dialect, formats)]
    found = [notes.setdefault(text, len(notes) + 1) for text in (*more, *(note(engine, fact) for fact in facts))]
    return f"<sup>{', '.join(map(str, sorted(set(found))))}</sup>" if found else ""


def note(engine: Engine, fact: Fact) -> str:
    """A fact as a sentence."""
    where = " on a CPU" if fact.hardware else ""
    which = f" ({', '.join(fact.roles)})" if fact.roles else ""
    link = f" ([{fact.link}](https://github.com/{fact.link.replace('#', '/issues/')}))" if fact.link else ""
    how = "" if fact.known == "ran" else "; read in its source"
    return f"{engine.name}{where}, {' and '.join(fact.dialects)}{which}: {WORD[fact.effect]}: {fact.what}{how}{link}."


def dropped() -> Iterator[str]:
    """What engines leave out, and dialects that they do not take at all."""
    yield "| engine | leaves out | does not load |"
    yield "|---|---|---|"
    for engine in engines():
        lost = [
            fact.what + (f" ({fact.hardware})" if fact.hardware else "")
            for fact in engine.facts
            if fact.effect == "loses"
        ]
        whole = [
            f"{' and '.join(fact.dialects)}{' of ' + ', '.join(fact.families) if fact.families else ''}: {fact.what}"
            for fact in engine.facts
            if fact.effect == "refuses" and not fact.formats
        ]
        yield f"| {engine.name} | {'; '.join(lost) or '–'} | {'; '.join(whole) or '–'} |"


def summary() -> Iterator[str]:
    """For the README: a line per engine and dialect."""
    yield "| engine | `--dialect` | formats |"
    yield "|---|---|---|"
    for engine in engines():
        if engine.name == "halfbyte":
            continue
        for dialect in dict.fromkeys(load.dialect for load in engine.loads):
            said: dict[str, list[str]] = {}
            for label in ROWS:
                for load in loads_of(engine, label):
                    # what has to stand beside it is said for the dialect as a whole
                    if load.dialect == dialect:
                        limit = f" ({load.where})" if load.where == "dense models" else ""
                        said.setdefault(SIGN[load.known], []).append(label + limit)
            cells = "; ".join(f"{sign} {every(labels, dialect)}" for sign, labels in said.items())
            yield f"| {' '.join(filter(None, (engine.name, short(engine))))} | {dialect} | {cells} |"


def every(labels: list[str], dialect: str) -> str:
    """Labels of rows, or those of a dialect's rows that are not among them."""
    held = [label for label in ROWS if set(members(label)) & HELD[dialect]]
    missing = [label for label in held if label not in labels]
    if len(missing) >= len(labels) or len(held) < 5 or not set(labels) <= set(held):
        return ", ".join(labels)
    return f"all but {', '.join(missing)}" if missing else "all its formats"


def short(engine: Engine) -> str:
    """The engine's own version."""
    return engine.version.split(" ")[0]


def _held() -> dict[str, set[str]]:
    """By dialect, the formats of which it can spell some weight."""
    from halfbyte.formats import get_format
    from halfbyte.models import Piece, Weight

    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (256, 256),
        "model.layers.0.mlp.experts.gate_up_proj": (2, 256, 256),
    }
    weights = [
        Weight(
            name,
            "attention.q" if len(s) == 2 else "experts.gate_up",
            0,
            s,
            "BF16",
            (Piece(name),),
            interleaved=len(s) == 3,
        )
        for name, s in shapes.items()
    ]
    return {
        d.name: {f for f in list_formats() if any(d.spelling.problem(w, get_format(f)) is None for w in weights)}
        for d in list_dialects()
    }


HELD = _held()
PLACES = {
    "docs/engines.md": {"table of formats": table, "table of engines": dropped},
    "README.md": {"summary of engines": summary},
}


def current(path: str, text: str) -> str:
    """A file's text with the tables as they are now."""
    for name, lines in PLACES[path].items():
        start, end = START.format(name), END.format(name)
        before, _, rest = text.partition(start)
        if not rest or end not in rest:
            raise SystemExit(f"{path} has no markers for the {name}")
        text = f"{before}{start}\n\n" + "\n".join(lines()) + f"\n\n{end}" + rest.partition(end)[2]
    return text


def main() -> int:
    """Write the tables, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is not current")
    args = parser.parse_args()
    stale = []
    for path in PLACES:
        file = REPOSITORY / path
        text = file.read_text(encoding="utf-8")
        new = current(path, text)
        if new != text:
            stale.append(path)
            if not args.check:
                file.write_text(new, encoding="utf-8")
    if stale:
        print(("not current: " if args.check else "written: ") + ", ".join(stale))
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
