"""docs/images/formats.svg is the picture that scripts/draw_formats.py draws of the formats as they are."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_formats", REPOSITORY / "scripts" / "draw_formats.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_current_and_shown(drawing: ModuleType) -> None:
    assert drawing.PICTURE.read_text(encoding="utf-8") == drawing.picture(), "run python scripts/draw_formats.py"
    assert "(images/formats.svg)" in (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")


def test_every_format_is_drawn_with_as_many_bits_as_it_stores(drawing: ModuleType) -> None:
    root = ElementTree.fromstring(drawing.picture())
    bars = [rect for rect in root.iter() if rect.tag.endswith("rect") and rect.get("height") == str(drawing.BAR)]
    bits = sum(float(rect.get("width", "0")) for rect in bars) / drawing.BIT
    assert bits == pytest.approx(64 * (4.5 + 4.5 + 4.25 + 4.5 + 4.5), rel=1e-3)


def test_a_scale_of_another_width_is_refused(drawing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = drawing.FORMATS[0]._replace(scale=(("scale", 16, "FP16"),))
    monkeypatch.setattr(drawing, "FORMATS", (wrong,))
    with pytest.raises(ValueError, match="nvfp4: a block scale has 8 bits"):
        drawing.picture()
