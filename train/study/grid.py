"""Check the settings of a grid and train its cells: for `train.grid`, and for `train.leakage`, which has two arms."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from train.config import DECIDES_NOTHING, Config
from train.interrupts import asked_to_stop
from train.record import read_result
from train.study.cells import Cell
from train.study.folder import PACKED, UNWANTED, StudyFolder, read_journal
from train.study.pool import Pool, visible_gpus
from train.study.process import Process
from train.study.sharing import Sharing, decide
from train.study.table import RESULTS, read_row, read_rows, write_table
from train.study.view import Lines, LiveTable

if TYPE_CHECKING:
    from shards.shardset import ShardSet

_OF_CELLS = ("model", "fraction", "seed", "subset_seed")
"""Fields of Config that differ from cell to cell."""


def study_settings(base: Config, budget: str, data: "ShardSet") -> dict[str, Any]:
    """The settings that all cells of a study share. A study can only be continued with the same settings."""
    shared = {k: v for k, v in base.to_dict().items() if k not in (*_OF_CELLS, *DECIDES_NOTHING)}
    packed = data.manifest.identity
    about = {"budget": budget, "shard_set": packed.pop("shard_set"), "split_unit": data.manifest.split["unit"]}
    return shared | about | {PACKED: packed}


def check_settings(names: Sequence[str], base: Config) -> None:
    """Refuse settings that would make every cell fail, before anything is written.

    Raises UsageError for an unknown model, an impossible resolution, too small a batch, an optimizer without its
    learning rate, an option for parts that a model lacks, a missing device or a precision that it does not support,
    DataError for weights that cannot be read.
    """
    from train import device as devices
    from train import models
    from train.config import check_batch, resolved
    from train.weights import read_weights

    for name in names:
        models.check_resolution(name, base.resolution, base.start_resolution)
        family = models.family(name)
        config = resolved(replace(base, model=name), family)
        check_batch(config, family)
        models.check_layers(name, config.drop_path, config.layer_decay)
    # `auto` always fits; asking for it would start CUDA here, which takes memory of the GPU until the study ends.
    if base.device not in ("auto", "cpu") or base.precision not in ("auto", "fp32"):
        devices.precision(devices.choose(base.device), base.precision)
    if base.weights is not None:
        read_weights(Path(base.weights))


def train_cells(
    cells: Sequence[Cell],
    folder: StudyFolder,
    device: str,
    keep: str = "weights",
    per_device: int | None = 1,
    runner: str = "local",
) -> int:
    """Train the cells that are not finished. Returns the exit code: 0 finished, 1 some failed, 128 + signal stopped.

    keep: a key of UNWANTED: what is kept of a finished cell. per_device: how many are trained at the same time on each
    device; None: `auto`. runner: `local`, or `ray` if the process is connected to a cluster.
    """
    from train import device as devices
    from train.study import cluster

    signals = asked_to_stop(second_ends=False)  # the pool kills its workers at the second one
    _record_unrecorded(cells, folder, UNWANTED[keep])
    known = folder.sharing()
    earlier = None if known is None else Sharing(**known)
    gpus = visible_gpus(device) if runner == "local" else []
    there = None if runner == "local" else cluster.devices(device)
    log = folder.log("trial")
    if there is None:
        sharing = decide(per_device, cells, gpus, earlier, log, lambda: len(signals))
    else:
        sharing = cluster.share(there, per_device, cells, earlier, log, lambda: len(signals))
    if not signals:  # a trial that was stopped decides nothing
        folder.record_sharing(asdict(sharing))
    at_once = sharing.per_device * (len(gpus) if there is None else there.number)
    cells = [replace(cell, config=replace(cell.config, threads=sharing.threads)) for cell in cells]
    rows = read_rows(folder.path)
    left = [cell for cell in cells if rows.get(cell.name, {}).get("status") != "finished"]
    done = len(cells) - len(left)

    def recorded(entry: dict[str, Any]) -> None:
        row = read_row(folder.path, entry["cell"], entry)
        if row is not None:
            rows[entry["cell"]] = row
            write_table(folder.path, rows)

    with (LiveTable if sys.stderr.isatty() else Lines)(left, done, at_once) as view:
        if sharing.per_device > 1 or (per_device is None and earlier is None and len(cells) > 1):
            threads = f", each with --threads {sharing.threads}" if sharing.threads else ""
            view.say(f"--per-device {sharing.per_device}{threads}: {sharing.reason}")
        if earlier is not None and earlier.threads != sharing.threads and devices.choose(device).type == "cpu":
            view.warn(
                f"--threads {sharing.threads or 'by default'}, and {earlier.threads or 'the default'} until now: the "
                "last bits of a result on a CPU depend on it"
            )
        if done:
            view.say(f"{done} of {len(cells)} cells are finished already")
        with ExitStack() as stack:
            if there is None:
                workers = [Process(gpu) for gpu in gpus * sharing.per_device]
            else:
                workers = stack.enter_context(cluster.workers(there, sharing.per_device, folder, view.say))
            pool = Pool(folder, view, workers, recorded, UNWANTED[keep], sharing.per_device)
            failed = pool.run(left, lambda: len(signals)) if left else []
    write_table(folder.path, rows)
    if signals:
        click.echo(f"stopped; run the same command to continue ({folder.path})", err=True)
        return 128 + signals[0]
    click.echo(f"{len(cells) - len(failed)} of {len(cells)} cells finished; {folder.path / RESULTS}")
    if failed:
        some = ", ".join(failed[:5]) + (", …" if len(failed) > 5 else "")
        click.echo(f"error: {len(failed)} cells failed ({some}); run the same command to try them again", err=True)
        return 1
    return 0


def _record_unrecorded(cells: Sequence[Cell], folder: StudyFolder, unwanted: Sequence[str]) -> None:
    """Write the journal's entry of each cell that finished after the grid was killed; its phases are its seconds."""
    journal = read_journal(folder.path)
    for cell in cells:
        known = journal.get(cell.name, {}).get("outcome") == "finished"
        if not known and (result := read_result(folder.cell(cell.name))) is not None:
            folder.ended(cell, "finished", "", sum(result["seconds"].values()), unwanted)
