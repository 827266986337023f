"""The status page: one HTML file without a network, under a policy that allows only its own script and style."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

_BLOCK = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@cache
def page() -> tuple[str, str]:
    """Return the HTML and its Content-Security-Policy."""
    html = (resources.files("halfbyte.serve") / "status_page.html").read_text(encoding="utf-8")
    sources = {kind: f"'sha256-{_hash(content)}'" for kind, content in _BLOCK.findall(html)}
    policy = (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
