"""The page and the badge of an audit."""

from __future__ import annotations

from pathlib import Path

import html5lib
from tests.audit.faulty import audited, nothing, scaled, without

from halfbyte.audit.audit_page import page
from halfbyte.audit.badge import badge


def test_the_page_is_valid_html_and_loads_nothing(good: Path, source: Path, tmp_path: Path) -> None:
    result = audited(good, tmp_path / "out", scaled("k_proj.weight_global_scale", 2), against=source)
    text = page(result)
    html5lib.HTMLParser(strict=True).parse(text)
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text
    assert ("different global scales" in text and "+0.0 dB" in text) or " dB" in text


def test_names_of_a_strangers_checkpoint_are_no_markup(good: Path, tmp_path: Path) -> None:
    result = audited(good, tmp_path / "<b>out", without("mtp."))
    assert "<b>out" not in page(result) and "&lt;b&gt;out" in page(result)
    assert "<b>" not in badge(result)


def test_a_checkpoint_that_cannot_be_read_has_a_page_too(good: Path, tmp_path: Path) -> None:
    def strange(config: dict[str, dict[str, str]]) -> None:
        config["quantization_config"]["sparsity_config"] = {"format": "sparse"}  # type: ignore[assignment]

    result = audited(good, tmp_path / "out", nothing, config=strange)
    html5lib.HTMLParser(strict=True).parse(page(result))
    assert ">broken<" in badge(result) or "broken" in badge(result)
