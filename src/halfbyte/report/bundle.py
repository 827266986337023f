"""The plotting library as one script inside the page, and what the page may run."""

from __future__ import annotations

import base64
import gzip
import hashlib
from functools import cache
from typing import NamedTuple

from halfbyte.errors import HalfbyteError


class Script(NamedTuple):
    """JavaScript, packed for the page (gzip, base64), and the hash by which the page's policy allows it."""

    packed: str
    sha256: str


def need_charts() -> None:
    """HalfbyteError with the install command where the extra is missing."""
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise HalfbyteError(f"reports need more packages ({error}); pip install 'halfbyte[report]'") from error


@cache
def vega() -> Script:
    """Vega, Vega-Lite and Vega-Embed in the version that Altair writes, as the global ``vegaEmbed``."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    code = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    # in a function, so that its hundreds of short names stay out of the page
    script = f"(() => {{{code}\n}})();"
    return Script(pack(script), sha256(script))


def pack(text: str) -> str:
    """gzip in base64, which the page unpacks."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def sha256(text: str) -> str:
    """A hash as Content Security Policy spells it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def policy(*scripts: str) -> str:
    """A policy under which the page runs scripts with these hashes, without ``eval``, and loads nothing at all."""
    allowed = " ".join(f"'{script}'" for script in scripts)
    rest = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}"
