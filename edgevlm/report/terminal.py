"""Reports as tables in a terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgevlm.artifacts import DeviceReport, LatencyRow, ParityReport, ParityRow, Scorecard, ScoreRow
from edgevlm.report.table import P50, Column, columns, grouped_reasons, machine, percent, summary

WIDE = 130
"""Terminal columns from which the whole table fits."""

STYLES = {"passed": "green", "failed": "bold red", "unproven": "yellow", "reference": "dim"}
"""Verdict -> colour."""


def print_scorecard(scorecard: Scorecard, console: Console) -> None:
    """The table, the training stages and the gates; reasons of what failed or is unproven below."""
    console.print(f"\n[bold]{escape(scorecard.name)}[/] on {escape(machine(scorecard))}")
    all_columns = columns(scorecard.metric_name)
    narrow = console.width < WIDE
    _print_rows(scorecard.rows, [c for c in all_columns if not (narrow and c.wide_only)], console)
    _print_reasons(grouped_reasons(scorecard), console)
    if scorecard.training:
        stages = "   ".join(f"{name} [bold]{percent(value)}[/]" for name, value in scorecard.training.items())
        console.print(f"\n{scorecard.metric_name} % on test: {stages}   [dim]majority {percent(scorecard.majority)}[/]")
    if scorecard.stage_seconds:
        total = sum(scorecard.stage_seconds.values())
        stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in scorecard.stage_seconds.items())
        console.print(f"[dim]{total:.0f} s in all: {stages}[/]")
    for gate in scorecard.gates:
        word = "[green]held[/]" if gate.passed else "[bold red]broken[/]"
        console.print(f"gate {word}  {escape(gate.name)}: {gate.value:.4g} {gate.unit}, limit {gate.limit:.4g}")
    console.print(f"[bold]{summary(scorecard)}[/]   [dim]* on the Pareto front[/]")
    if narrow:
        console.print("[dim]The terminal is narrow: SCORECARD.md has all columns.[/]")


def print_parity(report: ParityReport, console: Console) -> None:
    """One row per target x rung x precision of a parity report."""
    rows = [ScoreRow(parity=row, latency=_no_latency(row)) for row in report.rows]
    shown = {"target", "precision", "rung", "evidence", "verdict", "max |Δ|", "agree %", f"{report.metric_name} %"}
    _print_rows(tuple(rows), [c for c in columns(report.metric_name) if c.title in shown], console)
    reasons = [(f"{r.target} {r.precision} {r.rung}", reason) for r in report.rows for reason in r.reasons]
    _print_reasons(reasons, console)


def print_latency(report: DeviceReport, console: Console) -> None:
    """One row per target x rung x precision of a device report."""
    rows = [ScoreRow(parity=_no_parity(row), latency=row) for row in report.rows]
    shown = {"target", "precision", "rung", "MB", "load ms", "first ms", P50, "p90 ms", "peak MB"}
    _print_rows(tuple(rows), [c for c in columns("") if c.title in shown], console)
    _print_reasons([(f"{r.target} {r.precision} {r.rung}", r.reason) for r in report.rows if r.reason], console)


def _print_rows(rows: tuple[ScoreRow, ...], shown: list[Column], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for column in shown:
        table.add_column(column.title, justify="right" if column.number else "left", no_wrap=True)
    previous = None
    for row in rows:
        cells = [_cell(column, row) for column in shown]
        model = (row.parity.target, row.parity.precision)
        if model == previous:
            cells[:2] = "", ""  # a model's name once, above its rungs
        elif previous is not None and previous[0] != model[0]:
            table.add_section()
        previous = model
        table.add_row(*cells)
    console.print(table)


def _cell(column: Column, row: ScoreRow) -> str:
    text = escape(column.text(row))
    if column.title == "verdict":
        return f"[{STYLES.get(text, '')}]{text}[/]" if text in STYLES else text
    if column.title == P50 and row.pareto:
        return f"[bold]* {text}[/]"
    return text


def _print_reasons(reasons: list[tuple[str, str]], console: Console) -> None:
    for rows, reason in reasons:
        console.print(f"[yellow]{escape(rows)}[/]  {escape(reason)}", soft_wrap=True)


def _no_latency(row: ParityRow) -> LatencyRow:
    return LatencyRow(target=row.target, precision=row.precision, rung=row.rung, size_mb=0.0)


def _no_parity(row: LatencyRow) -> ParityRow:
    return ParityRow(target=row.target, precision=row.precision, rung=row.rung, evidence="none", verdict="unproven")
