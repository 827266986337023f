"""The page without a browser: valid, self-contained, and nothing in it that a results file could run."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.report import documents
from tests.report.documents import NASTY, write

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from halfbyte.cli import main
from halfbyte.report import write_report

URL = re.compile(r"(?:https?:)?//[a-z0-9]", re.IGNORECASE)
LOADING = {"src", "srcset", "action", "formaction", "poster", "data", "background", "ping"}


class Page(HTMLParser):
    """Elements with attributes, in order, and the text of scripts and cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.elements.append((f"/{tag}", {}))

    def handle_data(self, data: str) -> None:
        at = len(self.elements) - 1
        self.texts[at] = self.texts.get(at, "") + data

    def text_of(self, tag: str, **wanted: str) -> list[str]:
        hits = [i for i, (t, a) in enumerate(self.elements) if t == tag and wanted.items() <= a.items()]
        return [self.texts.get(i, "") for i in hits]


def page_of(folder: Path, *found: dict[str, Any]) -> Path:
    files = [write(folder / f"{i}.json", document) for i, document in enumerate(found)]
    write_report(files, folder / "report.html")
    return folder / "report.html"


def unpacked(packed: str) -> str:
    return gzip.decompress(base64.b64decode(packed)).decode()


def charts_of(path: Path) -> dict[str, Any]:
    return json.loads(unpacked(Page(path).text_of("script", id="charts")[0]))


@pytest.mark.slow
def test_the_page_has_no_error_of_html(real_page: Path) -> None:
    html5lib = pytest.importorskip("html5lib")
    html5lib.HTMLParser(strict=True).parse(real_page.read_text(encoding="utf-8"))


def test_nothing_is_loaded_from_anywhere(real_page: Path) -> None:
    for tag, attributes in Page(real_page).elements:
        assert not LOADING & attributes.keys(), tag
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert (attributes.get("href") or "#").startswith("#")
    style = Page(real_page).text_of("style")[0]
    assert "url(" not in style and "@import" not in style and not URL.search(style)


def test_the_policy_allows_the_two_scripts_by_hash_and_no_connection(real_page: Path) -> None:
    page = Page(real_page)
    policy = next(a["content"] or "" for t, a in page.elements if t == "meta" and a.get("http-equiv"))
    packed = page.text_of("script", id="vega")[0]
    scripts = [page.text_of("script")[-1], unpacked(packed)]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy.startswith("default-src 'none'; script-src ") and "unsafe-eval" not in policy
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes


def test_no_inline_handler_is_used(real_page: Path) -> None:
    assert not [name for _, attributes in Page(real_page).elements for name in attributes if name.startswith("on")]


def test_ids_are_unique_and_references_resolve(real_page: Path) -> None:
    attributes = [a for _, a in Page(real_page).elements]
    ids = [a["id"] for a in attributes if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for a in attributes if "aria-labelledby" in a} <= set(ids)


def test_every_chart_has_its_place_its_data_and_a_description(real_page: Path) -> None:
    charts = charts_of(real_page)
    places = {a["id"] for _, a in Page(real_page).elements if a.get("class") == "chart"}
    assert places == charts["specs"].keys() == charts["data"].keys()
    assert {name.split("-")[1] for name in places} == {
        *("sizes", "kl", "spread", "errors", "tables", "scales"),
        *("sensitivity0", "frontier0"),
    }
    assert all(spec["description"] and charts["data"][name] for name, spec in charts["specs"].items())


@pytest.mark.parametrize("field", ["name", "recipe", "path"])
def test_text_of_a_results_file_stays_text(tmp_path: Path, field: str) -> None:
    document = documents.results()
    document["rows"][1][field] = NASTY
    document["rows"][2]["indistinguishable"]["kl"] = [document["rows"][1]["name"]]
    document["command"] = NASTY
    path = page_of(tmp_path, document)
    page = Page(path)
    assert not [a for t, a in page.elements if t == "img"]
    assert len(page.text_of("script")) == 3
    if field == "name":
        assert any(NASTY in (a.get("data-name") or "") for _, a in page.elements)
        assert any(r["checkpoint"] == NASTY for r in charts_of(path)["data"]["s1-sizes"])


def test_every_number_of_a_row_is_shown(tmp_path: Path) -> None:
    html = page_of(tmp_path, documents.results(), documents.only_tasks(documents.results(), 0.4321)).read_text()
    for text in (
        "4.00 kB",
        "0.02000",
        "0.01800 – 0.02200",
        "95.00%",
        "20.000",
        "+1.00%",
        "43.21%",
        "MMLU-Pro",
        "4,080 tokens",
    ):
        assert text in html, text


