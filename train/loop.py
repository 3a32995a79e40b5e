"""One run, from the shard set to result.json. Read it from top to bottom."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.common.errors import DermscaleError, UsageError
from shards.common.files import full_disk_names
from train import checkpoint, models
from train import device as devices
from train.checkpoint import Progress
from train.config import Config, learning_rate, resolved
from train.console import Console, Silent
from train.crowding import CROWDED, Crowding
from train.device import Decision
from train.distributed import World
from train.evaluation import finish, logits_of
from train.metrics.scores import balanced_accuracy
from train.prepare import Run, choose_data, compile_and_distribute, prepare, reduction_warning
from train.record import ENVIRONMENT, RunFolder, environment, read_decisions, read_result
from train.workspace import Workspace

LOG_STEPS = 50
"""Steps after which the losses are fetched from the device, checked and recorded."""


class Stopped(DermscaleError):  # noqa: N818 (not an error: it was asked for)
    """The run was asked to stop and has written a checkpoint."""

    exit_code = 143


def train_once(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    world: World | None = None,
    workspace: Workspace | None = None,
    stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
    started: float | None = None,
    unwanted: Collection[str] = (),
) -> dict[str, Any]:
    """Train and evaluate one model, write the run folder `out`, and return its result (empty on ranks after the first).

    resume: continue from the folder's checkpoint, if it has one. workspace: kept by a caller that trains many runs in
    one process; the result is the same. stop: called at every step; if it returns True, a checkpoint is written and
    Stopped is raised. started: `time.perf_counter()` when the process began, so that its start is counted. unwanted:
    names of files that the caller deletes from a finished run; they are not written, unless they are needed to resume.
    Raises UsageError, DataError, or DermscaleError if the loss is not a number or the device's memory is full, each
    with one line for the user.
    """
    started = time.perf_counter() if started is None else started
    world, console = world or World(), console or Silent()
    with ExitStack() as stack:
        stack.enter_context(full_disk_names(out))
        stack.enter_context(_full_memory_in_one_line(config))
        if workspace is None:
            workspace = Workspace()
            stack.callback(workspace.engines.close)

        # ------------------------------------------------------------------ settings, data, folder, earlier state

        device = world.device
        devices.reset_peak_memory(device)
        models.check_resolution(config.model, config.resolution, config.start_resolution)
        family = models.family(config.model)
        config = resolved(config, family)
        models.check_layers(config.model, config.drop_path, config.layer_decay)
        selections = choose_data(config, workspace.open(config.data), family, world)
        folder: RunFolder | None = None  # on the first rank only

        def open_folder() -> tuple[dict[str, Any] | None, dict[str, Any] | None, dict[str, Decision]]:
            nonlocal folder
            folder = stack.enter_context(RunFolder(out, config, resume))
            result, state = read_result(out), checkpoint.load(out)
            # Decisions are read from environment.json: it is older than the first checkpoint, and it names the machine.
            here = environment(selections["train"].data, devices.environment(device), {}, world.size)
            return result, state, read_decisions(out, here)

        result, state, earlier = world.from_first(open_folder)
        if result is not None:
            console.say(f"{out}: this run is finished")
            return result if world.first else {}

        def say(text: str) -> None:
            console.say(text)
            if folder is not None:
                folder.log(text)

        def warn(text: str) -> None:
            console.warn(text)
            if folder is not None:
                folder.log(f"warning: {text}")

        # ------------------------------------------------------------------ network, decisions, compiling

        run: Run = prepare(config, family, world, workspace, selections, earlier, stack)
        if state:
            parameters = [one.shape for group in run.step.optimizer.param_groups for one in group["params"]]
            own = _state(run, Progress(), [{"torch": devices.random_state(device)}], 0)
            checkpoint.check(out, state, own, parameters, len(run.loaders["train"]), run.total)
        progress = Progress(**state["progress"]) if state else Progress()
        progress.seconds["start"] += time.perf_counter() - started
        if (warning := reduction_warning(run.loaders["test"])) and warning not in workspace.warned:
            workspace.warned.add(warning)
            console.warn(warning)
        if size := run.data.to_fetch():
            say(f"{run.data.address}: {size / 1e9:.3g} GB are fetched to {run.data.path.parent} when they are needed")
        compile_and_distribute(run, progress, console)
        mark = time.perf_counter()
        if state:
            run.step.load_state_dict(state, progress.step)
            run.loaders["train"].load_state_dict(state["loader"])
            if state["normalisation"] != (here := _state(run, progress, [], 0)["normalisation"]):
                raise UsageError(
                    f"{out}: was started with the normalisation {state['normalisation']}, now {here}: the file of "
                    "--weights is another; use the same, or choose another --out"
                )
            checkpoint.set_random_states(device, state["random"], world.rank, (config.seed, progress.step))
            say(f"{out}: continuing at step {progress.step} of {run.total}")
        if folder is not None:
            folder.rewind(state["metrics_bytes"] if state else 0, progress.step)
            folder.write(ENVIRONMENT, environment(run.data, devices.environment(device), run.decisions, world.size))
        for name, decision in run.decisions.items():
            say(f"{name}: {decision.value} ({decision.reason})")
        sizes = ", ".join(f"{split} {len(selection)}" for split, selection in selections.items())
        if "val" not in selections:
            say("no validation split: all metrics are of the test split, and probabilities are not scaled on val")
        say(f"images: {sizes}; {len(run.sizes)} epochs, {run.total} steps of {config.batch_size} images")
        progress.seconds["start"] += time.perf_counter() - mark

        # ------------------------------------------------------------------ what happens between steps

        loader = run.loaders["train"]
        watched = device.type == "cpu" and CROWDED not in workspace.warned
        crowding = Crowding(int(run.chosen["threads"].value)) if watched else None
        losses = torch.zeros(LOG_STEPS, device=device)
        rates: list[float] = []  # learning rates of the steps whose losses are still on the device
        saved = time.monotonic()

        def fetch() -> None:
            """Fetch the losses since the last fetch, check and record them. This is the only host sync of training."""
            values = world.sum(losses[: len(rates)].clone()).tolist()
            good = list(itertools.takewhile(math.isfinite, values))
            first = progress.step - len(rates)
            for value in good:
                progress.epoch_loss += value
            if folder is not None:
                folder.steps(first, progress.epoch, good, rates[: len(good)])
            if len(good) < len(values):
                bad, step, lr = values[len(good)], first + len(good), rates[len(good)]
                raise DermscaleError(
                    f"the loss is {bad} at step {step} (epoch {progress.epoch + 1}, learning rate {lr:.3g}): "
                    f"use a lower --lr{'' if run.step.precision == 'fp32' else ' or --precision fp32'}"
                )
            rates.clear()

        def save() -> None:
            """Write a checkpoint of the current state. Every rank takes part."""
            nonlocal saved
            began = time.perf_counter()
            random_states = world.gather({"torch": devices.random_state(device)})
            if folder is not None:
                checkpoint.save(folder.path, _state(run, progress, random_states, folder.metrics_bytes()))
            saved = time.monotonic()
            progress.seconds["save"] += time.perf_counter() - began

        def stopped() -> Stopped:
            return Stopped(f"{out}: stopped at step {progress.step} of {run.total}; go on with --resume")

        def between(split: str, done: int) -> None:
            """Between two batches of an evaluation: show the progress, and stop if any rank was asked to."""
            console.at(split, done, len(run.loaders[split]))
            if world.agree(stop(), False)[0]:
                save()
                raise stopped()

        def evaluate(split: str, precision: str, tta: str = "none") -> np.ndarray | None:
            began, batches = time.perf_counter(), run.loaders[split]
            shown, graphs = functools.partial(between, split), run.graphs if run.graphs.on else None
            found = logits_of(run.step.reported, batches, precision, world, shown, graphs, tta)
            progress.seconds["eval"] += time.perf_counter() - began
            return found

        # ------------------------------------------------------------------ train
        for epoch, px in list(enumerate(run.sizes))[progress.epoch :]:
            steps = min(len(loader), run.total - epoch * len(loader))
            progress.seconds["compile"] += run.graphs.ready(epoch, px)
            mark, read = time.perf_counter(), len(run.busy)
            if crowding is not None:
                crowding.pause()
            for take_step in _steps(run, epoch, px, steps, progress):
                lr = learning_rate(config, progress.step, run.total)
                losses[len(rates)] = take_step(lr)
                rates.append(lr)
                progress.step += 1
                progress.epoch_step += 1
                console.at(f"epoch {epoch + 1}/{len(run.sizes)}", progress.epoch_step, steps)
                if crowding is not None and (text := crowding.after_step(px)):
                    workspace.warned.add(CROWDED)
                    warn(text)
                due = world.first and time.monotonic() - saved >= config.checkpoint_s
                stopping, saving = world.agree(stop(), due)
                if stopping or saving or len(rates) == LOG_STEPS or progress.epoch_step == steps:
                    fetch()
                    progress.epoch_train_s += time.perf_counter() - mark
                    long = progress.epoch_train_s >= devices.BUSY_PERIOD_S  # else it is about what was before the epoch
                    if long and (busy := devices.busy(device)) is not None:
                        run.busy.append(busy)
                    if stopping or saving:
                        save()
                    if stopping:
                        raise stopped()
                    mark = time.perf_counter()

            # -------------------------------------------------------------- end of the epoch: one line

            numbers: dict[str, Any] = {
                "epoch": epoch + 1,
                "loss": progress.epoch_loss / steps,
                "img_per_s": steps * config.batch_size / progress.epoch_train_s,
                "data_wait_fraction": progress.epoch_wait_s / progress.epoch_train_s,
                "resolution_px": px,
            }
            if run.busy[read:]:
                numbers["gpu_busy"] = fmean(run.busy[read:])
            line = f"epoch {epoch + 1:3d}/{len(run.sizes)}  loss {numbers['loss']:.4f}"
            due = (epoch + 1) % config.eval_epochs == 0 or epoch + 1 == len(run.sizes)
            if due and "val" in selections and (found := evaluate("val", run.step.precision)) is not None:
                numbers["val_balanced_accuracy"] = balanced_accuracy(found, selections["val"].labels)
                line += f"  val balanced accuracy {numbers['val_balanced_accuracy']:.3f}"
            line += f"  {numbers['img_per_s']:.1f} img/s  data wait {100 * numbers['data_wait_fraction']:.1f} %"
            line += f"  GPU busy {100 * numbers['gpu_busy']:.1f} %" if "gpu_busy" in numbers else ""
            say(line + (f"  {px} px" if config.start_resolution else ""))
            if folder is not None:
                folder.epoch(progress.step, numbers)
            progress.end_epoch(steps * config.batch_size)
            devices.give_back(world.device)  # the next allocations have other sizes: evaluation, or another resolution

        # ------------------------------------------------------------------ the weights of the last step, measured

        # This checkpoint is for a crash in what follows. If it will be deleted anyway, it is written only when one is
        # due: after a crash, training continues from the last one, or from the start, to the same weights.
        if world.from_first(lambda: checkpoint.FILE not in unwanted or time.monotonic() - saved >= config.checkpoint_s):
            save()
        logits = {split: evaluate(split, "fp32", config.tta) for split in selections if split != "train"}
        world.settle()
        known = {split: found for split, found in logits.items() if found is not None}
        if folder is None or not known:  # on ranks after the first
            return {}
        result = finish(run, folder, progress, known, unwanted)
        say(result["summary"])
        return result


def _state(run: Run, progress: Progress, random_states: list[Any], metrics_bytes: int) -> dict[str, Any]:
    """What a checkpoint holds."""
    head = run.step.net.head
    return {
        "random": random_states,
        "metrics_bytes": metrics_bytes,
        "progress": asdict(progress),
        "normalisation": {"mean": head.mean.tolist(), "std": head.std.tolist()},
        **run.step.state_dict(),
        "loader": run.loaders["train"].state_dict(),
    }


@contextmanager
def _full_memory_in_one_line(config: Config) -> Iterator[None]:
    """Turn the device's error about full memory into one line (DermscaleError)."""
    try:
        yield
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        raise DermscaleError(
            f"{config.model} at {config.resolution} px with batch size {config.batch_size} does not fit into the "
            "memory; choose a smaller --batch-size or --resolution"
        ) from None


def _steps(run: Run, epoch: int, px: int, steps: int, progress: Progress) -> Iterator[Callable[[float], Tensor]]:
    """For each step left in an epoch of `steps` steps: what takes it, given the learning rate, and returns the loss.

    Counts the time spent waiting for each batch.
    """
    if progress.epoch_step >= steps:
        return
    loader = run.loaders["train"]
    loader.set_resolution(px)
    loader.set_epoch(epoch)
    with closing(run.graphs.steps(progress.epoch_step)) as each:
        while progress.epoch_step < steps:
            before = loader.waited_s
            take_step = next(each)
            progress.epoch_wait_s += loader.waited_s - before
            yield take_step
