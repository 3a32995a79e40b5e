"""The progress display of every long job, on standard error: a bar on a terminal, elsewhere a line now and then."""

import errno
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import click

REDRAW_S = 0.1
"""Minimum seconds between two redraws of a bar."""

LINE_S = 15.0
"""Seconds between two lines where standard error is not a terminal."""


@contextmanager
def unless_closed() -> Iterator[None]:
    """Writing to a terminal that was closed does nothing. SIGHUP comes with that; who hears it decides what to do."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


class Progress:
    """A context manager. Not thread-safe.

        with Progress("writing", 700, "images") as progress:
            progress.advance(1)

    A job of several phases names the phase each time, and may print lines, which appear above the bar:

        with Progress("start", lines=False, transient=True) as progress:
            progress.at("epoch 1/12", 30, 400)
            progress.say("epoch 1/12: loss 1.23")
    """

    def __init__(
        self, what: str, total: int = 0, unit: str = "", done: int = 0, *, lines: bool = True, transient: bool = False
    ) -> None:
        """what: the job or its phase. total: 0 if unknown. unit: `images` or another plural; `bytes` are shown as MB.

        done: the part that was done before. lines: whether to print lines if there is no terminal; the first one
        comes after LINE_S. transient: whether the bar disappears at the end.
        """
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._lines, self._transient = lines, transient
        self._bar: Any = None
        self._task: Any = None
        self._drawn = 0.0
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> "Progress":
        """Show the bar, if standard error is a terminal."""
        if sys.stderr.isatty():
            from rich import progress as rp
            from rich.console import Console

            if self.unit == "bytes":
                amount = [rp.DownloadColumn(), rp.TransferSpeedColumn()]
            elif self.unit:
                amount = [rp.MofNCompleteColumn(), rp.TextColumn(self.unit)]
            else:
                amount = [rp.TaskProgressColumn()]
            columns = [rp.TextColumn("{task.description}"), rp.BarColumn(), *amount, rp.TimeRemainingColumn()]
            self._bar = rp.Progress(*columns, console=Console(stderr=True), transient=self._transient)
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total or None, completed=self.done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Draw the final state and stop the bar."""
        if self._bar is not None:
            self._draw()
            self._bar.stop()

    def advance(self, amount: int) -> None:
        """Count `amount` more as done; a negative amount takes some back."""
        self.at(self.what, self.done + amount, self.total)

    def resize(self, total: int) -> None:
        """Change the total, for jobs that learn it late."""
        self.at(self.what, self.done, total)

    def at(self, what: str, done: int, total: int) -> None:
        """Set the phase, and how much of it is done. Cheap enough to call at every step."""
        now, changed = time.monotonic(), what != self.what or total != self.total
        self.what, self.done, self.total = what, done, total
        if self._bar is not None:
            if changed or done >= total or now - self._drawn >= REDRAW_S:
                self._drawn = now
                self._draw()
        elif self._lines and now - self._printed >= LINE_S:
            self._printed = now
            share = 100 * done / max(1, total)
            with unless_closed():
                click.echo(f"{what}: {self._amount()}, {share:.0f} %, {now - self._started:.0f} s", err=True)

    @unless_closed()
    def say(self, text: str) -> None:
        """Print one line on standard output, above the bar."""
        if self._bar is not None and sys.stdout.isatty():
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            click.echo(text)
            sys.stdout.flush()

    @unless_closed()
    def warn(self, text: str, kind: str = "warning") -> None:
        """Print one line on standard error, above the bar: what it is, and the text."""
        if self._bar is not None:
            self._bar.console.print(f"{kind}: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        else:
            click.echo(f"{kind}: {text}", err=True)

    @unless_closed()
    def _draw(self) -> None:
        self._bar.update(self._task, description=self.what, completed=self.done, total=self.total or None)

    def _amount(self) -> str:
        if self.unit == "bytes":
            return f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
        return f"{self.done:,} of {self.total:,} {self.unit}".rstrip()
