"""An audit as one HTML page that needs nothing else."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, StrictUndefined

import halfbyte
from halfbyte.audit.finding import ORDER
from halfbyte.audit.run_audit import Audit

WORDS = {"wrong": "Wrong", "missing": "Missing", "poor": "Poor", "note": "Notes"}
_SHOWN = 40


def page(audit: Audit) -> str:
    """Render the page; needs the extra ``report`` (jinja2). Everything from a checkpoint is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    weights = sorted(audit.compared, key=lambda w: -w.worse_db)
    return environment.from_string(_asset("audit.html.jinja")).render(
        audit=audit,
        summary=audit.overview,
        sections=[(WORDS[kind], [f for f in audit.findings if f.severity == kind]) for kind in ORDER],
        weights=weights[:_SHOWN],
        more=max(0, len(weights) - _SHOWN),
        shown=12,
        style=_asset("audit.css"),
        version=halfbyte.__version__,
    )


def _asset(name: str) -> str:
    return resources.files("halfbyte.audit").joinpath("assets").joinpath(name).read_text(encoding="utf-8")
