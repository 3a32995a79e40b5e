"""Steps and evaluations that pick their batches on the device equal those on loaded batches, bit for bit on the CPU.

Recording itself needs a GPU. Here a recorder that calls the work as often as PyTorch's shows that it leaves no trace,
and stubs of `torch.cuda` show what is called, and in which order.
"""

import copy
import json
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shards import Loader, ShardSet
from shards.engines import transfer
from tests.support.train_runs import Heard, assert_same_run, at, small, step_of
from train import device as devices
from train import graphed
from train.config import learning_rate
from train.device import Decision, Recorder
from train.distributed import World
from train.graphed import GraphedStep, Graphs, Pass
from train.loop import Stopped, train_once
from train.step import TrainingStep

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RESNET = {"ema": 0.9, "clip": 0.5}
MIXED = {"mixup": 0.4, "cutmix": 1.0, "erasing": 0.5, "resolution": 64, "start_resolution": 32}
VIT = {"model": "test_vit_relpos", "loss": "class-weighted", "ema": 0.9, "resolution": 32}
"""AdamW, dropout, clipping, class weights, averaged weights."""
RAMP = {"resolution": 96, "start_resolution": 32, "ema": 0.5, "precision": "bf16"}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of `resident` take the steps of a run on a GPU."""
    real = graphed.choose
    monkeypatch.setattr(
        "train.prepare.choose_graph",
        lambda step, engine, world: Decision("on", "a test") if engine == "resident" else real(step, engine, world),
    )


def rehearsed(run: Callable) -> Callable:
    """Calls the work four times, as recording does; on a GPU, the last call only records."""
    for _ in range(4):
        run()
    return run


@pytest.fixture
def rehearsing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "record", lambda self, run: rehearsed(run))


def resident(folder: Path, seed: int = 3, train: bool = True, batch_size: int = 8) -> Loader:
    selection = ShardSet(folder).select("train" if train else "test")
    loader = Loader(selection, batch_size=batch_size, resolution=32, train=train, seed=seed, engine="resident")
    loader.load()
    return loader


# ------------------------------------------------------------------ whole runs


# recorded: the step for each size; test, and val in the precision of training and in fp32
@pytest.mark.parametrize(
    ("changes", "recorded"), [(RESNET, 3), (VIT, 3), (RAMP, 5), (MIXED, 4)], ids=["resnet", "vit", "ramp", "mixed"]
)
def test_a_run_ends_in_the_bits_of_a_run_on_loaded_batches(
    tiny_shards: Path, tmp_path: Path, on: None, monkeypatch: pytest.MonkeyPatch, changes: dict, recorded: int
) -> None:
    asked: list[Callable] = []
    monkeypatch.setattr(Recorder, "record", lambda self, run: asked.append(run) or rehearsed(run))
    train_once(small(tiny_shards, **changes), tmp_path / "loaded")
    assert not asked
    train_once(small(tiny_shards, engine="resident", **changes), tmp_path / "graphed")
    assert_same_run(tmp_path / "loaded", tmp_path / "graphed")
    assert len(asked) == recorded
    taken = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("loaded", "graphed")]
    assert [one["decisions"]["graph"]["value"] for one in taken] == ["off", "on"]
    assert taken[1]["images"]["test"] % 16, "the last batch of an evaluation is padded"


# 8 steps, and 2 batches of each evaluation: `stop` is asked at steps 1 to 4, twice in the evaluation, at steps 5 to 8 …
@pytest.mark.parametrize(
    ("changes", "starts"),
    [(VIT, [(2, "on", "on"), (4, "on", "off"), (9, "off", "on")]), (RAMP, [(8, "on", "on")])],
    ids=["vit", "ramp"],
)
def test_a_stopped_run_goes_on_in_the_middle_of_an_epoch_with_graphs_or_without(
    tiny_shards: Path,
    tmp_path: Path,
    rehearsing: None,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict,
    starts: list[tuple[int, str, str]],
) -> None:
    """starts: when the run is stopped, and whether graphs are on before and after."""
    config = small(tiny_shards, engine="resident", **changes)
    train_once(config, tmp_path / "whole")
    for call, *values in starts:
        out, stop = tmp_path / str(call), at(call, lambda: True)
        monkeypatch.setattr("train.prepare.choose_graph", lambda *_, left=values: Decision(left.pop(0), "a test"))
        with pytest.raises(Stopped):
            train_once(config, out, stop=stop)
        train_once(config, out, resume=True)
        assert not values
        assert_same_run(tmp_path / "whole", out)


def test_what_cannot_be_recorded_runs_without_after_a_warning(
    tiny_shards: Path, tmp_path: Path, on: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_once(small(tiny_shards), tmp_path / "loaded")
    for failing, error, why in (  # the first is the step, the second an evaluation
        (1, RuntimeError("capture\nfailed"), "capture failed"),
        (2, torch.OutOfMemoryError(), "the memory is too small for it"),
    ):
        asked: list[weakref.ref] = []
        kept: list[bool] = []  # whether the graph of the step is in memory, at each step and batch of an evaluation

        def record(
            self: Recorder, run: Callable, asked: list = asked, failing: int = failing, error: Exception = error
        ) -> Callable:
            def replay() -> object:
                return run()

            rehearsed(run)
            asked.append(weakref.ref(replay))
            if len(asked) == failing:
                raise error
            return replay

        monkeypatch.setattr(Recorder, "record", record)
        console, out = Heard(), tmp_path / str(failing)
        config = small(tiny_shards, engine="resident")
        result = train_once(
            config, out, console=console, stop=lambda asked=asked, kept=kept: bool(kept.append(asked[0]() is not None))
        )
        assert result["decisions"]["graph"] == {"value": "off", "reason": f"recording failed: {why}"}
        assert console.warnings == [f"without CUDA graphs: recording failed: {why}"]
        assert len(asked) == failing
        if failing == 2:
            assert kept == [True] * 4 + [False] * 12, "its memory is not free"
        assert_same_run(tmp_path / "loaded", out)


def test_what_a_gpu_needs_for_graphs() -> None:
    fused, plain = (SimpleNamespace(param_groups=[{"fused": value}]) for value in (True, False))
    step = SimpleNamespace(device=CUDA, precision="bf16", optimizer=fused, mixing=None)
    assert graphed.choose(step, "resident", World()).value == "on"  # type: ignore[arg-type]
    for changes, engine, size, why in (
        ({"device": CPU}, "resident", 1, "a CPU"),
        ({}, "resident", 2, "several processes"),
        ({}, "dali", 1, "dali"),
        ({"precision": "fp16"}, "resident", 1, "fp16"),
        ({"optimizer": plain}, "resident", 1, "learning rate"),
    ):
        off = SimpleNamespace(**(vars(step) | changes))
        found = graphed.choose(off, engine, World(size=size))  # type: ignore[arg-type]
        assert found.value == "off" and why in found.reason


# ------------------------------------------------------------------ one step


def test_the_device_picks_the_batches_of_the_loader(tiny_shards: Path) -> None:
    for train in (True, False):
        loader, other = (resident(tiny_shards, train=train, batch_size=7) for _ in range(2))
        batches = Pass(loader)
        for epoch in (0, 1, 4):
            other.set_epoch(epoch)
            batches.upload(epoch if train else 0)
            batches.seek(0)
            for expected in other:
                assert all(torch.equal(a, b) for a, b in zip(batches.take(), expected, strict=True))
        first = batches.take()  # after the last batch, the first
        other.set_epoch(4)
        assert torch.equal(first.samples, next(iter(other)).samples)
        assert train or not all(batch.mask.all() for batch in other)


def test_the_position_of_the_loader_is_that_of_a_loader_that_yields(tiny_shards: Path) -> None:
    loader, other = resident(tiny_shards), resident(tiny_shards)
    graphs = Graphs(step_of(small("no data", batch_size=8)), loader, Decision("on", "a test"))  # type: ignore[arg-type]
    graphs.ready(0, 32)
    for take_step, _ in zip(graphs.steps(), other, strict=True):
        assert loader.state_dict() == other.state_dict()
        take_step(0.01)
    assert loader.state_dict() == other.state_dict()
    assert (loader.epoch, loader.state_dict()["batch"]) == (1, 0)
    state = loader.state_dict() | {"batch": 2}
    loader.load_state_dict(state)
    other.load_state_dict(state)
    loader.seek(3)
    next(iter(other))
    assert loader.state_dict() == other.state_dict()
    fourth = loader.selection.samples[loader.plan(1)[0][24:32]]
    assert np.array_equal(next(iter(loader)).samples, fourth)


@pytest.mark.parametrize("changes", [RESNET, VIT], ids=["resnet", "vit"])
@pytest.mark.parametrize("done", [0, 3])
def test_recording_leaves_no_trace(tiny_shards: Path, rehearsing: None, changes: dict, done: int) -> None:
    """Before the first step, and after a state was loaded; losses, weights, average, optimizer and random numbers."""
    config = small("no data", **(changes | {"batch_size": 8}))  # type: ignore[arg-type]
    plain, recorded = step_of(config), step_of(config)
    batches, loader = Pass(resident(tiny_shards)), resident(tiny_shards)
    batches.upload()

    def rate(step: TrainingStep) -> float:
        return 0.01 * learning_rate(small("no data", lr=1.0, warmup=0.3), step.done, 9)  # type: ignore[arg-type]

    torch.manual_seed(1)
    expected: list[float] = []
    for number, batch in enumerate(loader):
        if number == done:
            recorded.load_state_dict(copy.deepcopy(plain.state_dict()), number)
            random = torch.get_rng_state()
        loss = plain(batch.images, batch.colour, batch.labels, rate(plain))
        expected.append(loss.item())
    state = plain.state_dict()

    torch.set_rng_state(random)
    step = GraphedStep(recorded, batches.take)
    step.record(Recorder(CPU))
    assert recorded.done == done and all(parameter.grad is None for parameter in recorded.net.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    batches.seek(done)
    assert [step(rate(recorded)).item() for _ in range(len(loader) - done)] == expected[done:]
    assert recorded.done == plain.done
    for name in ("model", "average"):
        assert all(torch.equal(value, recorded.state_dict()[name][key]) for key, value in state[name].items())
    for key, values in state["optimizer"]["state"].items():
        found = recorded.state_dict()["optimizer"]["state"][key]
        assert all(torch.equal(value, found[name]) for name, value in values.items())


# ------------------------------------------------------------------ what a GPU is asked for


class FakeCuda:
    """Stands for `torch.cuda`: writes down what is called. The work runs on the CPU, also while it is recorded."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.at = "main"

    def stream_of(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.calls.append(f"{name} waits for {other.name}"))

    def Stream(self, device: torch.device) -> SimpleNamespace:  # noqa: N802
        return self.stream_of("side")

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        return self.stream_of(self.at)

    @contextmanager
    def stream(self, stream: SimpleNamespace):
        self.at, before = stream.name, self.at
        try:
            yield
        finally:
            self.at = before

    @contextmanager
    def graph(self, graph: SimpleNamespace, pool: object, stream: SimpleNamespace, capture_error_mode: str):
        self.calls.append(f"begin {pool} {capture_error_mode}")
        self.at, before = stream.name, self.at
        yield
        self.at = before  # only then: after an error PyTorch's stays on its stream
        self.calls.append("end")

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    def graph_pool_handle(self) -> str:
        return "pool"


