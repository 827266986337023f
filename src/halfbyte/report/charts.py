"""Charts as Vega-Lite specifications, made with Altair.

Colours are CSS variables of the page, so that charts follow its theme and print in the light one without being drawn
again; only continuous scales have colours of their own (viridis,
cividis: readable without colour vision, and on light and dark).
Data have names; the page holds them once. ``CHECKPOINT`` and ``TABLE`` are parameters that the page's menus set.
"""

from __future__ import annotations

import math
from typing import Any

import altair as alt

CHECKPOINT, TABLE = "checkpoint_shown", "table_shown"
INK, MUTED, LINE, ACCENT, SECOND = "var(--ink)", "var(--muted)", "var(--line)", "var(--accent)", "var(--second)"
ROW = 22
"""Height of a row of a chart with names on its left, in pixels."""

Spec = dict[str, Any]
Ends = tuple[float, float]
"""The least and the largest value of what an axis or a colour shows."""


def sizes(data: str, ends: Ends, floor: float | None) -> Spec:
    """Bytes against divergence, with intervals and the frontier."""
    x = alt.X("bytes:Q", title="Size of all tensors", scale=alt.Scale(zero=False, padding=64), axis=_bytes_axis())
    y = alt.Y("kl:Q", title="KL divergence, nats per token", scale=_log(14), axis=_log_axis(ends))
    tooltip = [
        _tip("checkpoint:N", "checkpoint"),
        _tip("bytes:Q", "bytes", ","),
        _tip("bits:Q", "bits per weight", ".3f"),
        _tip("kl:Q", "KL mean", ".3g"),
        _tip("low:Q", "95 % from", ".3g"),
        _tip("high:Q", "to", ".3g"),
        _tip("top1:Q", "same top-1", ".2%"),
    ]
    base = alt.Chart(alt.NamedData(data)).encode(x=x, y=y)
    best = base.transform_filter("datum.frontier")
    line = best.mark_line(interpolate="step-after", color=ACCENT, strokeWidth=1.5, opacity=0.7).encode(order="bytes:Q")
    bars = base.transform_filter("isValid(datum.low) && datum.low > 0").mark_rule(color=MUTED, opacity=0.55)
    bars = bars.encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    colour = alt.condition("datum.frontier", alt.value(ACCENT), alt.value(MUTED))
    points = base.mark_point(filled=True, size=70, opacity=1).encode(color=colour, tooltip=tooltip)
    # below and to the left of the frontier there is nothing else
    label = {"align": "right", "baseline": "top", "dx": -5, "dy": 4, "fontSize": 11, "fontWeight": 500, "limit": 140}
    names = best.mark_text(**label).encode(text="checkpoint:N", color=alt.value(ACCENT))
    layers: list[Any] = [line, bars, points, names]
    if floor:
        line = alt.Chart(alt.InlineData([{"floor": floor}])).mark_rule(strokeDash=[4, 4], color=MUTED)
        layers.insert(0, line.encode(y="floor:Q"))
    return _finish(alt.layer(*layers), 380, "Size of each checkpoint against its KL divergence from the source")


def percentiles(data: str, ends: Ends, count: int) -> Spec:
    """Median, mean, 90th and 99th percentile of the divergence per token."""
    order = alt.SortField("order")
    y = alt.Y("checkpoint:N", title=None, sort=order, axis=alt.Axis(grid=True, labelLimit=_room(190)))
    x = alt.X("kl:Q", title="KL divergence of a token, nats", scale=_log(10), axis=_log_axis(ends))
    base = alt.Chart(alt.NamedData(data)).encode(y=y)
    reach = base.mark_rule(color=LINE, strokeWidth=2).encode(x=alt.X("min(kl):Q"), x2="max(kl):Q")
    kinds = ["median", "mean", "90th percentile", "99th percentile"]
    colours = alt.Scale(domain=kinds, range=[INK, ACCENT, MUTED, SECOND])
    shapes = alt.Scale(domain=kinds, range=["circle", "diamond", "triangle-right", "square"])
    points = base.mark_point(filled=True, size=60, opacity=1).encode(
        x=x,
        color=alt.Color("statistic:N", scale=colours, legend=_legend()),
        shape=alt.Shape("statistic:N", scale=shapes, legend=_legend()),
        tooltip=[_tip("checkpoint:N", "checkpoint"), _tip("statistic:N", "statistic"), _tip("kl:Q", "nats", ".3g")],
    )
    return _finish(alt.layer(reach, points), ROW * count, "Percentiles of the KL divergence per token, by checkpoint")


