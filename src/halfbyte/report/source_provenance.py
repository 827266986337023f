"""Where the numbers of a study come from, and how to get them again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

from halfbyte.report.private_paths import last_part, public_command
from halfbyte.report.studies import Study


@dataclass
class Provenance:
    """Runs (when, machine, versions, command), checkpoints (name, fingerprint, made from) and commands."""

    runs: list[dict[str, str]] = field(default_factory=list)
    checkpoints: list[dict[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


def provenance(study: Study) -> Provenance:
    """What the results files say; nothing is added."""
    result = Provenance()
    for document in study.results:
        machine = document.environment
        cores = f", {machine.cores} cores" if machine.cores else ""
        result.runs.append(
            {
                "created": document.created,
                "machine": f"{machine.machine}{cores}",
                "device": machine.device,
                "versions": ", ".join(f"{name} {number}" for name, number in machine.versions.items()),
                "command": public_command(document),
            }
        )
    for row in study.rows:
        made = row.source
        result.checkpoints.append(
            {
                "name": row.label,
                "fingerprint": row.fingerprint or "",
                "revision": row.revision or "",
                "recipe": row.recipe or "",
                "dialect": row.dialect or "",
                "source": " at ".join(part for part in (last_part(made.name), made.revision) if part) if made else "",
                "source_fingerprint": (made.fingerprint or "") if made else "",
                "dtype": row.dtype or "",
            }
        )
        if made and row.recipe and row.dialect:
            words = [
                "halfbyte",
                "quantize",
                last_part(made.name),
                row.name,
                "--recipe",
                row.recipe,
                "--dialect",
                row.dialect,
            ]
            result.commands.append(shlex.join([*words, *(["--revision", made.revision] if made.revision else [])]))
    result.commands = list(dict.fromkeys([*result.commands, *(run["command"] for run in result.runs)]))
    return result