def test_work_is_warmed_up_and_recorded_on_a_side_stream_and_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(devices.torch, "cuda", cuda)
    result = torch.zeros(())
    run = Recorder(CUDA).record(lambda: cuda.calls.append(f"work on {cuda.at}") or result)
    recorded = ["begin pool thread_local", "work on side", "end"]
    assert cuda.calls == ["side waits for main", *["work on side"] * 3, "main waits for side", *recorded]
    cuda.calls.clear()
    assert run() is run() is result
    assert cuda.calls == ["replay", "replay"]


def test_a_failed_recording_goes_back_to_the_stream_before(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(devices.torch, "cuda", cuda)

    def work() -> None:
        if any(call.startswith("begin") for call in cuda.calls):
            raise RuntimeError("a host sync")

    with pytest.raises(RuntimeError, match="host sync"):
        Recorder(CUDA).record(work)
    assert cuda.at == "main" and "end" not in cuda.calls


def test_on_a_cpu_work_stays_as_it_is() -> None:
    def work() -> int:
        return 3

    assert Recorder(CPU).record(work) is work


def test_adamw_may_be_recorded_after_any_checkpoint(rehearsing: None) -> None:
    step = step_of(small("no data", model="test_vit"))  # type: ignore[arg-type]
    step.load_state_dict(step.state_dict(), 0)
    assert not any(group["capturable"] for group in step.optimizer.param_groups)
    batch = SimpleNamespace(
        images=torch.zeros(16, 3, 32, 32, dtype=torch.uint8),
        colour=torch.eye(3, 4).repeat(16, 1, 1),
        labels=torch.arange(16) % 7,
    )
    GraphedStep(step, lambda: batch).record(Recorder(CPU))  # type: ignore[arg-type, return-value]
    assert all(group["capturable"] for group in step.optimizer.param_groups)


def test_the_host_runs_a_few_batches_ahead_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tiny_shards: Path) -> None:
    """Work with a batch ends here when its event is waited for: the others are the batches in flight."""
    recorded, waited = [], []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking, "spinning would take a core from the loader"

        def record(self, stream: object) -> None:
            recorded.append(self)

        def synchronize(self) -> None:
            waited.append(self)

    fake = SimpleNamespace(Event=Event, current_stream=lambda device: device)
    monkeypatch.setattr(transfer, "torch", SimpleNamespace(cuda=fake))
    loader = resident(tiny_shards)
    loader.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    monkeypatch.setattr("shards.loader._Block.rest", lambda block, _: _cpu_rest(block))
    flying = [len(recorded) - len(waited) for _ in loader]
    assert len(flying) > 4 and max(flying) == transfer._MOST_AHEAD
    assert waited == recorded[: len(waited)]


def _cpu_rest(block):
    arrays = block.labels, block.samples, block.plan.colour, block.mask
    return zip(*(torch.from_numpy(array).split(block.n) for array in arrays), strict=True)