def test_marks_say_what_cannot_be_told_apart(tmp_path: Path) -> None:
    document = documents.results()
    document["rows"][1]["indistinguishable"]["kl"] = ["middle"]
    document["rows"][3]["indistinguishable"]["noise"] = True
    notes = [a["aria-label"] or "" for _, a in Page(page_of(tmp_path, document)).elements if "data-same" in a]
    assert any("small is not distinguishable from that of middle" in note for note in notes)
    assert any("large is within the noise floor" in note for note in notes)


def test_what_no_size_contains_alike_gets_a_column(tmp_path: Path) -> None:
    alike = page_of(tmp_path, documents.results()).read_text()
    document = documents.results()
    document["rows"][2]["vision"] = True
    differing = page_of(tmp_path, document).read_text()
    assert "Size contains</th>" not in alike.replace("\n", "") and "Size contains" in differing


def test_commands_and_fingerprints_are_in_the_provenance(tmp_path: Path) -> None:
    document = documents.results()
    html = page_of(tmp_path, document).read_text()
    assert document["command"] in html
    assert "halfbyte quantize base small --recipe small --dialect halfbyte" in html
    assert document["rows"][1]["fingerprint"] in html and "a CPU, 2 cores" in html


def test_a_source_alone_makes_a_page(tmp_path: Path) -> None:
    assert "base" in page_of(tmp_path, documents.results(documents.row("base", 10, None))).read_text()


def test_sensitivity_alone_makes_a_page(tmp_path: Path) -> None:
    assert charts_of(page_of(tmp_path, documents.sensitivity()))["data"].keys() == {"s1-sensitivity0"}


def test_zero_divergence_is_no_point_on_a_log_scale(tmp_path: Path) -> None:
    document = documents.results(documents.row("base", 16, None), documents.row("copy", 16, 0.01))
    document["rows"][1]["kl"] = documents.divergence(0.0)
    assert charts_of(page_of(tmp_path, document))["data"] == {}


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    assert page_of(tmp_path, documents.results()).read_bytes() == page_of(tmp_path, documents.results()).read_bytes()


def test_the_command_writes_the_page_and_names_what_it_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "results.json", documents.results())
    write(tmp_path / "other.json", {"machine": "x"})
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "out.html")]) == 0
    said = capsys.readouterr().out
    assert "other.json: no document of halfbyte" in said and (tmp_path / "out.html").is_file()


def test_a_failed_report_leaves_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none.json"), "-o", str(tmp_path / "out.html")]) == 2
    assert "does not exist" in capsys.readouterr().err and not (tmp_path / "out.html").exists()


def test_a_row_that_is_not_valid_has_no_numbers(tmp_path: Path) -> None:
    broken = documents.row("broken", 4_000, 0.0) | {"invalid": "it gives values that are not finite"}
    document = documents.results(documents.row("base", 16_000, None), broken)
    write_report([write(tmp_path / "r.json", document)], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.count('class="value"><button') >= 1 and "Not valid: it gives values that are not finite." in text
    assert "within the noise floor" not in text and ">20.000<" in text  # the source's own perplexity
    assert text.count("not valid") >= 3


def test_the_page_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    rows = [documents.row("/home/me/a/out", 16_000, None), documents.row("/home/me/b/out", 4_000, 0.02, recipe="mxfp4")]
    rows[1]["indistinguishable"]["kl"] = ["/home/me/a/out"]
    rows[1]["source"]["name"] = "/home/me/model"
    document = documents.results(*rows) | {"source": "/home/me/a/out"}
    document["command"] = "halfbyte evaluate /home/me/b/out --against /home/me/a/out"
    write_report([write(tmp_path / "r.json", document)], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "/home" not in text and "halfbyte evaluate out --against out" in text


def test_calibrated_weights_are_shown_with_the_error_that_was_made_small(tmp_path: Path) -> None:
    def errors(weighted: float | None) -> dict[str, Any]:
        common = {"parameters": 64, "relmse": 0.0143, "calibrated_relmse": weighted}
        weight = {**common, "name": "w", "role": "mlp.up", "layer": 0, "format": "nvfp4"}
        total = {**common, "bytes": 34, "bits": 4.25}
        return {"out": "o", "against": "base", "importance": None, "weights": [weight], "classes": [], "total": total}

    def page(weighted: float | None, name: str) -> tuple[str, dict[str, Any]]:
        (tmp_path / name).mkdir()
        rows = (documents.row("base", 16_000, None), documents.row("small", 4_000, 0.02, errors=errors(weighted)))
        path = page_of(tmp_path / name, documents.results(*rows))
        return path.read_text(encoding="utf-8"), charts_of(path)["data"]

    text, data = page(0.00171, "calibrated")
    assert "Weighted by activations" in text and "0.00171" in text and "Compare such checkpoints by" in text
    assert [record["weighted"] for record in data["s1-errors"]] == [0.00171]
    text, _ = page(None, "plain")
    assert "eighted by activations" not in text and "0.01430" in text
