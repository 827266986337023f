"""Reports and model cards from results files (docs/report.md). Numbers come from those files alone."""

from __future__ import annotations

from halfbyte.report.page import render, write_report
from halfbyte.report.read import ReportError, read_inputs
from halfbyte.report.studies import make_studies

__all__ = ["ReportError", "make_studies", "read_inputs", "render", "write_report"]
