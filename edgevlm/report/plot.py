"""Accuracy against latency and size, as an inline SVG: crisp at any size, coloured by the page's own CSS variables.

A bubble is a file at one rung: right is slower, up is more accurate, its area is the file's size. Hovering says all
of it in words; a click leads to the row of the table.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from edgevlm.artifacts import Scorecard, ScoreRow
from edgevlm.report.scorecard import REFERENCE_TARGET
from edgevlm.report.table import half_width, percent, target_name, three_digits

LABEL_PX = 7.3
"""Width of a character of a label, a little generous."""


@dataclass
class Canvas:
    """Plot area in pixels, and what already lies on it."""

    width: int
    height: int
    left: int = 46
    right: int = 14
    top: int = 14
    bottom: int = 42
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def free(self, box: tuple[float, float, float, float]) -> bool:
        """Whether a box (x1, y1, x2, y2) is inside the plot area and covers nothing."""
        x1, y1, x2, y2 = box
        if x1 < self.left or x2 > self.width - self.right or y1 < self.top or y2 > self.height - self.bottom:
            return False
        return not any(x1 < b[2] and x2 > b[0] and y1 < b[3] and y2 > b[1] for b in self.taken)


def row_id(row: ScoreRow) -> str:
    """Anchor of a row in the page's table."""
    return f"row-{row.parity.target}-{row.parity.precision}-{row.parity.rung}"


def describe(row: ScoreRow, metric_name: str) -> str:
    """A row in words."""
    parity, latency = row.parity, row.latency
    margin = half_width(row)
    return (
        f"{target_name(parity.target)} {parity.precision}, rung {parity.rung}: {three_digits(latency.p50_ms)} ms, "
        f"{metric_name} {percent(parity.metric)}{f' ± {percent(margin)}' if margin is not None else ''} %, "
        f"{three_digits(latency.size_mb)} MB"
        + ("" if parity.target == REFERENCE_TARGET else f", {parity.verdict}")
        + (", on the Pareto front" if row.pareto else "")
    )


def bubble_plot(scorecard: Scorecard, width: int, height: int, largest_px: float) -> str:
    """The plot at a natural size of `width` x `height`; empty if no row has both a time and a metric."""
    rows = [r for r in scorecard.rows if r.latency.p50_ms is not None and r.parity.metric is not None]
    if not rows:
        return ""
    canvas = Canvas(width, height)
    x, x_ticks = _x_scale([_ms(row) for row in rows], canvas)
    y, y_ticks = _y_scale([_metric(row) for row in rows], canvas)
    biggest = max(row.latency.size_mb for row in rows) or 1.0

    def radius(row: ScoreRow) -> float:
        return max(3.5, largest_px * math.sqrt(row.latency.size_mb / biggest))

    for row in rows:
        cx, cy, r = x(_ms(row)), y(_metric(row)), radius(row)
        canvas.taken.append((cx - r, cy - r, cx + r, cy + r))
    better = (canvas.left + 8.0, canvas.top + 2.0, canvas.left + 70.0, canvas.top + 20.0)
    canvas.taken.append(better)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(_spoken(scorecard, rows))}">',
        *_axes(canvas, x, x_ticks, y, y_ticks, scorecard.metric_name),
        f'<text class="hint" x="{better[0]:.0f}" y="{better[3] - 6:.0f}">↖ better</text>',
        *_front([row for row in rows if row.pareto], canvas, x, y),
        *_interval(rows, canvas, y),
        *_ladders(rows, x, y),
    ]
    # Large bubbles first, so that a small one is never buried.
    for row in sorted(rows, key=radius, reverse=True):
        parts.append(_bubble(row, x(_ms(row)), y(_metric(row)), radius(row), scorecard.metric_name))
    parts += _labels(rows, canvas, x, y, radius)
    return "".join([*parts, "</svg>"])


def _ms(row: ScoreRow) -> float:
    return row.latency.p50_ms or 0.0


def _metric(row: ScoreRow) -> float:
    return 100 * (row.parity.metric or 0.0)


def _spoken(scorecard: Scorecard, rows: Iterable[ScoreRow]) -> str:
    front = "; ".join(describe(row, scorecard.metric_name) for row in rows if row.pareto)
    return f"{scorecard.metric_name} against latency and size. Pareto front: {front or 'empty'}"


def _x_scale(times: list[float], canvas: Canvas) -> tuple[Callable[[float], float], list[float]]:
    """Logarithmic where the slowest takes over six times the fastest, from 0 otherwise."""
    low, high = min(times), max(times)
    span = canvas.width - canvas.right - canvas.left
    if low > 0 and high / low > 6:
        low, high = low / 1.35, high * 1.35
        ticks = [m * 10**e for e in range(-4, 7) for m in (1, 2, 5) if low <= m * 10**e <= high]
        return lambda v: canvas.left + span * math.log(v / low) / math.log(high / low), ticks
    high *= 1.12
    return lambda v: canvas.left + span * v / high, _ticks(0, high, 6)


def _y_scale(values: list[float], canvas: Canvas) -> tuple[Callable[[float], float], list[float]]:
    """At least four points high, so that noise is not magnified into a landscape; room for the bubbles' radii."""
    low, high = min(values), max(values)
    pad = max((high - low) * 0.22, (4 - (high - low)) / 2, 0.5)
    low, high = low - pad, high + pad
    span = canvas.height - canvas.bottom - canvas.top
    return lambda v: canvas.top + span * (high - v) / (high - low), [t for t in _ticks(low, high, 6) if 0 <= t <= 100]


