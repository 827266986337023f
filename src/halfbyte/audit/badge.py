"""A badge for a model page: what an audit said, as one small SVG without any script or font file."""

from __future__ import annotations

from html import escape

from halfbyte.audit.run_audit import Audit

_COLOURS = {"sound": "#0d7a5f", "poor": "#9a6700", "incomplete": "#b8500f", "broken": "#b3261e"}
# of the common sans-serif fonts at 11 px, on average
_WIDTH = 6.6


def badge(audit: Audit) -> str:
    """The verdict of an audit as an SVG image of 20 px height."""
    word, _, rest = audit.verdict.partition(": ")
    label, value = "halfbyte audit", f"{word} · {rest.partition(',')[0]}" if audit.overview else word
    left, right = round(len(label) * _WIDTH) + 12, round(len(value) * _WIDTH) + 12
    text = 'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" fill="#fff" text-anchor="middle"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{escape(f"{label}: {value}")}"><title>{escape(audit.verdict)}</title>'
        f'<rect width="{left + right}" height="20" rx="3" fill="#3b3f46"/>'
        f'<path d="M{left} 0h{right - 3}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3h-{right - 3}z" fill="{_COLOURS[word]}"/>'
        f'<g {text}><text x="{left / 2:.0f}" y="14">{escape(label)}</text>'
        f'<text x="{left + right / 2:.0f}" y="14">{escape(value)}</text></g></svg>\n'
    )
