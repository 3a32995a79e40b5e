"""The dali engine: its graph and inputs, batches of any size, damage, runs left early, and memory."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simplejpeg import decode_jpeg

from shards import Loader, ShardSet
from shards.common.errors import DataError
from shards.engines import dali, dali_feed
from shards.engines.dali import DaliEngine, Graph, build_graph
from shards.engines.dali_feed import INPUTS, Reader
from shards.engines.native import NativeEngine
from shards.format import HAM10000, EncodeSpec
from shards.writer import PackedSample, ShardSetWriter
from tests.conftest import finish_set, little_metadata, write_set
from tests.support.benchdata import in_a_process_of_its_own
from tests.support.parity import assert_parity, batches, requests_of


def test_batches_of_uneven_and_growing_sizes(shard_sets):
    data = shard_sets["mixed"]
    requests = requests_of(data, [4, 9, 2, 12, 12, 1, 20, 7])
    expected = [images.clone() for images in NativeEngine(data).run(requests, 40)]
    found = list(DaliEngine(data).run(iter(requests), 40))
    assert [len(a) for a in found] == [len(request.samples) for request in requests]
    assert max(int((a.int() - b.int()).abs().max()) for a, b in zip(expected, found, strict=True)) <= 1


def test_one_pipeline_serves_all_epochs_and_resolutions(shard_sets, monkeypatch):
    built = []
    original = dali.build_graph
    monkeypatch.setattr(dali, "build_graph", lambda *args: built.append(args) or original(*args))
    selection = shard_sets["jpg"].select("train")
    loader, native = (Loader(selection, batch_size=8, engine=engine) for engine in ("dali", "native"))
    for epoch, resolution in enumerate((32, 64, 48)):
        for one in (loader, native):
            one.set_epoch(epoch)
            one.set_resolution(resolution)
        assert_parity(batches(native), batches(loader))
    assert len(built) == 1


def test_a_loader_that_nobody_closed_is_closed_on_the_thread_of_its_run(shard_sets, monkeypatch):
    """The garbage collector finds it on any thread, here on one that holds the engine's lock, and waits for nothing."""
    freed: list[str] = []
    take = DaliEngine._take_pipeline

    def watched(*args: Any) -> Any:
        pipeline = take(*args)
        weakref.finalize(pipeline, lambda: freed.append(threading.current_thread().name))
        return pipeline

    monkeypatch.setattr(DaliEngine, "_take_pipeline", watched)
    loader: Any = Loader(shard_sets["mixed"].select("train"), batch_size=8, resolution=32, engine="dali", threads=1)
    running = iter(loader)
    next(running)
    loader.itself = loader, running  # only the garbage collector finds it
    (run,), lock, gone = loader._engine._runs, loader._engine._taking, weakref.ref(loader)
    del loader, running

    def collect() -> None:
        with lock:
            gc.collect()

    collector = threading.Thread(target=collect, name="collector", daemon=True)
    collector.start()
    collector.join(60)
    assert not collector.is_alive() and gone() is None
    run.wait()
    assert freed == ["shards-dali-run"]


def leave_early(folder: Path) -> None:
    selection = ShardSet(folder).select("train")
    loader = Loader(selection, batch_size=8, resolution=32, engine="dali", threads=2)
    expected = batches(Loader(selection, batch_size=8, resolution=32, engine="native"))
    batches(loader)

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))  # noqa: PTH208  # DALI's own threads too

    before = threads()
    for taken in (1, 2, 7):
        loader.set_epoch(0)
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "batch": 0})
        running = iter(loader)
        for _ in range(taken):
            next(running)
        running.close()
    for run in loader._engine._runs:  # pyright: ignore[reportAttributeAccessIssue]
        run.wait()
    assert threads() <= before + 1  # a reader that the first epoch could do without
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "batch": 0})
    assert_parity(expected, batches(loader))
    loader.close()
    gc.collect()
    assert threads() < before


def test_an_epoch_left_early_neither_hangs_nor_spoils_the_next(shard_sets):
    in_a_process_of_its_own(leave_early, shard_sets["mixed"].path)  # threads of other tests would be counted too


