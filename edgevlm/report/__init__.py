"""Scorecards for people: a terminal table, SCORECARD.md and one self-contained HTML page."""

from pathlib import Path

from edgevlm.artifacts import Scorecard
from edgevlm.report.markdown import render_markdown
from edgevlm.report.page import render_page
from edgevlm.report.scorecard import join

__all__ = ["MARKDOWN", "PAGE", "join", "write_scorecard"]

MARKDOWN, PAGE = "SCORECARD.md", "scorecard.html"


def write_scorecard(scorecard: Scorecard, out_dir: Path) -> None:
    """Write `SCORECARD.md` and `scorecard.html` into `out_dir`."""
    (out_dir / MARKDOWN).write_text(render_markdown(scorecard), encoding="utf-8")
    (out_dir / PAGE).write_text(render_page(scorecard), encoding="utf-8")