def spread(data: str, ends: Ends, count: int) -> Spec:
    """relMSE of all weights, a tick each."""
    y = alt.Y(
        "checkpoint:N",
        title=None,
        sort=alt.EncodingSortField("relmse", op="mean"),
        axis=alt.Axis(grid=True, labelLimit=_room(190)),
    )
    x = alt.X("relmse:Q", title="Relative squared error of a weight", scale=_log(10), axis=_log_axis(ends))
    chart = alt.Chart(alt.NamedData(data)).mark_tick(color=ACCENT, thickness=2, height=12, opacity=0.55)
    chart = chart.encode(x=x, y=y, tooltip=[_tip("checkpoint:N", "checkpoint"), *_cell_tips()])
    return _finish(chart, ROW * count, "Relative squared error of every weight, by checkpoint")


def heat_map(data: str, roles: int) -> Spec:
    """relMSE by layer and role of the checkpoint that is shown, whose errors the colours span."""
    scale = alt.Scale(type="log", scheme="viridis", nice=False)
    colour = alt.Color("relmse:Q", title="relative squared error", scale=scale, legend=_gradient(".3~g"))
    chart = _map(data, [CHECKPOINT], alt.Chart(alt.NamedData(data)).mark_rect(), colour, _cell_tips())
    return _finish(chart, ROW * roles, "Relative squared error by layer and role")


def block_types(data: str, ends: Ends, roles: int) -> Spec:
    """Share of blocks that chose a table, by layer and role."""
    scale = alt.Scale(scheme="cividis", domain=list(ends))
    colour = alt.Color("share:Q", title="share of blocks", scale=scale, legend=_gradient(".0%"))
    tips = [
        _tip("role:N", "role"),
        _tip("layer:N", "layer"),
        _tip("table:N", "table"),
        _tip("share:Q", "blocks", ".1%"),
    ]
    chart = _map(data, [CHECKPOINT, TABLE], alt.Chart(alt.NamedData(data)).mark_rect(), colour, tips)
    return _finish(chart, ROW * roles, "Share of blocks by codebook, layer and role")


def scales(data: str) -> Spec:
    """Histogram of block scales of the checkpoint that is shown."""
    x = alt.X(
        "scale:Q",
        title="Stored block scale",
        scale=alt.Scale(type="log", base=2, nice=False),
        axis=alt.Axis(grid=False, format=".3~r", labelOverlap=True, tickCount=8),
    )
    y = alt.Y("share:Q", title="Share of blocks", axis=alt.Axis(format=".0%"))
    tips = [_tip("format:N", "format"), _tip("scale:Q", "scale", ".4~g")]
    colours = ["var(--accent)", "var(--second)", "var(--third)", "var(--muted)"]
    chart = _shown(alt.Chart(alt.NamedData(data)), CHECKPOINT).transform_calculate(ground="0")
    chart = chart.mark_rect(opacity=0.75, stroke="var(--paper)", strokeWidth=0.5)
    chart = chart.encode(
        x=x,
        x2="end:Q",
        y=y,
        y2="ground:Q",
        color=alt.Color("format:N", title=None, scale=alt.Scale(range=colours), legend=_legend()),
        tooltip=[*tips, _tip("share:Q", "blocks", ".2%"), _tip("zero:Q", "zero scales", ".2%")],
    )
    return _finish(chart, 240, "Distribution of stored block scales")


def sensitivity(data: str, count: int) -> Spec:
    """Divergence that each group causes alone."""
    y = alt.Y("group:N", title=None, sort="-x", axis=alt.Axis(labelLimit=_room(240)))
    x = alt.X(
        "kl:Q",
        title="KL divergence, nats per token",
        axis=alt.Axis(format="~g", tickCount=5),
    )
    tips = [
        _tip("name:N", "group"),
        _tip("roles:N", "roles"),
        _tip("format:N", "format"),
        _tip("kl:Q", "KL mean", ".3g"),
    ]
    tips += [_tip("saved:Q", "bytes saved", ","), _tip("relmse:Q", "relative squared error", ".3g")]
    chart = alt.Chart(alt.NamedData(data)).mark_bar(color=ACCENT, cornerRadiusEnd=1).encode(x=x, y=y, tooltip=tips)
    return _finish(chart, ROW * count, "KL divergence by group of weights")


