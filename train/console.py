"""What a run shows: one line per epoch, and a progress bar in between if it runs in a terminal."""

import sys
import time
from types import TracebackType
from typing import Any, Protocol

import click


class Console(Protocol):
    """Where a run shows its lines and its progress. A grid's worker has another one."""

    def say(self, text: str) -> None:
        """Show one line."""
        ...

    def warn(self, text: str) -> None:
        """Show a warning, one line."""
        ...

    def at(self, phase: str, done: int, total: int) -> None:
        """Show the progress of a phase (`epoch 3/12`, `test`). Called often."""
        ...


class Silent:
    """Shows nothing: for ranks after the first, and for use as a library."""

    def say(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def at(self, phase: str, done: int, total: int) -> None:
        """Nothing."""


class Terminal:
    """Lines go to standard output, warnings and the bar to standard error. The bar needs a terminal."""

    REDRAW_S = 0.1

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._phase = ""
        self._drawn = 0.0

    def __enter__(self) -> "Terminal":
        """Start the bar."""
        if sys.stderr.isatty():
            from rich.console import Console as Rich
            from rich.progress import Progress

            self._bar = Progress(console=Rich(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("start", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Show one line."""
        if self._bar is not None and sys.stdout.isatty():
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            click.echo(text)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Show one line on standard error."""
        if self._bar is not None:
            self._bar.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        else:
            click.echo(f"warning: {text}", err=True)

    def at(self, phase: str, done: int, total: int) -> None:
        """Move the bar, ten times a second at most."""
        if self._bar is None:
            return
        now = time.monotonic()
        if phase == self._phase and now - self._drawn < self.REDRAW_S and done < total:
            return
        self._phase, self._drawn = phase, now
        self._bar.update(self._task, description=phase, completed=done, total=total)
