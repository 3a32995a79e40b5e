"""The display of a running study: a live table on a terminal, elsewhere one line per cell."""

import sys
import time
from collections.abc import Sequence
from typing import Any, Self

import click

from train.study.cells import Cell
from train.study.worker import Ended, Slot


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Forecast:
    """Predicts the time of a cell from the cells that have ended: seconds per image of its model, plus other time."""

    def __init__(self) -> None:
        self._images: dict[str, float] = {}
        self._train_s: dict[str, float] = {}
        self._other_s: dict[str, list[float]] = {}

    def learn(self, cell: Cell, result: dict[str, Any], wall_s: float) -> None:
        """Add a finished cell. Other time: start, compilation and evaluation. That of a model's first cell, which
        compiles, no longer counts after the second."""
        model, train_s = cell.config.model, float(result["seconds"]["train"])
        self._images[model] = self._images.get(model, 0.0) + cell.images
        self._train_s[model] = self._train_s.get(model, 0.0) + train_s
        self._other_s.setdefault(model, []).append(max(wall_s - train_s, 0.0))

    def seconds(self, cell: Cell) -> float | None:
        """Expected seconds of a cell. A new model counts as the average of the others. None: unknown."""
        if not self._images:
            return None
        model = cell.config.model
        known = [model] if model in self._images else list(self._images)
        rate = sum(self._train_s[m] for m in known) / max(sum(self._images[m] for m in known), 1.0)
        others = [other for m in known for other in (self._other_s[m][1:] or self._other_s[m])]
        return cell.images * rate + sum(others) / len(others)


class Counts:
    """The numbers of cells done, failed and left, and the time left."""

    def __init__(self, cells: Sequence[Cell], done: int, workers: int) -> None:
        self.total, self.done, self.failed, self.workers = len(cells) + done, done, 0, workers
        self.left = {cell.name: cell for cell in cells}
        self.models = list(dict.fromkeys(cell.config.model for cell in cells))
        self.forecast = Forecast()

    def end(self, cell: Cell, ended: Ended, wall_s: float) -> None:
        """Count a cell that has ended."""
        if ended.outcome == "stopped":
            return
        del self.left[cell.name]
        self.done += ended.outcome == "finished"
        self.failed += ended.outcome == "failed"
        if ended.result is not None:
            self.forecast.learn(cell, ended.result, wall_s)

    def left_s(self, running: Sequence[Slot], model: str | None = None) -> float | None:
        """Seconds until the last cell (of a model) ends, if all workers are busy until then. None: unknown."""
        chosen = [cell for cell in self.left.values() if model in (None, cell.config.model)]
        seconds = [self.forecast.seconds(cell) for cell in chosen]
        if any(one is None for one in seconds):
            return None
        now = time.perf_counter()
        spent = 0.0
        for slot in running:
            if slot.cell is not None and slot.cell in chosen:
                spent += min(now - slot.started, self.forecast.seconds(slot.cell) or 0.0)
        return max(sum(one or 0.0 for one in seconds) - spent, 0.0) / self.workers


def summary(result: dict[str, Any]) -> str:
    """The main score of a result."""
    score = result["test"]["balanced_accuracy"]
    if score["value"] is None:
        return "balanced accuracy undefined"
    return f"balanced accuracy {score['value']:.3f} ({score['low']:.3f}–{score['high']:.3f})"


class Lines:
    """One line per cell on standard output, and warnings on standard error."""

    def __init__(self, cells: Sequence[Cell], done: int, workers: int) -> None:
        """cells: those to train. done: the number of cells that were finished before."""
        self.count = Counts(cells, done, workers)
        self._running: list[Slot] = []

    def __enter__(self) -> Self:
        """Enter the context."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Leave it."""

    def say(self, text: str) -> None:
        """Show one line."""
        click.echo(text)
        sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Show one warning."""
        click.echo(f"warning: {text}", err=True)

    def started(self, slot: Slot) -> None:
        """Remember the slot, and show the note of its cell."""
        if slot not in self._running:
            self._running.append(slot)
        if slot.cell is not None and slot.cell.note:
            self.warn(f"{slot.cell.name}: {slot.cell.note}")

    def ended(self, cell: Cell, ended: Ended, wall_s: float) -> None:
        """Show one line for the cell."""
        count = self.count
        count.end(cell, ended, wall_s)
        left = count.left_s(self._running)
        time_left = f", {duration(left)} left" if left and count.left else ""
        place = f"[{count.done + count.failed}/{count.total}] {cell.name}"
        if ended.result is not None:
            self.say(f"{place}: {summary(ended.result)}, {cell.n_train} images, {wall_s:.1f} s{time_left}")
        elif ended.outcome == "stopped":
            self.say(f"{cell.name}: {ended.error}")
        else:
            self.say(f"{place}: FAILED: {ended.error}{time_left}")


class LiveTable(Lines):
    """The lines, and below them a table that is redrawn: one row per model, and the status of each worker."""

    def __enter__(self) -> Self:
        """Start drawing."""
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True)
        self._live = Live(
            get_renderable=self._table,
            console=self._console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
        )
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove the table."""
        self._live.stop()

    def say(self, text: str) -> None:
        """Show one line above the table."""
        if sys.stdout.isatty():
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            super().say(text)

    def warn(self, text: str) -> None:
        """Show one line above the table."""
        self._console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        count, running = self.count, [slot for slot in self._running if slot.cell is not None]
        table = Table("model", "left", "running", "time left", box=None, pad_edge=False)
        for model in count.models:
            mine = [cell for cell in count.left.values() if cell.config.model == model]
            busy = sum(slot.cell is not None and slot.cell.config.model == model for slot in running)
            left = count.left_s(running, model)
            time_left = "" if not mine else "not known yet" if left is None else duration(left)
            table.add_row(model, str(len(mine) - busy) if mine else "done", str(busy or ""), time_left)
        left = count.left_s(running)
        head = (
            f"{count.done} of {count.total} cells done, {len(running)} running, {len(count.left) - len(running)} left"
        )
        head += f", {count.failed} failed" if count.failed else ""
        head += f", {duration(left)} left" if left is not None else ""
        parts: list[Any] = [Text(head, style="bold"), table]
        for slot in running:
            status, seconds = slot.status, time.perf_counter() - slot.started
            share = f" {status.done}/{status.total}" if status.total > 1 else ""
            name = slot.cell.name if slot.cell is not None else ""
            parts.append(Text(f"{name}: {status.phase}{share}, {duration(seconds)}", style="dim"))
        return Group(*parts)
