"""scorecard.html: one self-contained page that works offline, on a phone and in the dark."""

from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from edgevlm.artifacts import Scorecard, ScoreRow
from edgevlm.report.plot import bubble_plot, row_id
from edgevlm.report.scorecard import REFERENCE_TARGET
from edgevlm.report.table import (
    LEGEND,
    P50,
    Column,
    columns,
    day,
    grouped_reasons,
    machine,
    percent,
    reasons,
    reproduce,
    summary,
    target_name,
    three_digits,
)

KEEPS = 0.98
"""The file the page recommends is the fastest that keeps this share of PyTorch's metric."""


@dataclass(frozen=True)
class Card:
    """A number worth a large font."""

    title: str
    value: str
    note: str
    tone: str = ""


@dataclass(frozen=True)
class Bar:
    """A bar: parts in percent of the full width, and what stands beside it."""

    name: str
    parts: tuple[float, ...]
    value: str
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class BarGroup:
    """Bars of one exported model."""

    name: str
    target: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    text: str
    sort: str
    classes: str


def render_page(scorecard: Scorecard) -> str:
    """The whole page; nothing in it refers to anything outside it."""
    environment = Environment(
        loader=PackageLoader("edgevlm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = resources.files("edgevlm.report")
    shown = columns(scorecard.metric_name)
    broken = [gate for gate in scorecard.gates if not gate.passed]
    return environment.get_template("page.html.j2").render(
        card=scorecard,
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        js=Markup((folder / "page.js").read_text(encoding="utf-8")),
        summary=summary(scorecard),
        machine=machine(scorecard),
        day=day(scorecard),
        broken=broken,
        cards=headlines(scorecard),
        wide_plot=Markup(bubble_plot(scorecard, 1000, 460, 24)),
        narrow_plot=Markup(bubble_plot(scorecard, 400, 400, 16)),
        targets=[(t, target_name(t)) for t in dict.fromkeys(row.parity.target for row in scorecard.rows)],
        stages=stage_bars(scorecard),
        majority=100 * scorecard.majority,
        groups=latency_groups(scorecard),
        columns=shown,
        rows=[
            (row_id(row), "; ".join(reasons(row)), row.pareto, [_cell(column, row) for column in shown])
            for row in scorecard.rows
        ],
        problems=grouped_reasons(scorecard),
        commands=reproduce(scorecard),
        legend=LEGEND,
        percent=percent,
        total_seconds=sum(scorecard.stage_seconds.values()),
    )


def recommended(scorecard: Scorecard) -> ScoreRow | None:
    """The fastest file of the front that keeps `KEEPS` of the full PyTorch model, or the front's most accurate."""
    front = [row for row in scorecard.rows if row.pareto]
    full = _baseline(scorecard)
    wanted = KEEPS * (full.parity.metric or 0.0) if full else 0.0
    keeping = [row for row in front if (row.parity.metric or 0.0) >= wanted]
    if keeping:
        return min(keeping, key=lambda row: row.latency.p50_ms or 0.0)
    return max(front, key=lambda row: row.parity.metric or 0.0, default=None)


def headlines(scorecard: Scorecard) -> list[Card]:
    """The numbers at the top of the page."""
    cards = []
    best, full = recommended(scorecard), _baseline(scorecard)
    if best is not None:
        name = f"{target_name(best.parity.target)} {best.parity.precision}, rung {best.parity.rung}"
        cards.append(Card("Best trade", f"{three_digits(best.latency.p50_ms)} ms", name))
        kept = f"{three_digits(best.latency.size_mb)} MB"
        if full is not None and full.parity.metric:
            kept += f", {100 * (best.parity.metric or 0) / full.parity.metric:.1f} % of PyTorch's"
        cards.append(Card(f"Its {scorecard.metric_name}", f"{percent(best.parity.metric)} %", kept))
        if full is not None and full.latency.p50_ms and best.latency.p50_ms:
            speed = full.latency.p50_ms / best.latency.p50_ms
            size = full.latency.size_mb / best.latency.size_mb if best.latency.size_mb else 0
            cards.append(Card("Against PyTorch", f"{speed:.1f}× faster", f"{size:.1f}× smaller on disk"))
    else:
        cards.append(Card("Best trade", "none", "no file passed parity with a valid time", "bad"))
    exported = [row.parity.verdict for row in scorecard.rows if row.parity.target != REFERENCE_TARGET]
    failed, unproven = exported.count("failed"), exported.count("unproven")
    note = ", ".join(f"{n} {word}" for n, word in ((failed, "failed"), (unproven, "unproven")) if n) or "all of them"
    cards.append(Card("Parity passed", f"{exported.count('passed')} of {len(exported)}", note, "bad" if failed else ""))
    return cards


def stage_bars(scorecard: Scorecard) -> list[Bar]:
    """Test metric after each training stage."""
    return [
        Bar(
            name=name,
            parts=(100 * value,),
            value=f"{percent(value)} %",
            note=f"{scorecard.stage_seconds[name]:.0f} s" if name in scorecard.stage_seconds else "",
        )
        for name, value in scorecard.training.items()
    ]


def latency_groups(scorecard: Scorecard) -> list[BarGroup]:
    """Median time of every file and rung, encoding and answering apart, on one scale."""
    rows = [row for row in scorecard.rows if row.latency.p50_ms is not None]
    slowest = max((row.latency.p50_ms or 0.0 for row in rows), default=0.0)
    groups: dict[tuple[str, str], list[Bar]] = {}
    for row in rows:
        latency = row.latency
        encode, answer = latency.encode_p50_ms or 0.0, latency.answer_p50_ms or 0.0
        bar = Bar(
            name=latency.rung,
            parts=(100 * encode / slowest, 100 * answer / slowest),
            value=three_digits(latency.p50_ms),
            title=f"encode {three_digits(encode)} ms, answer {three_digits(answer)} ms",
        )
        groups.setdefault((latency.target, latency.precision), []).append(bar)
    return [
        BarGroup(f"{target_name(target)} {precision}", target, tuple(bars))
        for (target, precision), bars in groups.items()
    ]


def _baseline(scorecard: Scorecard) -> ScoreRow | None:
    """The PyTorch row of the largest budget."""
    return next((row for row in scorecard.rows if row.parity.target == REFERENCE_TARGET), None)


def _cell(column: Column, row: ScoreRow) -> Cell:
    text, value = column.text(row), column.value(row)
    classes = ["number"] if column.number else []
    if column.title == "verdict":
        classes.append(f"verdict {text}")
    if column.title == "target":
        classes.append(f"target t-{row.parity.target}")
    if column.title == P50 and row.pareto:
        classes.append("best")
    return Cell(text, "" if value is None else str(value), " ".join(classes))