@pytest.mark.slow
def test_a_loader_that_is_left_open_ends_with_the_program_quietly(shard_sets):
    code = (
        "from shards import Loader, ShardSet\n"
        f"loader = Loader(ShardSet({str(shard_sets['jpg'].path)!r}).select('train'), batch_size=8, engine='dali')\n"
        "running = iter(loader)\n"
        "print(len(next(running).images))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "8", "")


def test_two_epochs_may_run_at_once(shard_sets):
    engine = DaliEngine(shard_sets["jpg"], contents="jpg")
    requests = requests_of(shard_sets["jpg"], [8] * 6)
    expected = list(engine.run(requests, 32))
    pairs = list(zip(engine.run(requests, 32), engine.run(requests, 32), strict=True))
    assert all(torch.equal(a, e) and torch.equal(b, e) for (a, b), e in zip(pairs, expected, strict=True))


def test_a_sample_that_cannot_be_decoded_is_named(tmp_path):
    """Its checksum is right: what was packed is no JPEG."""
    rng = np.random.default_rng(0)
    intact = ShardSet(write_set(tmp_path / "intact", images=30))
    with ShardSetWriter(tmp_path / "set", EncodeSpec(), 1 << 20) as writer:
        for row in range(12):
            payload = bytes(rng.bytes(900)) if row == 7 else bytes(intact.read(row))
            metadata = little_metadata(f"IMG_{row}", HAM10000.names[row % 7])
            writer.add(PackedSample(payload, "jpg", 72, 96, "train", metadata))
        finish_set(writer)
    loader = Loader(ShardSet(tmp_path / "set").select("train"), batch_size=4, resolution=32, engine="dali", train=False)
    with pytest.raises(DataError, match=r"IMG_7: damaged.*does not decode"):
        batches(loader)


@pytest.mark.parametrize("kind", ["jpg", "raw", "mixed"])
@pytest.mark.parametrize("cutting", [True, False])
def test_the_library_and_python_read_the_same_bytes(shard_sets, kind, cutting, monkeypatch):
    data, requests = shard_sets[kind], requests_of(shard_sets[kind], [40, 20])
    fed = []
    for threads in (dali_feed.start_workers, lambda *_: None):
        monkeypatch.setattr(dali_feed, "start_workers", threads)
        reader = Reader(data, kind, ahead=1, cutting=cutting)
        fed.append(list(reader.batches(requests, 32)))
        reader.close()
    for ours, python in zip(*fed, strict=True):
        assert np.array_equal(ours.samples, python.samples)
        for name, found, expected in zip(INPUTS[kind], ours.arrays, python.arrays, strict=True):
            assert len(found) == len(expected)
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), name


@pytest.mark.parametrize("kind", ["jpg", "mixed"])
def test_a_region_is_cut_out_before_dali_gets_it(shard_sets, kind):
    """Fewer bytes than whole files, each a JPEG that holds the box where the graph is told to slice it."""
    data, requests = shard_sets[kind], requests_of(shard_sets[kind], [60])
    fed = {}
    for cutting in (True, False):
        reader = Reader(data, kind, ahead=1, cutting=cutting)
        (batch,) = reader.batches(requests, 32)
        reader.close()
        fed[cutting] = dict(zip(INPUTS[kind], batch.arrays, strict=True))
    assert np.array_equal(fed[False]["start"], requests[0].boxes[:, :2])
    smaller = 0
    for place, sample in enumerate(requests[0].samples.tolist()):
        part, whole = (fed[cutting]["payload"][place] for cutting in (True, False))
        if data.column("encoding")[sample] == "raw":
            assert np.array_equal(part, whole)
            continue
        smaller += len(part) < len(whole)
        (y, x), (top, left) = (fed[cutting]["start"][place] for cutting in (False, True))
        h, w = fed[True]["shape"][place]
        assert min(top, left) >= 0
        crop = decode_jpeg(part.tobytes())[top : top + h, left : left + w]
        assert np.array_equal(crop, data.pixels(sample)[y : y + h, x : x + w])
    assert smaller > 10


@pytest.mark.parametrize("contents", ["jpg", "raw", "mixed"])
def test_the_graph_of_a_gpu_can_be_defined_without_one(contents):
    pipeline = build_graph(lambda: [], Graph(contents, device_id=0, threads=2), max_batch=4)
    assert pipeline.device_id == 0 and pipeline.exec_dynamic
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="GPU"):  # so it is one
            pipeline.build()


def test_unknown_graphs_are_refused(shard_sets):
    with pytest.raises(ValueError, match="variant 'half'"):
        DaliEngine(shard_sets["jpg"], variant="half")
    with pytest.raises(ValueError, match="contents 'png'"):
        DaliEngine(shard_sets["jpg"], contents="png")
