"""Which engine is chosen, why, and what is logged; engines that a pool keeps, which only the pool or its set closes."""

import logging

import pytest
import torch

from shards import Loader
from shards.common.errors import UsageError
from shards.engines import choose, dali, native, resident, selfcheck
from shards.engines.choose import EnginePool
from tests.support.parity import assert_parity, batches


class Recorder:
    """Stands in for an engine class, and remembers how it was made."""

    def __init__(self, *args, **options):
        self.args, self.options = args, options

    def resizing(self, interpolation):
        return self


@pytest.fixture
def a_gpu(monkeypatch):
    """Choose as on a machine with a GPU, with engines that do nothing."""
    monkeypatch.setattr(choose, "_check_device", lambda device: None)
    monkeypatch.setattr(resident, "free_bytes", lambda device: 0)
    monkeypatch.setattr(native, "NativeEngine", Recorder)
    monkeypatch.setattr(dali, "DaliEngine", Recorder)

    def says(variant, reason):
        monkeypatch.setattr(selfcheck, "best_variant", lambda *_: (variant, reason))

    return says


def make(selection, name, device="cuda:1"):
    options = {"device": torch.device(device), "threads": 3, "prefetch": 4, "interpolation": "bicubic"}
    return choose.make_engine(name, selection, **options)


@pytest.mark.parametrize(
    ("name", "engine", "reason"),
    [
        ("auto", "native", "the device is a CPU"),
        ("native", "native", "asked for"),
        ("dali", "dali", "asked for"),
        ("resident", "resident", "asked for"),
    ],
)
def test_on_a_cpu(shard_sets, caplog, name, engine, reason):
    with caplog.at_level(logging.INFO, logger="shards"):
        loader = Loader(shard_sets["jpg"].select("train"), batch_size=8, engine=name)
    assert (loader.engine_name, loader.engine_reason) == (engine, reason)
    assert f"engine {engine} on cpu: {reason}" in caplog.text
    loader.close()


@pytest.mark.parametrize("kind", ["jpg", "raw", "mixed"])
@pytest.mark.parametrize("variant", ["region", "whole"])
def test_auto_on_a_gpu_takes_the_variant_that_passed(shard_sets, caplog, a_gpu, kind, variant):
    a_gpu(variant, f"{variant} agreed")
    with caplog.at_level(logging.INFO, logger="shards"):
        engine, name, reason = make(shard_sets[kind].select("train"), "auto")
    assert (name, reason) == ("dali", f"{variant} agreed")
    assert engine.args == (shard_sets[kind], "cuda:1", 3, 4)
    assert engine.options == {"contents": kind, "variant": variant, "interpolation": "bicubic"}
    assert f"{variant} agreed" in caplog.text


def test_auto_on_a_gpu_holds_what_takes_at_most_40_percent_of_the_free_memory(shard_sets, monkeypatch, a_gpu):
    a_gpu("region", "region agreed")
    monkeypatch.setattr(resident, "ResidentEngine", Recorder)
    data, pool = shard_sets["jpg"], EnginePool()
    train, size = data.select("train", fraction=0.5), 72 * 96 * 3
    for pool_or_none, images in ((None, len(train)), (pool, len(data))):  # with a pool: the images of all splits
        needed = images * size
        for free, expected in ((2.51 * needed, "resident"), (2.49 * needed, "dali")):
            monkeypatch.setattr(resident, "free_bytes", lambda device, free=free: int(free))
            assert choose.choose("auto", train, torch.device("cuda:1"), pool_or_none)[0] == expected
    monkeypatch.setattr(resident, "free_bytes", lambda device: int(2.51 * len(data) * size))
    made = [choose.make_engine("auto", train, device=torch.device("cuda:1"), threads=3, prefetch=4, pool=pool)]
    monkeypatch.setattr(resident, "free_bytes", lambda device: 0)  # most of it is taken, by these images too
    made.append(choose.make_engine("auto", train, device=torch.device("cuda:1"), threads=3, prefetch=4, pool=pool))
    assert [name for _, name, _ in made] == ["resident"] * 2 and made[1][2].endswith("memory already")
    assert made[0][0]._engine is made[1][0]._engine
    assert len(made[0][0]._engine.args[0]) == len(data)


