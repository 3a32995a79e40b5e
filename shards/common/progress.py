"""How far a long job is, on standard error: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

import click

_SPARSE_S = 15.0
"""Seconds between lines where standard error is no terminal."""


class Progress:
    """A context manager: `with Progress("writing", 700, "images") as bar: bar.advance(1)`. Not thread-safe.

    unit: `images`, or another plural; `bytes` are shown as MB. Jobs under two seconds print nothing but a bar.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._bar: Any = None
        self._task: Any = None
        self._started = self._spoken = time.monotonic()

    def __enter__(self) -> "Progress":
        """Show the bar, if there is a terminal to show it on."""
        if sys.stderr.isatty():
            from rich import progress as rp
            from rich.console import Console

            amount = (
                [rp.DownloadColumn(), rp.TransferSpeedColumn()]
                if self.unit == "bytes"
                else [rp.MofNCompleteColumn(), rp.TextColumn(self.unit)]
            )
            columns = [rp.TextColumn("{task.description}"), rp.BarColumn(), *amount, rp.TimeRemainingColumn()]
            self._bar = rp.Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done)
        return self

    def advance(self, amount: int) -> None:
        """Count `amount` more as done; negative to take some back."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif time.monotonic() - self._spoken >= _SPARSE_S:
            self._spoken = time.monotonic()
            share = 100 * self.done / max(1, self.total)
            click.echo(f"{self.what}: {self._amount()}, {share:.0f} %, {self._spoken - self._started:.0f} s", err=True)

    def resize(self, total: int) -> None:
        """Set what the whole is, where that is learnt late."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def _amount(self) -> str:
        if self.unit == "bytes":
            return f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
        return f"{self.done:,} of {self.total:,} {self.unit}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