def _ticks(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / about
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axes(
    canvas: Canvas,
    x: Callable[[float], float],
    x_ticks: list[float],
    y: Callable[[float], float],
    y_ticks: list[float],
    metric_name: str,
) -> list[str]:
    bottom, right = canvas.height - canvas.bottom, canvas.width - canvas.right
    parts = []
    for tick in y_ticks:
        at = y(tick)
        parts.append(f'<line class="grid" x1="{canvas.left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{canvas.left - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        at = x(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{canvas.top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>')
    middle = (canvas.top + bottom) / 2
    parts.append(f'<line class="axis" x1="{canvas.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="axis-name" x="{right}" y="{bottom + 35}" text-anchor="end">pixels to answer, median ms →</text>'
    )
    parts.append(
        f'<text class="axis-name" transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(metric_name)} % →</text>"
    )
    return parts


def _front(rows: list[ScoreRow], canvas: Canvas, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    """A staircase: what can be had at each latency."""
    if not rows:
        return []
    points = sorted((x(_ms(row)), y(_metric(row))) for row in rows)
    bottom, right = canvas.height - canvas.bottom, canvas.width - canvas.right
    path = f"M{points[0][0]:.1f} {bottom}"
    for at_x, at_y in points:
        path += f"H{at_x:.1f}V{at_y:.1f}"
    area = f'<path class="front-area" d="{path}H{right}V{bottom}Z"/>'
    for (x1, y1), (x2, y2) in pairwise([*points, (float(right), points[-1][1])]):
        canvas.taken += [(x1, y1 - 2, x2, y1 + 2), (x2 - 2, min(y1, y2), x2 + 2, max(y1, y2))]
    start = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    line = start + "".join(f"H{at_x:.1f}V{at_y:.1f}" for at_x, at_y in points[1:]) + f"H{right}"
    return [area, f'<path class="front" d="{line}"><title>Pareto front</title></path>']


def _interval(rows: list[ScoreRow], canvas: Canvas, y: Callable[[float], float]) -> list[str]:
    """A ruler as long as a typical confidence interval: differences shorter than it mean nothing."""
    widths = sorted(w for row in rows if (w := half_width(row)) is not None)
    if not widths:
        return []
    half = 100 * widths[len(widths) // 2]
    length = min(abs(y(0) - y(2 * half)), canvas.height - canvas.top - canvas.bottom - 8)
    at, low = canvas.width - canvas.right - 10, canvas.height - canvas.bottom - 8
    high = low - length
    text = f"95 % interval ± {half:.1f}"
    canvas.taken.append((at - 8 - LABEL_PX * len(text), low - 14, at + 6, low + 2))
    canvas.taken.append((at - 6, high, at + 6, low))
    return [
        f'<path class="ruler" d="M{at - 4} {low:.1f}h8M{at} {low:.1f}V{high:.1f}M{at - 4} {high:.1f}h8"/>',
        f'<text class="hint" x="{at - 10}" y="{low - 2:.1f}" text-anchor="end">{text}</text>',
    ]


def _ladders(rows: list[ScoreRow], x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    """A thin line through the rungs of each file."""
    models: dict[tuple[str, str], list[ScoreRow]] = {}
    for row in rows:
        models.setdefault((row.parity.target, row.parity.precision), []).append(row)
    parts = []
    for (target, _), members in models.items():
        points = " ".join(f"{x(_ms(row)):.1f},{y(_metric(row)):.1f}" for row in sorted(members, key=_ms))
        parts.append(f'<polyline class="ladder t-{escape(target)}" points="{points}"/>')
    return parts


def _bubble(row: ScoreRow, cx: float, cy: float, r: float, metric_name: str) -> str:
    target, precision, verdict = row.parity.target, row.parity.precision, row.parity.verdict
    classes = f"dot t-{target} {'float' if precision.startswith('fp') else 'int'} {verdict}{' pareto' * row.pareto}"
    if target == REFERENCE_TARGET:
        shape = f'<path d="M{cx:.1f} {cy - r:.1f}l{r:.1f} {r:.1f}l{-r:.1f} {r:.1f}l{-r:.1f} {-r:.1f}z"/>'
    else:
        shape = f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{r:.1f}"/>'
    title = f"<title>{escape(describe(row, metric_name))}</title>"
    return f'<a class="{escape(classes)}" href="#{escape(row_id(row))}">{title}{shape}</a>'


def _labels(
    rows: list[ScoreRow],
    canvas: Canvas,
    x: Callable[[float], float],
    y: Callable[[float], float],
    radius: Callable[[ScoreRow], float],
) -> list[str]:
    """A name per file, at whichever of its bubbles has room; front and baseline first; none where there is no room."""
    models: dict[tuple[str, str], list[ScoreRow]] = {}
    for row in sorted(rows, key=lambda r: (not r.pareto, r.parity.target != REFERENCE_TARGET, _ms(r))):
        models.setdefault((row.parity.target, row.parity.precision), []).append(row)
    parts = []
    for (target, precision), members in models.items():
        text = f"{target_name(target)} {precision}"
        wide = LABEL_PX * len(text)
        for row in members:
            cx, cy, r = x(_ms(row)), y(_metric(row)), radius(row) + 4
            starts = [
                (cx + r, cy - 8), (cx - r - wide, cy - 8), (cx - wide / 2, cy - r - 15), (cx - wide / 2, cy + r),
                (cx + r * 0.7, cy - r - 9), (cx + r * 0.7, cy + r * 0.7), (cx - r * 0.7 - wide, cy - r - 9),
            ]  # fmt: skip
            found = next((s for s in starts if canvas.free((s[0], s[1], s[0] + wide, s[1] + 15))), None)
            if found is not None:
                canvas.taken.append((found[0], found[1], found[0] + wide, found[1] + 15))
                parts.append(
                    f'<text class="label t-{escape(target)}" x="{found[0]:.1f}" y="{found[1] + 12:.1f}">{escape(text)}</text>'
                )
                break
    return parts