def test_auto_falls_back_to_native_and_says_why(shard_sets, caplog, a_gpu):
    a_gpu(None, "region decode crashed: SIGSEGV")
    with caplog.at_level(logging.WARNING, logger="shards"):
        engine, name, reason = make(shard_sets["jpg"].select("train"), "auto")
    assert (name, reason) == ("native", "region decode crashed: SIGSEGV")
    assert engine.args == (shard_sets["jpg"], "cuda:1", 3, 4, "bicubic")
    assert "dali does not work on cuda:1" in caplog.text


def test_dali_that_was_asked_for_and_does_not_work_is_an_error(shard_sets, a_gpu):
    a_gpu(None, "region decode hung: no answer in 180 s")
    with pytest.raises(UsageError, match=r"does not work on cuda:1: region decode hung.*--engine native"):
        make(shard_sets["jpg"].select("train"), "dali")


def test_dali_that_was_asked_for_is_checked_too(shard_sets, a_gpu):
    a_gpu("whole", "region decode crashed: SIGSEGV; whole-image decode with a slice agreed")
    engine, name, reason = make(shard_sets["jpg"].select("train"), "dali")
    assert name == "dali" and engine.options["variant"] == "whole" and reason.startswith("asked for; region decode")


def test_without_dali(shard_sets, caplog, a_gpu, monkeypatch):
    monkeypatch.setattr(choose, "_dali_installed", lambda: False)
    selection = shard_sets["jpg"].select("train")
    with caplog.at_level(logging.WARNING, logger="shards"):
        assert make(selection, "auto")[1:] == ("native", "DALI is not installed")
    assert "DALI is not installed" in caplog.text
    for device in ("cpu", "cuda:0"):
        with pytest.raises(UsageError, match="needs the package nvidia-dali-cuda120"):
            make(selection, "dali", device)


def test_devices_that_are_not_there_are_refused(shard_sets, monkeypatch):
    selection = shard_sets["jpg"].select("train")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "native", "dali", "resident"):
        with pytest.raises(UsageError, match="'cuda:2' was asked for and PyTorch sees 2 GPUs"):
            make(selection, name, "cuda:2")
        with pytest.raises(UsageError, match="'meta' is unknown"):
            make(selection, name, "meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="'cuda' was asked for and PyTorch sees 0 GPUs"):
        make(selection, "auto", "cuda")


def test_an_unknown_engine_is_refused_with_the_known_ones(shard_sets):
    with pytest.raises(UsageError, match="'fast' is unknown: use auto, native, dali, resident"):
        make(shard_sets["jpg"].select("train"), "fast", "cpu")


# ------------------------------------------------------------------ engines of a pool


class Counted:
    """An engine that counts how often it was closed."""

    def __init__(self) -> None:
        self.closed = 0

    def run(self, requests, resolution):
        yield from ()

    def close(self) -> None:
        self.closed += 1


def test_the_same_set_and_options_get_the_same_engine(shard_sets):
    pool, made = EnginePool(), []

    def make() -> Counted:
        made.append(Counted())
        return made[-1]

    jpg, raw = shard_sets["jpg"], shard_sets["raw"]
    for data, options in ((jpg, "a"), (jpg, "a"), (jpg, "b"), (raw, "a"), (jpg, "a")):
        pool.get(data, options, make).close()
    assert [engine.closed for engine in made] == [0, 0, 0]
    pool.close(jpg)
    assert [engine.closed for engine in made] == [1, 1, 0]
    pool.get(jpg, "a", make)
    assert len(made) == 4
    pool.close()
    assert [engine.closed for engine in made] == [1, 1, 1, 1]


def test_loaders_of_a_pool_give_the_batches_of_their_own(shard_sets):
    """Also where one has stopped in mid-epoch, and where another one runs at the same time."""
    pool, selection = EnginePool(), shard_sets["mixed"].select("train")
    expected = batches(Loader(selection, batch_size=8, resolution=32, engine="native"))
    first = Loader(selection, batch_size=8, resolution=32, engine="dali", pool=pool)
    running = iter(first)
    next(running)
    second = Loader(selection, batch_size=8, resolution=32, engine="dali", pool=pool)
    assert_parity(expected, batches(second))
    second.close()
    assert_parity(expected[1:], list(running))
    first.close()
    third = Loader(selection, batch_size=8, resolution=32, engine="dali", pool=pool)
    assert_parity(expected, batches(third))
    third.close()
    pool.close()
