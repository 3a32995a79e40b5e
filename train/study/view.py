"""The display of a running study: a live table on a terminal, elsewhere one line per cell."""

import itertools
import sys
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Self

import click

from train.study.cells import Cell
from train.study.process import Slot
from train.study.worker import Ended


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Forecast:
    """The cells that are left, and how long they will take, predicted from those that ended."""

    def __init__(self, cells: Sequence[Cell], done: int, workers: int) -> None:
        self.total, self.done, self.failed, self.workers = len(cells) + done, done, 0, workers
        self.left = {cell.name: cell for cell in cells}
        self.models = list(dict.fromkeys(cell.config.model for cell in cells))
        self._ended: dict[str, list[tuple[int, float, float]]] = {}  # by model: images, s of training, other s

    def end(self, cell: Cell, ended: Ended, wall_s: float) -> None:
        """Count a cell that has ended."""
        if ended.outcome == "stopped":
            return
        del self.left[cell.name]
        self.done += ended.outcome == "finished"
        self.failed += ended.outcome == "failed"
        if ended.result is not None:
            train_s = float(ended.result["seconds"]["train"])
            mine = self._ended.setdefault(cell.config.model, [])
            mine.append((cell.images, train_s, max(wall_s - train_s, 0.0)))

    def seconds(self, cell: Cell) -> float | None:
        """Expected seconds of a cell: training at the speed of its model, and start, compilation and evaluation. None:
        unknown.

        The first cell of a model compiles, so its other time no longer counts after the second. A new model counts as
        the average of the others.
        """
        model = cell.config.model
        known = [self._ended[model]] if model in self._ended else list(self._ended.values())
        if not known:
            return None
        images, train_s, _ = (sum(column) for column in zip(*itertools.chain(*known), strict=True))
        others = [other_s for cells in known for _, _, other_s in (cells[1:] or cells)]
        return cell.images * train_s / max(images, 1) + fmean(others)

    def left_s(self, running: Sequence[Slot], model: str | None = None) -> float | None:
        """Seconds until the last cell (of a model) ends, if all workers are busy until then. None: unknown."""
        now, total_s = time.perf_counter(), 0.0
        started = {slot.cell.name: slot.started for slot in running if slot.cell is not None}
        for cell in self.left.values():
            if model in (None, cell.config.model):
                needed_s = self.seconds(cell)
                if needed_s is None:
                    return None
                total_s += max(needed_s - (now - started.get(cell.name, now)), 0.0)
        return total_s / self.workers


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
        self.count = Forecast(cells, done, workers)
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
