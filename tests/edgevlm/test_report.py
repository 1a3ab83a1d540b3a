"""Scorecards: nothing is lost when reports are joined, the front is the brute-force one, the files say the same."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from edgevlm.artifacts import LatencyRow, ParityRow, Provenance, Scorecard, ScoreRow
from edgevlm.report import join, write_scorecard
from edgevlm.report.markdown import render_markdown
from edgevlm.report.page import headlines, recommended, render_page
from edgevlm.report.scorecard import with_pareto
from edgevlm.report.table import columns, percent
from edgevlm.report.terminal import print_latency, print_parity, print_scorecard
from tests.edgevlm.scorecards import FAILS, MODELS, NO_EXPORT, OFF_MAC, REFERENCE, RUNGS, key, sample, scorecard


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that tags are balanced."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open or "script" in self._open:
            return
        self.text += data
        if "td" in self._open:
            self.rows[-1][-1] += data.strip()


def test_join_loses_nothing() -> None:
    parity, latency, bundle = sample()
    rows = scorecard().rows
    keys = [key(row) for row in rows]
    assert len(keys) == len(set(keys))
    wanted = {(r.target, r.precision, r.rung) for r in (*parity.rows, *latency.rows)}
    assert set(keys) == wanted | {("coreml", "int8", rung.name) for rung in RUNGS}
    for row in rows:
        assert key(row) == (row.latency.target, row.latency.precision, row.latency.rung)
    assert all(row in parity.rows for row in (r.parity for r in rows) if row.target in {"onnx", "tflite"})
    order = list(dict.fromkeys(target for target, _, _ in keys))
    assert order == ["pytorch", "onnx", "tflite", "openvino", "coreml"]
    assert [rung for target, precision, rung in keys if (target, precision) == ("tflite", "int8")] == [
        "full",
        "b10",
        "b6",
    ]
    assert len(bundle.models) * 3 + 3 + 3 == len(rows)


def test_missing_halves_say_what_is_missing() -> None:
    parity, latency, bundle = sample()
    half = parity.model_copy(update={"rows": parity.rows[1:]})
    other = latency.model_copy(update={"rows": latency.rows[:1]})
    rows = {key(row): row for row in join(half, other, bundle, {}, {}, (), Provenance(stage="s", key="k")).rows}
    first, second = rows["onnx", "fp32", "full"], rows["onnx", "fp32", "b10"]
    assert (first.parity.verdict, first.parity.evidence) == ("unproven", "none")
    assert first.parity.reasons == ("not verified",)
    assert first.latency.p50_ms == pytest.approx(8.3)
    assert second.parity.verdict == "passed"
    assert second.latency.p50_ms is None
    assert second.latency.reason == "not measured"
    assert second.latency.size_mb == 3.9
    lost = rows["coreml", "int8", "b6"]
    assert lost.parity.verdict == "failed"
    assert NO_EXPORT in lost.parity.reasons[0]


def test_baseline_has_the_references_metric_and_is_no_candidate() -> None:
    rows = {key(row): row for row in scorecard().rows}
    for rung, metric in REFERENCE.items():
        baseline = rows["pytorch", "fp32", rung]
        assert baseline.parity.metric == metric
        assert not baseline.pareto


def candidate(
    ms: float | None, metric: float | None, *, verdict: str = "passed", checked: bool = True, valid: bool = True
) -> ScoreRow:
    parity = {"target": "onnx", "precision": "int8", "rung": "full"}
    return ScoreRow(
        parity=ParityRow(**parity, evidence="runtime", verdict=verdict, metric=metric),  # type: ignore[arg-type]
        latency=LatencyRow(**parity, size_mb=1, p50_ms=ms, outputs_checked=checked, latency_valid=valid),
    )


COARSE = st.integers(1, 8).map(float)  # few values, so that ties are common
CANDIDATES = st.lists(
    st.builds(
        candidate,
        st.none() | COARSE,
        st.none() | COARSE.map(lambda v: v / 10),
        verdict=st.sampled_from(["passed", "passed", "failed", "unproven"]),
        checked=st.sampled_from([True, True, False]),
        valid=st.sampled_from([True, True, False]),
    ),
    max_size=14,
)


@given(CANDIDATES)
def test_front_is_the_brute_force_one(rows: list[ScoreRow]) -> None:
    def counts(row: ScoreRow) -> bool:
        numbers = row.latency.p50_ms is not None and row.parity.metric is not None
        return numbers and row.parity.verdict == "passed" and row.latency.outputs_checked and row.latency.latency_valid

    def beats(a: ScoreRow, b: ScoreRow) -> bool:
        a_ms, b_ms, a_metric, b_metric = a.latency.p50_ms, b.latency.p50_ms, a.parity.metric, b.parity.metric
        assert a_ms is not None
        assert b_ms is not None
        assert a_metric is not None
        assert b_metric is not None
        return a_ms <= b_ms and a_metric >= b_metric and (a_ms, a_metric) != (b_ms, b_metric)

    marked = with_pareto(rows)
    for row in marked:
        expected = counts(row) and not any(counts(other) and beats(other, row) for other in marked)
        assert row.pareto == expected
    assert any(row.pareto for row in marked) == any(counts(row) for row in marked)


def test_recommended_file_is_the_fastest_that_keeps_the_accuracy() -> None:
    best = recommended(scorecard())
    assert best is not None
    # TFLite int8 b6 is faster still, but keeps less than 98 % of the full PyTorch model.
    assert key(best) == ("tflite", "int8", "b10")
    titles = {card.title: card for card in headlines(scorecard())}
    assert titles["Best trade"].value == "4.70 ms"
    assert titles["Against PyTorch"].value == "5.6× faster"
    assert titles["Parity passed"].value == "15 of 24"


def test_page_refers_to_nothing_outside_itself() -> None:
    text = render_page(scorecard())
    page = Page(text)
    for name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "action", "data", "srcset", "poster"}:
            assert value.startswith("#") or value == "data:,", f"{name}={value}"
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)


def test_page_has_every_row_and_its_numbers() -> None:
    card = scorecard()
    page = Page(render_page(card))
    cells = [row for row in page.rows if row]
    assert cells == [[column.text(row) for column in columns(card.metric_name)] for row in card.rows]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    targets = {value[1:] for name, value in page.attributes if name == "href" and value.startswith("#")}
    assert targets <= set(ids)
    assert len(targets) == len(MODELS) * 3 + 3, "a bubble for each row with numbers leads to its row"


@pytest.mark.parametrize("reason", [OFF_MAC, FAILS, NO_EXPORT])
def test_failures_keep_their_reason_everywhere(reason: str) -> None:
    card = scorecard()
    assert reason in Page(render_page(card)).text
    assert reason in render_markdown(card)
    assert reason in on_terminal(card, 400)


def on_terminal(card: Scorecard, width: int) -> str:
    out = StringIO()
    print_scorecard(card, Console(file=out, width=width))
    return out.getvalue()


def test_markdown_table_has_the_same_numbers() -> None:
    card = scorecard()
    lines = [line for line in render_markdown(card).splitlines() if line.startswith("| ")]
    cells = [[cell.strip().strip("*") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    wanted = [[column.text(row) for column in columns(card.metric_name)] for row in card.rows]
    assert cells[1 : 1 + len(wanted)] == wanted
    assert cells[0] == [column.title.replace("|", "\\|") for column in columns(card.metric_name)]


@pytest.mark.parametrize("width", [80, 130, 200])
def test_terminal_shows_verdicts_and_times_at_any_width(width: int) -> None:
    card = scorecard()
    text = on_terminal(card, width)
    assert text.count("reference") == 3
    assert text.count("unproven") >= 3
    for row in card.rows:
        if row.latency.p50_ms is not None:
            assert columns("")[11].text(row) in text
        if row.parity.metric is not None:
            assert percent(row.parity.metric) in text
    assert max(len(line) for line in text.splitlines() if line.startswith(" PyTorch")) <= width
    assert "broken" in text


def test_single_reports_print_alone() -> None:
    parity, latency, _ = sample()
    out = StringIO()
    print_parity(parity, Console(file=out, width=200))
    print_latency(latency, Console(file=out, width=200))
    assert OFF_MAC in out.getvalue()
    assert "8.30" in out.getvalue()


def test_a_scorecard_without_numbers_is_still_a_page(tmp_path: Path) -> None:
    parity, latency, bundle = sample()
    nothing = [row for row in latency.rows if row.target == "coreml"]
    unproven = [row for row in parity.rows if row.target == "coreml"]
    bundle = bundle.model_copy(update={"models": bundle.models[-1:]})
    card = join(
        parity.model_copy(update={"rows": tuple(unproven)}),
        latency.model_copy(update={"rows": tuple(nothing)}),
        bundle,
        {},
        {},
        (),
        Provenance(stage="s", key="k"),
    )
    write_scorecard(card, tmp_path)
    page = Page((tmp_path / "scorecard.html").read_text())
    assert OFF_MAC in page.text
    assert "no file passed" in page.text
    assert OFF_MAC in (tmp_path / "SCORECARD.md").read_text()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
CLICKS = """<script>
const heading = [...document.querySelectorAll("th button")].find((b) => b.textContent === "p50 ms");
const shown = () => [...document.querySelectorAll("td:nth-child(12)")].map((cell) => cell.textContent.trim());
const sorted = [1, 2].map(() => { heading.click(); return shown(); });
document.body.dataset.result = JSON.stringify([...sorted, document.documentElement.scrollWidth <= innerWidth]);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser_the_table_sorts_and_nothing_complains(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    (tmp_path / "page.html").write_text(render_page(scorecard()).replace("</body>", CLICKS))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=500,900"]
    command = [
        CHROMIUM,
        *flags,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"file://{tmp_path}/page.html",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    attributes = dict(Page(done.stdout).attributes)
    ascending, descending, fits = json.loads(attributes["data-result"])
    numbers = sorted(row.latency.p50_ms for row in scorecard().rows if row.latency.p50_ms is not None)
    assert [float(cell) for cell in ascending[: len(numbers)]] == pytest.approx(numbers, abs=0.06)
    assert [float(cell) for cell in descending[: len(numbers)]] == pytest.approx(numbers[::-1], abs=0.06)
    assert set(ascending[len(numbers) :]) == set(descending[len(numbers) :]) == {"–"}
    assert fits, "a phone would scroll sideways"
