"""SCORECARD.md: the table for pull requests and diffs, with what it takes to make it again."""

from edgevlm.artifacts import Scorecard
from edgevlm.report.table import LEGEND, P50, columns, day, grouped_reasons, machine, percent, reproduce, summary


def render_markdown(scorecard: Scorecard) -> str:
    """The whole report as Markdown."""
    metric = scorecard.metric_name
    parts = [
        f"# {scorecard.name}",
        f"{summary(scorecard)}. Task {scorecard.task}; the majority answer has {metric} {percent(scorecard.majority)} %.",
        f"Measured on {day(scorecard)}: {machine(scorecard)}.",
        _table(scorecard),
        "**Bold** p50: on the Pareto front, no file that passed is both faster and more accurate.",
    ]
    if reasons := grouped_reasons(scorecard):
        lines = [f"* {_escape(rows)} — {_escape(reason)}" for rows, reason in reasons]
        parts += ["## Failed, unproven or not measured", "\n".join(lines)]
    if scorecard.gates:
        lines = [
            f"| {_escape(gate.name)} | {gate.value:.4g} {gate.unit} | {gate.limit:.4g} {gate.unit} "
            f"| {'held' if gate.passed else '**broken**'} |"
            for gate in scorecard.gates
        ]
        parts += ["## Gates", "\n".join(["| gate | value | limit | |", "|---|--:|--:|---|", *lines])]
    if scorecard.training:
        parts += ["## Training stages", _stages(scorecard)]
    commands = [f"* {what}: `{command}`" for what, command in reproduce(scorecard)]
    parts += ["## How to reproduce", "\n".join(commands)]
    parts += ["## Legend", "\n".join(f"* **{term}**: {meaning}." for term, meaning in LEGEND)]
    parts += ["## Provenance", _provenance(scorecard)]
    return "\n\n".join(parts) + "\n"


def _table(scorecard: Scorecard) -> str:
    shown = columns(scorecard.metric_name)
    lines = [
        "| " + " | ".join(_escape(column.title) for column in shown) + " |",
        "|" + "|".join("--:" if column.number else "---" for column in shown) + "|",
    ]
    for row in scorecard.rows:
        cells = [_escape(column.text(row)) for column in shown]
        if row.pareto:
            index = [column.title for column in shown].index(P50)
            cells[index] = f"**{cells[index]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _stages(scorecard: Scorecard) -> str:
    names = list(dict.fromkeys([*scorecard.training, *scorecard.stage_seconds]))
    lines = [f"| stage | {scorecard.metric_name} % on test | seconds |", "|---|--:|--:|"]
    for name in names:
        seconds = scorecard.stage_seconds.get(name)
        took = "–" if seconds is None else f"{seconds:.0f}"
        lines.append(f"| {_escape(name)} | {percent(scorecard.training.get(name))} | {took} |")
    return "\n".join(lines)


def _provenance(scorecard: Scorecard) -> str:
    source, device = scorecard.provenance, scorecard.device
    lines = [
        f"* dataset {source.dataset}, seed {source.seed}, edgevlm {source.edgevlm}, commit {source.commit or 'unknown'}",
        "* " + ", ".join(f"{name} {version}" for name, version in device.versions.items()),
    ]
    return "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
