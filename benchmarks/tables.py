"""Rows as CSV, and Markdown made from the CSV alone."""

import csv
import io
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.machine import Environment
from benchmarks.measure import Row
from shards.common.cli import typed
from shards.common.errors import DataError
from shards.common.files import write_durably

_ROW_COLUMNS = tuple(f.name for f in fields(Row) if f.name != "environment")
_MACHINE_COLUMNS = tuple(f.name for f in fields(Environment))
COLUMNS = _ROW_COLUMNS + _MACHINE_COLUMNS
"""Columns of every CSV: the fields of Row, then those of Environment."""


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(_text(v) for v in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, whole or not at all. Numbers keep six digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        machine = row.environment
        cells = [_text(getattr(row, name)) for name in _ROW_COLUMNS]
        writer.writerow(cells + ["" if machine is None else _text(getattr(machine, name)) for name in _MACHINE_COLUMNS])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, out.getvalue().encode())


def _parser(kind: Any) -> Callable[[str], Any]:
    """What turns the text of a column of this type into its value."""
    if isinstance(kind, types.UnionType):  # X | None
        inner = _parser(next(arg for arg in typing.get_args(kind) if arg is not types.NoneType))
        return lambda text: inner(text) if text else None
    if typing.get_origin(kind) is tuple:
        return lambda text: tuple(float(part) for part in text.split())
    return {str: str, int: int, float: float}[kind]


def read_csv(path: Path) -> list[Row]:
    """Read rows that `write_csv` wrote. Raises DataError naming the file and what is wrong with it."""
    of_row = {name: _parser(kind) for name, kind in typing.get_type_hints(Row).items() if name in _ROW_COLUMNS}
    of_machine = {name: _parser(kind) for name, kind in typing.get_type_hints(Environment).items()}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise DataError(f"{path}: its columns are not those of a results table of this release")
            rows = []
            for line in reader:
                machine = None
                if line["cores"]:
                    machine = Environment(**{name: parse(line[name]) for name, parse in of_machine.items()})
                rows.append(Row(**{name: parse(line[name]) for name, parse in of_row.items()}, environment=machine))
            return rows
    except FileNotFoundError:
        raise DataError(f"{path}: no such table; make it with `{typed('benchmarks.run')}`") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: damaged ({error})") from None


def number(value: float | None) -> str:
    """A number for people: three significant digits, a comma between thousands, no exponent."""
    if value is None:
        return ""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 if abs(value) < 10 else 1
    while digits < 6 and abs(value) < 10 ** (1 - digits):
        digits += 1
    return f"{value:.{digits}f}"


def cell(row: Row | None) -> str:
    """Median and interval; `failed` where there is none."""
    if row is None:
        return ""
    if row.value is None:
        return "failed"
    if row.low is None or row.high is None:
        return number(row.value)
    return f"{number(row.value)} [{number(row.low)}, {number(row.high)}]"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    whole = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(_escape(text) for text in line) + " |" for line in whole) + "\n"


def machine_text(rows: Iterable[Row]) -> str:
    """The commands that made the rows and the machines that they ran on, each once, as a short Markdown list."""
    found = dict.fromkeys(row.environment for row in rows if row.environment is not None)
    commands = [f"- Command: `{m.command}`, {m.date}, commit {m.commit or 'unknown'}\n" for m in found]
    return "".join([*commands, *dict.fromkeys(_machine(m) for m in found)])


def clock_text(machine: Environment) -> str:
    """The CPU's clocks in MHz: of the slowest and the fastest core, or one number where all are equal."""
    return "–".join(dict.fromkeys(machine.cpu_mhz.split("–")))


def _machine(machine: Environment) -> str:
    clocks = f", {machine.gpu_mhz} MHz" if machine.gpu_mhz else ""
    gpu = machine.gpu if machine.gpu == "none" else f"{machine.gpu}, driver {machine.gpu_driver}{clocks}"
    return (
        f"- {machine.cpu}, {machine.cores} cores, {clock_text(machine)} MHz, {machine.ram_gib} GiB; GPU: {gpu}\n"
        f"- {machine.kernel}, Python {machine.python}; {machine.versions}\n"
    )


def pivot(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """A Markdown table with a line per system and a column per metric. titles: metric → title."""
    found = {(row.system, row.metric): row for row in rows if row.metric in titles and not row.beside}
    systems = dict.fromkeys(system for system, _ in found)
    lines = [[system, *(cell(found.get((system, metric))) for metric in titles)] for system in systems]
    return table(["system", *titles.values()], lines)


def ratios(rows: Sequence[Row], title: str) -> str:
    """A Markdown table of the ratios, a line per model and pair of systems; empty without any."""
    beside = [row for row in rows if row.beside]
    models = any(row.model for row in beside)
    lines = [[*([row.model] if models else []), f"{row.system} / {row.beside}", cell(row)] for row in beside]
    header = [*(["model"] if models else []), "ratio", title]
    return f"Ratios, taken within each round:\n\n{table(header, lines)}" if lines else ""


def busy_text(rows: Sequence[Row]) -> str:
    """How much of the machine's CPU time went to other processes while the rows were measured, in words."""
    shares = sorted(row.other_cpu for row in rows if row.other_cpu is not None)
    if not shares:
        return ""
    typical, most = shares[len(shares) // 2], shares[-1]
    return (
        f"Other processes used {100 * typical:.0f} % of the machine's CPU time (median over the systems; at most "
        f"{100 * most:.0f} %). That lowers absolute figures; ratios within a round change far less.\n"
    )


def notes(rows: Sequence[Row]) -> str:
    """What failed and why, and what each system does differently, as Markdown lists; with the models, where they differ
    in it."""
    failed = dict.fromkeys(f"- {_named(row)}: failed, {_escape(row.failed)}" for row in rows if row.failed)
    of: dict[str, dict[str, dict[str, None]]] = {}  # system → note → models, in order
    for row in rows:
        if row.note and not row.beside:
            of.setdefault(row.system, {}).setdefault(row.note, {})[row.model] = None
    differs = [
        f"- {system}{' (' + ', '.join(models) + ')' if len(own) > 1 else ''}: {note}"
        for system, own in of.items()
        for note, models in own.items()
    ]
    return "\n".join([*failed, *differs]) + "\n" if failed or differs else ""


def _named(row: Row) -> str:
    """A system, with its model where there are several."""
    return f"{row.model}, {row.system}" if row.model and row.model != row.system else row.system
