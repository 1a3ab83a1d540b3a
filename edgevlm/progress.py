"""Progress of long work: one interface for the stages, a rich bar for people, silence for programs and tests.

Everything goes to stderr, so that stdout stays clean for `--json`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Bar:
    """A running piece of work. The base class shows nothing."""

    def update(self, done: int, note: str = "") -> None:
        """`done` units of the total are finished; `note` is shown behind the bar."""


class _RichBar(Bar):
    def __init__(self, progress: Progress, task: int) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, note: str = "") -> None:
        self._progress.update(self._task, completed=done, note=note)  # pyright: ignore[reportArgumentType]


class Reporter:
    """Where stages say what they do. The base class is silent."""

    def say(self, text: str) -> None:
        """One line that stays."""

    @contextmanager
    def bar(self, what: str, total: int | None) -> Iterator[Bar]:
        """A bar over `total` units (None: unknown)."""
        yield Bar()


class ConsoleReporter(Reporter):
    """Bars and lines on a terminal; plain lines where stderr is a file."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text)

    @contextmanager
    def bar(self, what: str, total: int | None) -> Iterator[Bar]:
        if not self.console.is_terminal:
            yield Bar()
            return
        columns = (
            SpinnerColumn(),
            TextColumn("  {task.description:<34}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield _RichBar(progress, progress.add_task(what, total=total, note=""))
