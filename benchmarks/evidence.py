"""ENTRY: what has run on which GPU, from the evidence files that are committed.

    python -m benchmarks.evidence --write README.md

`make gpu-check` writes such a file; this makes the README's table of all of them, and says so where there are none.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from shards.common import cli
from shards.common.errors import DataError

FOLDER = Path("benchmarks/results/gpu")
FORMAT = 1
"""Version of the evidence files."""
CPU_NOTE = "made on a CPU: shows that the checks run, and nothing about any GPU"
MARK = re.compile(r"<!-- /?gpu evidence -->")
"""Stands before and behind the block in the README."""
NOTHING = (
    "Nothing of this has run on a GPU yet: no evidence file is committed. The CUDA code is checked as far as a CPU "
    "allows. With a GPU and ten minutes, `make gpu-check` writes the first one.\n"
)


# ------------------------------------------------------------------ writing


@dataclass
class Evidence:
    """What was found, written after every check, so that a crash costs only what comes after it."""

    out: Path
    head: dict[str, Any]
    told: Callable[[str], None]
    checks: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def check(self, name: str, work: Callable[[], tuple[bool, dict[str, Any]]]) -> bool:
        """Run a check and keep its result, `pass` or `fail`, its numbers, and the error that it ended with, if any."""
        from benchmarks.measure import reason

        began, passed, numbers, error = time.perf_counter(), False, {}, ""
        try:
            passed, numbers = work()
        except Exception as problem:  # noqa: BLE001 - it is kept by name, and the rest goes on
            error = reason(problem)[:2000]
        self._keep(name, "pass" if passed else "fail", numbers, error, time.perf_counter() - began)
        return passed

    def leave_out(self, name: str, why: str) -> None:
        """Keep that a check was not run, and why."""
        self._keep(name, "not run", {}, why, 0.0)

    def _keep(self, name: str, result: str, numbers: dict[str, Any], error: str, seconds: float) -> None:
        self.checks.append(
            {"name": name, "result": result, "error": error, "seconds": round(seconds, 3), "numbers": numbers}
        )
        self.told(f"{result:8} {name}  {seconds:.1f} s{f'  ({error})' if error else ''}")
        self.write(finished=False)

    @property
    def failed(self) -> list[str]:
        """Names of the checks that did not pass."""
        return [check["name"] for check in self.checks if check["result"] != "pass"]

    def write(self, finished: bool) -> None:
        """Write the file, whole or not at all."""
        from shards.common.files import write_durably
        from train.record import to_json

        seconds = round(time.perf_counter() - self.started, 1)
        end = {"finished": finished, "passed": finished and not self.failed, "seconds": seconds}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self.out, to_json(_plain(self.head | end | {"checks": self.checks})))


def _plain(value: Any) -> Any:
    """As JSON can hold it: numbers that are none become text. The home folder, which is one machine's, becomes `~`."""
    if isinstance(value, str):
        return value.replace(f"{Path.home()}/", "~/")
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value


# ------------------------------------------------------------------ reading and showing


