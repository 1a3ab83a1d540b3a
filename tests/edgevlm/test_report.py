"""Scorecards: nothing is lost when reports are joined, the front is the brute-force one, the files say the same."""

import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from edgevlm.artifacts import (
    Bundle,
    DeviceFacts,
    DeviceReport,
    ExportedModel,
    ExportFailure,
    Gate,
    LatencyRow,
    ParityReport,
    ParityRow,
    Provenance,
    Rung,
    Scorecard,
    ScoreRow,
)
from edgevlm.report import join, write_scorecard
from edgevlm.report.markdown import render_markdown
from edgevlm.report.page import headlines, recommended, render_page
from edgevlm.report.scorecard import with_pareto
from edgevlm.report.table import columns, percent
from edgevlm.report.terminal import print_latency, print_parity, print_scorecard
from tests.edgevlm.tiny import LABELS, SPEC, TOKENIZER, tiny_vlm

RUNGS = (Rung(name="full", num_regions=16), Rung(name="b10", num_regions=10), Rung(name="b6", num_regions=6))
MODELS = {  # target, precision -> MB, ms of encoding, ms of answering by rung, points below PyTorch
    ("onnx", "fp32"): (3.9, 6.4, (1.9, 1.5, 1.3), 0.0),
    ("onnx", "int8"): (1.2, 4.9, (1.1, 0.9, 0.8), 0.4),
    ("tflite", "fp32"): (3.8, 7.1, (1.6, 1.3, 1.1), 0.0),
    ("tflite", "int8"): (1.1, 4.2, (0.7, 0.5, 0.4), 0.7),
    ("openvino", "fp32"): (3.8, 6.6, (1.5, 1.2, 1.0), 0.0),
    ("openvino", "int8"): (1.2, 3.6, (0.8, 0.6, 0.5), 3.9),
}
REFERENCE = {"full": 0.893, "b10": 0.885, "b6": 0.862}
OFF_MAC = "Core ML runs on macOS only"
FAILS = "metric 0.854 is 95.6 % of PyTorch's 0.893, at least 98 % is asked"
NO_EXPORT = "coremltools has no int8 form of <gather> & 'topk'"


def sample() -> tuple[ParityReport, DeviceReport, Bundle]:
    """What a run of the shipped recipe may look like: three runtimes, Core ML unproven and in part not exported."""
    parities, latencies, models = [], [], []
    for (target, precision), (size, encode, answers, loss) in MODELS.items():
        models.append(exported(target, precision, size))
        for rung, answer in zip(RUNGS, answers, strict=True):
            where = {"target": target, "precision": precision, "rung": rung.name}
            metric = REFERENCE[rung.name] - loss / 100
            failed = loss > 2
            parities.append(
                ParityRow(
                    **where,
                    evidence="runtime",
                    verdict="failed" if failed else "passed",
                    num_samples=600,
                    max_abs_logits=3.1e-6 if precision == "fp32" else 0.41 + loss / 7,
                    agreement=1.0 if precision == "fp32" else 0.985 - loss / 100,
                    metric=metric,
                    metric_ci=(metric - 0.027, metric + 0.024),
                    reference_metric=REFERENCE[rung.name],
                    reasons=(FAILS,) if failed else (),
                )
            )
            latencies.append(timed(target, precision, rung.name, size, encode, answer))
    for rung in RUNGS:
        latencies.append(
            timed("pytorch", "fp32", rung.name, 3.9, 21.0, {"full": 5.2, "b10": 4.9, "b6": 4.8}[rung.name])
        )
        where = {"target": "coreml", "precision": "fp32", "rung": rung.name}
        parities.append(ParityRow(**where, evidence="none", verdict="unproven", reasons=(OFF_MAC,)))
        latencies.append(LatencyRow(**where, size_mb=3.9, reason=OFF_MAC))
    models.append(exported("coreml", "fp32", 3.9))
    source = Provenance(stage="test", key="k")
    tiny = tiny_vlm()
    bundle = Bundle(
        provenance=source,
        name="scenes-tiny",
        task="vqa",
        model=tiny.config,
        preprocess=SPEC,
        tokenizer=TOKENIZER,
        labels=LABELS,
        rungs=RUNGS,
        models=tuple(models),
        failures=(ExportFailure(target="coreml", precision="int8", reason=NO_EXPORT),),
    )
    device = DeviceFacts(
        name="this machine",
        system="Debian GNU/Linux 12 (bookworm), x86_64",
        processor="AMD EPYC 9R14",
        num_cores=2,
        memory_gb=16.4,
        threads=1,
        versions={"python": "3.11.7", "onnxruntime": "1.31.1", "ai-edge-litert": "2.3.0", "openvino": "2026.4.1"},
    )
    parity = ParityReport(
        provenance=source, bundle_key="k", metric_name="accuracy", majority=0.214, rows=tuple(parities)
    )
    return parity, DeviceReport(provenance=source, bundle_key="k", device=device, rows=tuple(latencies)), bundle


def exported(target: str, precision: str, size_mb: float) -> ExportedModel:
    return ExportedModel(target=target, precision=precision, scheme="", programs={}, files=(), size_mb=size_mb)


def timed(target: str, precision: str, rung: str, size_mb: float, encode: float, answer: float) -> LatencyRow:
    return LatencyRow(
        target=target,
        precision=precision,
        rung=rung,
        size_mb=size_mb,
        load_ms=31.7 + size_mb,
        first_ms=2.1 * (encode + answer),
        encode_p50_ms=encode,
        answer_p50_ms=answer,
        p50_ms=encode + answer,
        p90_ms=1.08 * (encode + answer),
        num_runs=50,
        peak_memory_mb=92.0 + 7 * size_mb,
        outputs_checked=True,
    )


def scorecard() -> Scorecard:
    parity, latency, bundle = sample()
    return join(
        parity,
        latency,
        bundle,
        {"teacher": 0.912, "distil": 0.905, "prune": 0.898, "trim": 0.891},
        {
            "prepare": 21,
            "detector": 141,
            "teacher": 88,
            "distil": 74,
            "prune": 52,
            "trim": 49,
            "export": 61,
            "verify": 44,
        },
        (
            Gate(name="student above the majority answer", value=67.7, limit=25, passed=True, unit="points"),
            Gate(name="student keeps of its teacher", value=0.977, limit=0.97, passed=True),
            Gate(name="rows that failed parity", value=3, limit=0, passed=False),
        ),
        Provenance(
            stage="scorecard",
            key="k",
            dataset="scenes",
            edgevlm="0.1.0",
            commit="8b78d4a1f00d",
            created="2026-11-21T10:15:00+00:00",
        ),
    )


def key(row: ScoreRow) -> tuple[str, str, str]:
    return row.parity.target, row.parity.precision, row.parity.rung


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
