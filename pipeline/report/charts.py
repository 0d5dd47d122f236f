"""A report's charts as SVG: made of numbers only, coloured by the page's style sheet, described for those who cannot see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from pipeline.report.tables import STEPS_PER_THRESHOLD, TOP_BUCKET

WIDTH, HEIGHT = 240, 90
LEFT, BOTTOM = 4, 14
"""Margins for what is written beside the axes."""

BINS = 30
"""Of severity, from 0 to 3 thresholds."""


def severity_chart(counts: Mapping[int, int], normal_counts: Mapping[int, int]) -> Markup:
    """Photographs by severity as bars, and over them those of the threshold as a line, each as shares of their own."""
    night, normal = _binned(counts), _binned(normal_counts)
    top = max([*night, *normal, 1e-9])
    step = (WIDTH - 2 * LEFT) / len(night)
    bars = "".join(
        f'<rect class="bar" x="{LEFT + i * step:.1f}" y="{_y(share / top):.1f}" width="{step * 0.86:.1f}" '
        f'height="{_y(0) - _y(share / top):.1f}"/>'
        for i, share in enumerate(night)
        if share
    )
    steps = "".join(
        f"H{LEFT + i * step:.1f}V{_y(share / top):.1f}H{LEFT + (i + 1) * step:.1f}" for i, share in enumerate(normal)
    )
    line = f'<path class="normal" d="M{LEFT} {_y(0):.1f}{steps}V{_y(0):.1f}"/>' if any(normal) else ""
    at = _severity_x(1)
    # The page's script moves it: from where severity is 0, so far for each threshold.
    threshold = (
        f'<line class="threshold" data-zero="{_severity_x(0):.1f}" data-one="{at - _severity_x(0):.1f}" '
        f'x1="{at:.1f}" x2="{at:.1f}" y1="2" y2="{_y(0):.1f}"/>'
    )
    labels = "".join(
        f'<text x="{_severity_x(value):.1f}" y="{HEIGHT - 3}" text-anchor="{anchor}">{text}</text>'
        for value, anchor, text in ((0, "start", "0"), (1, "middle", "1"), (2, "middle", "2"), (3, "end", "3+"))
    )
    return _svg(
        "Share of photographs by score in units of the threshold; bars: these nights, line: normal photographs of calibration",
        bars + line + threshold + labels,
    )


def trend_chart(nights: Sequence[Mapping[str, Any]]) -> Markup:
    """Percent of anomalous photographs, night by night: rows with night, anomalous_percent, anomalous and images."""
    nights = [row for row in nights if row["images"]]
    top = max([row["anomalous_percent"] for row in nights] + [1.0])
    step = (WIDTH - 12) / max(len(nights) - 1, 1)
    points = [(6 + i * step, _y(row["anomalous_percent"] / top)) for i, row in enumerate(nights)]
    line = f'<polyline class="trend" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'
    dots = "".join(
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(row["night"])}: '
        f"{row['anomalous']} of {row['images']} anomalous</title></circle>"
        for (x, y), row in zip(points, nights, strict=True)
    )
    ends = [(6, "start", nights[0]["night"]), (WIDTH - 6, "end", nights[-1]["night"])] if len(nights) > 1 else []
    labels = "".join(
        f'<text x="{x}" y="{HEIGHT - 3}" text-anchor="{anchor}">{escape(night)}</text>' for x, anchor, night in ends
    )
    labels += f'<text x="6" y="9">anomalous, up to {top:.1f} %</text>'
    return _svg("Percent of photographs that are anomalous, night by night", line + dots + labels)


def curves_chart(fpr: Sequence[float], tpr: Sequence[float], pro: Sequence[float]) -> Markup:
    """The pixel ROC and PRO curves over the false-positive rate."""
    drawn = ""
    for name, values in (("roc", tpr), ("pro", pro)):
        points = " ".join(f"{LEFT + x * (WIDTH - 2 * LEFT):.1f},{_y(y):.1f}" for x, y in zip(fpr, values, strict=True))
        drawn += f'<polyline class="{name}" points="{points}"/>'
    labels = f'<text x="{LEFT}" y="{HEIGHT - 3}">0</text><text x="{WIDTH - LEFT}" y="{HEIGHT - 3}" text-anchor="end">'
    labels += 'false-positive rate 1</text><text class="roc-text" x="120" y="40">ROC</text>'
    labels += '<text class="pro-text" x="120" y="54">PRO (dashed)</text>'
    return _svg("Pixel ROC and PRO curves over the false-positive rate", drawn + labels)


def _binned(counts: Mapping[int, int]) -> list[float]:
    """Shares in BINS bins; what is above the last joins it."""
    bins = [0.0] * BINS
    per_bin = (TOP_BUCKET - 1) // BINS
    for bucket, images in counts.items():
        bins[min(max(bucket - 1, 0) // per_bin, BINS - 1)] += images
    total = sum(bins)
    return [count / total for count in bins] if total else bins


def _severity_x(severity: float) -> float:
    return LEFT + severity * STEPS_PER_THRESHOLD / (TOP_BUCKET - 1) * (WIDTH - 2 * LEFT)


def _y(share: float) -> float:
    return (HEIGHT - BOTTOM) - share * (HEIGHT - BOTTOM - 10)


def _svg(description: str, content: str) -> Markup:
    axis = f'<line class="axis" x1="{LEFT}" x2="{WIDTH - LEFT}" y1="{_y(0):.1f}" y2="{_y(0):.1f}"/>'
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{description}</title>{axis}{content}</svg>'
    )
