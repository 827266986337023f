"""The badge of an audit."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from tests.audit.faulty import audited, without

from halfbyte.audit.badge import badge
from halfbyte.audit.run_audit import audit


def test_the_badge_is_an_image_with_the_verdict_as_its_title(good: Path, tmp_path: Path) -> None:
    sound, broken = badge(audit(good)), badge(audited(good, tmp_path / "out", without("mtp.")))
    assert ElementTree.fromstring(sound)[0].text == audit(good).verdict
    assert "sound · nvfp4" in sound and "incomplete · nvfp4" in broken and "#0d7a5f" in sound