def frontier(data: str, ends: Ends) -> Spec:
    """Predicted loss by size, and what was chosen."""
    x = alt.X("bytes:Q", title="Size of all tensors", scale=alt.Scale(zero=False, padding=12), axis=_bytes_axis())
    y = alt.Y("loss:Q", title="Predicted loss", scale=_log(10), axis=_log_axis(ends))
    tips = [_tip("bytes:Q", "bytes", ","), _tip("loss:Q", "predicted loss", ".3g")]
    base = alt.Chart(alt.NamedData(data)).encode(x=x, y=y, tooltip=tips)
    line = base.transform_filter("!datum.chosen").mark_line(
        color=ACCENT, point=alt.OverlayMarkDef(color=ACCENT, size=20)
    )
    chosen = base.transform_filter("datum.chosen").mark_point(size=160, color=SECOND, strokeWidth=2.5)
    return _finish(alt.layer(line, chosen), 280, "Predicted loss against size")


def _map(data: str, parameters: list[str], chart: Any, colour: Any, tips: list[alt.Tooltip]) -> Any:
    layer = alt.X(
        "layer:O",
        title="Layer",
        sort=alt.EncodingSortField("at", op="min"),
        axis=alt.Axis(labelAngle=0, labelOverlap=True),
    )
    role = alt.Y("role:N", title=None, sort=None, axis=alt.Axis(labelLimit=_room(190)))
    return (
        _shown(chart, *parameters)
        .transform_calculate(at="datum.layer == '–' ? -1 : toNumber(datum.layer)")
        .encode(x=layer, y=role, color=colour, tooltip=tips)
    )


def _shown(chart: Any, *parameters: str) -> Any:
    """Only the rows of what the page's menus say."""
    fields = {CHECKPOINT: "checkpoint", TABLE: "table"}
    for name in parameters:
        chart = chart.add_params(alt.param(name=name, value="")).transform_filter(f"datum.{fields[name]} == {name}")
    return chart


def _finish(chart: Any, height: int, description: str) -> Spec:
    spec: Spec = chart.properties(width="container", height=height, description=description).to_dict()
    spec.pop("$schema")
    spec["config"] = CONFIG
    return spec


def _cell_tips() -> list[alt.Tooltip]:
    names = (("role:N", "role", None), ("layer:N", "layer", None), ("formats:N", "format", None))
    errors = (("relmse:Q", "relative squared error", ".3g"), ("weighted:Q", "weighted by activations", ".3g"))
    numbers = (("weights:Q", "weights", ","), *errors)
    return [_tip(*entry) for entry in (*names, *numbers)]


def _tip(field: str, title: str, form: str | None = None) -> alt.Tooltip:
    return alt.Tooltip(field, title=title, **({"format": form} if form else {}))


def _legend() -> alt.Legend:
    return alt.Legend(
        orient="top", title=None, direction="horizontal", columns=alt.ExprRef("containerSize()[0] < 420 ? 2 : 4")
    )


def _gradient(form: str) -> alt.Legend:
    bar = {"gradientLength": 200, "gradientThickness": 8, "tickCount": 3}
    return alt.Legend(orient="top", direction="horizontal", format=form, labelOverlap="greedy", **bar)


def _room(pixels: int) -> Any:
    """Space for names on the left, less of it on a phone."""
    return alt.ExprRef(f"containerSize()[0] < 420 ? {pixels * 2 // 3} : {pixels}")


def log_ticks(ends: Ends) -> list[float]:
    """1, 2, 5, 10, ... between two positive numbers; powers of ten alone where these are many."""
    low, high = (math.log10(end) for end in ends)
    steps = (1, 2, 5) if high - low < 1.7 else (1,)
    ticks = [float(f"{step}e{power}") for power in range(math.floor(low) - 1, math.ceil(high) + 1) for step in steps]
    return [tick for tick in ticks if ends[0] / 1.5 <= tick <= ends[1] * 1.5]


def _log(padding: int) -> alt.Scale:
    return alt.Scale(type="log", nice=False, padding=padding)


def _log_axis(ends: Ends) -> alt.Axis:
    return alt.Axis(values=log_ticks(ends), format="~g", labelOverlap=True)


def _bytes_axis() -> alt.Axis:
    return alt.Axis(
        format="~s",
        grid=False,
        tickCount=6,
        labelExpr="replace(format(datum.value, '~s'), regexp('([a-zA-Z])'), ' $1') + 'B'",
    )


_FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CONFIG: Spec = {
    "background": None,
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": MUTED,
        "titleColor": INK,
        "titleFontWeight": 500,
        "titleFontSize": 12,
        "titlePadding": 10,
        "labelFontSize": 11,
        "gridColor": LINE,
        "domainColor": LINE,
        "tickColor": LINE,
    },
    "axisY": {"domain": False, "ticks": False, "labelPadding": 8},
    "legend": {
        "labelColor": MUTED,
        "titleColor": INK,
        "titleFontWeight": 500,
        "titleFontSize": 12,
        "labelFontSize": 11,
        "symbolSize": 60,
    },
    "text": {"font": _FONT},
}
