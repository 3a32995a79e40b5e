"""What a person sees of a study that is being run: a live table on a terminal, elsewhere one line a cell."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import click

from train.study.cells import Cell
from train.study.pool import Slot
from train.study.worker import Ended


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Forecast:
    """How long cells will take, learnt from those that have ended: seconds an image of each model, and a rest."""

    def __init__(self) -> None:
        self._images: dict[str, float] = {}
        self._train_s: dict[str, float] = {}
        self._rest_s: dict[str, list[float]] = {}

    def learn(self, cell: Cell, result: dict[str, Any], wall_s: float) -> None:
        """Take in a finished cell. The rest of a model's first cell, which compiles, is forgotten with the second."""
        model, train_s = cell.config.model, float(result["seconds"]["train"])
        self._images[model] = self._images.get(model, 0.0) + cell.images
        self._train_s[model] = self._train_s.get(model, 0.0) + train_s
        self._rest_s.setdefault(model, []).append(max(wall_s - train_s, 0.0))

    def seconds(self, cell: Cell) -> float | None:
        """What a cell will take; of a model that has not been seen, as long as the others on average. None: unknown."""
        if not self._images:
            return None
        model = cell.config.model
        known = [model] if model in self._images else list(self._images)
        rate = sum(self._train_s[m] for m in known) / max(sum(self._images[m] for m in known), 1.0)
        rests = [rest for m in known for rest in (self._rest_s[m][1:] or self._rest_s[m])]
        return cell.images * rate + sum(rests) / len(rests)


class _Count:
    """How many cells are done, and how much time is left."""

    def __init__(self, cells: Sequence[Cell], done: int, workers: int) -> None:
        self.total, self.done, self.failed, self.workers = len(cells) + done, done, 0, workers
        self.left = {cell.name: cell for cell in cells}
        self.models = list(dict.fromkeys(cell.config.model for cell in cells))
        self.forecast = Forecast()

    def end(self, cell: Cell, ended: Ended, wall_s: float) -> None:
        if ended.outcome == "stopped":
            return
        del self.left[cell.name]
        self.done += ended.outcome == "finished"
        self.failed += ended.outcome == "failed"
        if ended.result is not None:
            self.forecast.learn(cell, ended.result, wall_s)

    def left_s(self, running: Sequence[Slot], model: str | None = None) -> float | None:
        """Seconds until the last cell (of a model) ends, if the workers share them evenly. None: unknown."""
        chosen = [cell for cell in self.left.values() if model in (None, cell.config.model)]
        seconds = [self.forecast.seconds(cell) for cell in chosen]
        if any(one is None for one in seconds):
            return None
        now = time.perf_counter()
        spent = 0.0
        for slot in running:
            if slot.cell is not None and slot.cell in chosen:
                spent += min(now - slot.began, self.forecast.seconds(slot.cell) or 0.0)
        return max(sum(one or 0.0 for one in seconds) - spent, 0.0) / self.workers


def summary(result: dict[str, Any]) -> str:
    """A result in a few words."""
    score = result["test"]["balanced_accuracy"]
    if score["value"] is None:
        return "balanced accuracy undefined"
    return f"balanced accuracy {score['value']:.3f} ({score['low']:.3f}–{score['high']:.3f})"


class Lines:
    """Plain lines on standard output: one a cell, and warnings on standard error."""

    def __init__(self, cells: Sequence[Cell], done: int, workers: int) -> None:
        """cells: those to train. done: how many others of the study are finished already."""
        self.count = _Count(cells, done, workers)
        self._running: list[Slot] = []

    def __enter__(self) -> "Lines":
        """Enter the context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave it."""

    def say(self, text: str) -> None:
        """Show one line."""
        click.echo(text)
        sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Show one line that asks for attention."""
        click.echo(f"warning: {text}", err=True)

    def began(self, slot: Slot) -> None:
        """Remember who is at work."""
        if slot not in self._running:
            self._running.append(slot)
        if slot.cell is not None and slot.cell.note:
            self.warn(f"{slot.cell.name}: {slot.cell.note}")

    def at(self, slot: Slot) -> None:
        """Nothing: a line for every step would be too many."""

    def ended(self, cell: Cell, ended: Ended, wall_s: float) -> None:
        """One line for the cell."""
        count = self.count
        count.end(cell, ended, wall_s)
        left = count.left_s(self._running)
        rest = f", {duration(left)} left" if left and count.left else ""
        place = f"[{count.done + count.failed}/{count.total}] {cell.name}"
        if ended.result is not None:
            self.say(f"{place}: {summary(ended.result)}, {cell.n_train} images, {wall_s:.1f} s{rest}")
        elif ended.outcome == "stopped":
            self.say(f"{cell.name}: {ended.error}")
        else:
            self.say(f"{place}: FAILED: {ended.error}{rest}")


class LiveTable(Lines):
    """The lines, and below them a table that is drawn anew: a row a model, and what each worker is doing."""

    def __enter__(self) -> "LiveTable":
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the table away."""
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
        table = Table("model", *("left", "running", "time left"), box=None, pad_edge=False)
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
            news, seconds = slot.news, time.perf_counter() - slot.began
            share = f" {news.done}/{news.total}" if news.total > 1 else ""
            name = slot.cell.name if slot.cell is not None else ""
            parts.append(Text(f"{name}: {news.phase}{share}, {duration(seconds)}", style="dim"))
        return Group(*parts)