def read_evidence(path: Path) -> dict[str, Any]:
    """One evidence file. Raises DataError where it is damaged, of another format, or not of a GPU."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version, counts = found["format"], found["counts_as_gpu_evidence"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an evidence file ({error})") from None
    if version != FORMAT:
        raise DataError(f"{path}: evidence of format {version}, and this release reads format {FORMAT}")
    if counts is not True or found.get("device") != "cuda":
        raise DataError(f"{path}: was {CPU_NOTE}; remove it from the evidence")
    return found


def table(folder: Path) -> str:
    """The block of the README: Markdown made from every file of `folder`, or that there is none."""
    from benchmarks.tables import grid

    files = sorted(folder.glob("*.json"))
    if not files:
        return NOTHING
    found = [(path, read_evidence(path)) for path in files]
    runs = []
    for path, one in found:
        passed = sum(check["result"] == "pass" for check in one["checks"])
        others = [check["name"] for check in one["checks"] if check["result"] != "pass"]
        machine, auto = one["environment"], _numbers(one, "choice of auto")
        runs.append(
            [
                one["name"],
                f"driver {machine['gpu_driver']}; {_versions(machine['versions'])}",
                f"{machine['date'][:10]}, {machine['commit'] or 'commit unknown'}",
                f"{passed} of {len(one['checks'])} passed{'' if one['finished'] else ', unfinished'}",
                "; ".join(others) or "none",
                auto.get("engine", "not found out"),
                f"[{path.name}]({path.as_posix()})",
            ]
        )
    header = ["GPU", "software", "date, commit", "checks", "failed or not run", "engine that auto takes", "evidence"]
    text = grid(header, runs)
    for _, one in found:
        trained = {c["name"]: c["numbers"] for c in one["checks"] if c["name"].startswith("training of ")}
        if any(trained.values()):
            rows = [[name.removeprefix("training of "), *_trained(numbers)] for name, numbers in trained.items()]
            text += (
                f"\nTraining on {one['name']}, {_settings(one)}: img/s with the loader that `auto` takes, and with one "
                "cached batch (what the model could take); the share of the time spent waiting for data, in steps that "
                "are waited for; and what the GPU's own counters (GPM) say meanwhile, with the loader:\n\n"
                + grid(["model", "img/s", "cached batch", "data wait", *_COUNTED.values()], rows)
            )
    return text


_COUNTED = {
    "sm_percent": "SMs busy",
    "occupancy_percent": "SM occupancy",
    "tensor_percent": "tensor cores",
    "dram_percent": "memory bandwidth",
    "nvjpg_percent": "JPEG decoders",
}
"""Of a GPU's readings (`benchmarks.gpu.UNITS`), those that are shown, and what the table calls them."""


def _trained(numbers: Mapping[str, Any]) -> list[str]:
    """A line of the table of trainings; empty where it did not get that far."""
    from benchmarks.tables import figure

    if not numbers:
        return ["failed"] + [""] * (2 + len(_COUNTED))
    cells = [figure(numbers["img_per_s"]), figure(numbers["cached_img_per_s"])]
    cells.append(f"{100 * numbers['data_wait_share']:.1f} %")
    read = numbers.get("utilization", {})
    return cells + [f"{read[name]['mean']:.1f} %" if name in read else "" for name in _COUNTED]


def _settings(one: Mapping[str, Any]) -> str:
    """What was trained with, in words."""
    settings = one["settings"]
    return f"{one['environment']['cores']} cores, batches of {settings['batch_size']} at {settings['resolution']} px"


def _numbers(one: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Numbers of the first check whose name begins so; none where it did not get that far."""
    for check in one["checks"]:
        if check["name"].startswith(name):
            return check["numbers"]
    return {}


def _versions(text: str) -> str:
    """Of the versions in an environment, those that decide what runs on the GPU."""
    wanted = ("torch ", "nvidia-dali")
    return ", ".join(part for part in text.split("; ") if part.startswith(wanted))


def block_of(text: str, name: str) -> re.Match[str]:
    """What stands between the two marks of a page. Raises DataError where there are not two."""
    marks = list(MARK.finditer(text))
    if len(marks) != 2:
        raise DataError(f"{name}: {len(marks)} marks like <!-- gpu evidence -->, and there must be two")
    inner = re.compile(r"(?s).*").fullmatch(text, marks[0].end(), marks[1].start())
    if inner is None:
        raise DataError(f"{name}: the marks cannot be read")
    return inner


@click.command()
@click.option("--write", "page", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Page to renew.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), default=FOLDER, show_default=True)
def main(page: Path | None, folder: Path) -> None:
    """Show what has run on which GPU, or write it between the marks of a page."""
    text = table(folder)
    if page is None:
        click.echo(text, nl=False)
        return
    from shards.common.files import write_durably

    old = page.read_text(encoding="utf-8")
    block = block_of(old, str(page))
    write_durably(page, f"{old[: block.start()]}\n{text}{old[block.end() :]}".encode())
    click.echo(f"{page}: renewed from {len(list(folder.glob('*.json')))} evidence files")


if __name__ == "__main__":
    cli.run(main)
