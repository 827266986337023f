"""Pages of real and of small results."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.report import documents


@pytest.fixture(scope="session")
def real_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 21 checkpoints of a small model, as the benchmark measured them, with everything else there is."""
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    from halfbyte.report import write_report

    folder = tmp_path_factory.mktemp("report")
    files = [
        documents.write(folder / "results.json", documents.real()),
        documents.write(folder / "sensitivity.json", documents.sensitivity("qwen3-tiny-wiki")),
        documents.write(folder / "allocation.json", documents.allocation("mixfp4")),
    ]
    page = folder / "report.html"
    write_report(files, page)
    return page
