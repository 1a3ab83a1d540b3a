"""Read a whole dataset as training would and say what is wrong with it, where, and what is in it: `edgevlm data check`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgevlm.data import open_reader
from edgevlm.data.entries import require_split, split_words
from edgevlm.data.jsonl import JsonLines
from edgevlm.data.problems import Problem, Problems, Reporting
from edgevlm.data.sample import Reader, Sample
from edgevlm.errors import DataError
from edgevlm.progress import Reporter
from edgevlm.recipe import DataSection
from edgevlm.recipes import load_recipe

MAX_POSITIONS = 512
"""Word pieces that a BERT-like fusion can take at all."""
MARKERS = 2
"""[CLS] and [SEP]."""
MAX_SHOWN = 50
REPORT_EVERY = 50


@dataclass
class SplitTotals:
    """What a split contains, after the bad parts are left out."""

    split: str
    samples: int = 0
    images: int = 0
    """Two per sample of a dataset of pairs."""
    boxes: int = 0
    texts: int = 0
    """Questions and sentences."""
    captions: int = 0
    answers: int = 0
    """Different ones."""
    texts_outside: int = 0
    """Texts whose annotators gave no answer of the closed list: every model is wrong about them."""
    longest: int = 0
    """Words and punctuation marks of the longest text."""
    known_words: float | None = None
    """Share of the running words that the training split has too, 0..1; None if that split was not read."""
    left_out: dict[str, int] = field(default_factory=dict)
    """What the dataset's protocol leaves out; no problems."""
    problems: int = 0


@dataclass
class CheckReport:
    """The findings about one dataset."""

    dataset: str
    num_classes: int
    num_attributes: int
    num_answers: int
    splits: list[SplitTotals]
    counts: dict[str, int]
    """Problems by kind."""
    problems: list[Problem]
    """One by one, up to `problems.MAX_KEPT`."""

    @property
    def ok(self) -> bool:
        return not self.counts


def check(
    target: str,
    data_path: str | None = None,
    splits: Sequence[str] | None = None,
    overrides: list[str] | None = None,
    reporter: Reporter | None = None,
) -> CheckReport:
    """Check the dataset of a recipe, or a folder (or URL) of your own data.

    Args:
        target: a shipped recipe, a .yaml file, or a folder or `.jsonl` file in the plain format.
        data_path: folder that wins over the recipe's.
        splits: only these; None = all.
        overrides: `key=value` changes of the recipe.
        reporter: shows progress.

    Raises:
        RecipeError: no such recipe.
        DataError: the dataset cannot be opened, or has no such split.
    """
    if "://" in target or target.endswith((".jsonl", ".jsonl.gz")) or Path(target).is_dir():
        problems = Problems("collect", MAX_POSITIONS - MARKERS)
        return check_reader(JsonLines(target, None, problems), problems, {}, splits, reporter or Reporter())
    recipe = load_recipe(target, overrides)
    problems = Problems("collect", recipe.text.max_tokens - MARKERS)
    reader = open_reader(recipe.data.model_copy(update={"on_bad": "skip"}), recipe.task, recipe.seed, data_path)
    if isinstance(reader, Reporting):
        reader.problems = problems
    return check_reader(reader, problems, read_limits(recipe.data, reader.splits), splits, reporter or Reporter())


def read_limits(section: DataSection, splits: Sequence[str]) -> dict[str, int | None]:
    """Split -> images that a recipe reads of it."""
    named = {"train": section.num_train, "val": section.num_val}
    return {split: named.get(split, section.num_test) for split in splits}


def check_reader(
    reader: Reader,
    problems: Problems,
    limits: dict[str, int | None],
    splits: Sequence[str] | None,
    reporter: Reporter,
) -> CheckReport:
    """Read the splits of a reader, which reports to `problems`.

    A reader that reports nowhere can only say what it stops at: that is then the split's one problem.

    Raises:
        DataError: no such split.
    """
    for split in splits or ():
        require_split(reader.name, split, reader.splits)
    totals: list[SplitTotals] = []
    vocabulary: set[str] | None = None
    for split in splits or reader.splits:
        found = sum(problems.counts.values())
        problems.left_out.clear()
        total, words = SplitTotals(split), Counter[str]()
        answers: set[str] = set()
        try:
            with reporter.bar(f"reading {split}", limits.get(split)) as bar:
                for sample in reader.samples(split, limits.get(split)):
                    _count(sample, reader, total, answers, words)
                    if total.samples % REPORT_EVERY == 0:
                        bar.update(total.samples)
        except DataError as problem:
            problems.report("malformed record", reader.name, split, problem.what)
        if split == "train":
            vocabulary = set(words)
        if vocabulary is not None and words:
            total.known_words = sum(n for word, n in words.items() if word in vocabulary) / words.total()
        total.answers, total.left_out = len(answers), dict(problems.left_out)
        total.problems = sum(problems.counts.values()) - found
        if not total.samples and not total.problems:
            problems.report("malformed record", reader.name, split, "the split has no samples")
            total.problems = 1
        totals.append(total)
    labels = reader.labels
    sizes = len(labels.classes), len(labels.attributes), len(labels.answers)
    return CheckReport(reader.name, *sizes, totals, dict(problems.counts), list(problems.found))


def _count(sample: Sample, reader: Reader, total: SplitTotals, answers: set[str], words: Counter[str]) -> None:
    total.samples += 1
    total.images += 1 if sample.second is None else 2
    total.boxes += len(sample.boxes)
    total.texts += len(sample.texts)
    total.captions += len(sample.captions)
    known = reader.labels.answers
    for text in sample.texts:
        answers.add(text.answer)
        total.texts_outside += text.answer not in known
    for text in (*(text.text for text in sample.texts), *sample.captions):
        split = split_words(text)
        words.update(split)
        total.longest = max(total.longest, len(split))


def as_dict(report: CheckReport) -> dict[str, Any]:
    """The report as plain data, for `--json`."""
    return {"ok": report.ok, **asdict(report)}


def render(report: CheckReport, console: Console) -> None:
    """The totals, then what is wrong and where."""
    lists = f"{report.num_classes} classes, {report.num_attributes} attributes, {report.num_answers} answers"
    console.print(f"[bold]{escape(report.dataset)}[/]  {lists}")
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("split")
    for title in ("images", "boxes", "texts", "captions", "answers", "outside", "longest", "known", "problems"):
        table.add_column(title, justify="right")
    for total in report.splits:
        share = "–" if total.known_words is None else f"{total.known_words:.1%}"
        numbers = (total.images, total.boxes, total.texts, total.captions, total.answers, total.texts_outside)
        problems = f"[red]{total.problems:,}[/]" if total.problems else "0"
        table.add_row(escape(total.split), *(f"{n:,}" for n in numbers), str(total.longest), share, problems)
    console.print(table)
    for total in report.splits:
        for what, number in total.left_out.items():
            console.print(
                f"[dim]{escape(total.split)}: {number:,} × {escape(what)}, left out as the dataset means it[/]"
            )
    if report.ok:
        console.print("[green]nothing is wrong[/]")
        return
    for problem in report.problems[:MAX_SHOWN]:
        console.print(f"[red]{problem.kind}[/]  {escape(str(problem))}", soft_wrap=True)
    number = sum(report.counts.values())
    if number > MAX_SHOWN:
        console.print(f"… and {number - MAX_SHOWN:,} more; --json lists up to {len(report.problems):,}")
    kinds = ", ".join(f"{count:,} × {kind}" for kind, count in sorted(report.counts.items()))
    console.print(f"[bold red]{number:,} problems[/]: {kinds}")
