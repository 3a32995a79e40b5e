"""The check of the dali engine in a process of its own: what it answers, and what becomes of a process that breaks."""

import json
import logging
import sys
import time

import numpy as np
import pytest
import torch

from shards.common import kept
from shards.engines import choose, native, resident, selfcheck

CPU = torch.device("cpu")
AGREES = {"jpg": {"mean": 0.1, "max": 1.0, "within_4": 1.0}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and nothing known from other tests, whose folders may have had the same name."""
    monkeypatch.setattr(selfcheck, "_inconclusive", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dermscale"


def python(code: str) -> list[str]:
    """A child that runs this code in the place of the real one."""
    return [sys.executable, "-c", f"import json, os, sys, time\nquestion = json.load(sys.stdin)\n{code}"]


def answers(apart) -> list[str]:
    return python(f"print(json.dumps({apart!r}))")


def test_the_real_check_passes_and_its_verdict_is_kept(shard_sets, cache):
    selection = shard_sets["mixed"].select("train")
    assert selfcheck.best_variant(selection, CPU)[0] == "whole"
    passed, reason = selfcheck.check(selection, CPU, "whole", child=python("os.abort()"))  # not run again
    assert passed and "whole" not in reason
    assert "jpg mean" in reason and "raw mean" in reason and f"kept in {cache}" in reason
    assert len(list(cache.iterdir())) == 1


def test_an_engine_that_disagrees_is_found_out(shard_sets):
    """The real process, with an engine in it that gives batches top to bottom."""
    wrong = python(
        "import io\n"
        "from shards.engines import dali, selfcheck\n"
        "right = dali.DaliEngine.run\n"
        "dali.DaliEngine.run = lambda *args: (images.flip(2) for images in right(*args))\n"
        "sys.stdin = io.StringIO(json.dumps(question))\n"
        "selfcheck.main()"
    )
    passed, reason = selfcheck.check(shard_sets["jpg"].select("train"), CPU, "region", child=wrong)
    assert not passed and reason.startswith("disagreed with native (jpg mean")


@pytest.mark.parametrize(
    ("child", "words"),
    [
        (python("os.abort()"), "crashed: SIGABRT"),
        (python("os.kill(os.getpid(), 11)"), "crashed: SIGSEGV"),
        (python("os.kill(os.getpid(), 8)"), "crashed: SIGFPE"),
        (answers({"jpg": {"mean": 9.0, "max": 80.0, "within_4": 0.5}}), "disagreed with native"),
    ],
)
def test_a_broken_decoder_is_remembered(shard_sets, caplog, child, words):
    selection = shard_sets["jpg"].select("train")
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="shards"):
        variant, reason = selfcheck.best_variant(selection, CPU, child=child, timeout_s=1)
    assert time.monotonic() - began < 30
    assert variant is None
    assert f"region decode {words}" in reason and f"whole-image decode with a slice {words}" in reason
    assert f"region decode {words}" in caplog.text
    again = selfcheck.best_variant(selection, CPU, child=answers(AGREES))
    assert again[0] is None and "kept in" in again[1]


def test_the_children_of_a_hung_check_end_with_it(shard_sets, tmp_path):
    file = tmp_path / "alive"
    grandchild = f"import time\nfor _ in range(200):\n  open({str(file)!r}, 'a').write('.')\n  time.sleep(0.05)"
    code = f"import subprocess\nsubprocess.Popen([sys.executable, '-c', {grandchild!r}])\ntime.sleep(60)"
    selfcheck.check(shard_sets["jpg"].select("train"), CPU, "region", child=python(code), timeout_s=2)
    time.sleep(0.3)
    written = file.stat().st_size
    time.sleep(0.5)
    assert 0 < written == file.stat().st_size


def test_region_decode_is_next_where_whole_image_decode_crashes(shard_sets):
    child = python(f"question['variant'] == 'whole' and os.abort()\nprint('noise')\nprint(json.dumps({AGREES!r}))")
    variant, reason = selfcheck.best_variant(shard_sets["jpg"].select("train"), CPU, child=child)
    assert variant == "region"
    assert reason.startswith("whole-image decode with a slice crashed: SIGABRT") and "; region decode agreed" in reason


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('CUDA out of memory')", "could not be checked: RuntimeError: CUDA out of memory"),
        ("os.kill(os.getpid(), 9)", "ended from outside: SIGKILL"),  # as the kernel does where memory ran out
        ("os.kill(os.getpid(), 15)", "ended from outside: SIGTERM"),
        ("time.sleep(60)", "hung: no answer in 2 s"),
    ],
)
def test_a_failure_that_says_nothing_of_the_decoder_is_kept_for_this_process_alone(
    shard_sets, cache, monkeypatch, code, words
):
    selection = shard_sets["jpg"].select("train")
    passed, reason = selfcheck.check(selection, CPU, "region", child=python(code), timeout_s=2)
    assert not passed and words in reason
    assert not cache.exists()
    passed, again = selfcheck.check(selection, CPU, "region", child=answers(AGREES))  # not run
    assert not passed and again.startswith(reason) and "the next process checks again" in again
    assert selfcheck.check(selection, CPU, "whole", child=answers(AGREES))[0]
    monkeypatch.setattr(selfcheck, "_inconclusive", {})  # as in another process
    assert selfcheck.check(selection, CPU, "region", child=answers(AGREES))[0]


def test_every_loader_of_a_process_gets_the_engine_of_the_first(shard_sets, monkeypatch):
    monkeypatch.setattr(choose, "_check_device", lambda device: None)
    monkeypatch.setattr(resident, "free_bytes", lambda device: 0)
    monkeypatch.setattr(native, "NativeEngine", lambda *_: None)
    monkeypatch.setattr(selfcheck, "_gpu_name", lambda device: "a GPU")
    monkeypatch.setattr(selfcheck, "_driver_version", lambda device: "1")
    asked = []

    def ask(selection, device, variant, *_):
        asked.append(variant)
        return (False, "hung: no answer in 180 s", False) if len(asked) <= 2 else (True, "agreed", True)

    monkeypatch.setattr(selfcheck, "_ask_child", ask)
    found = [
        choose.make_engine("auto", shard_sets["jpg"].select(split), device=torch.device("cuda"), threads=1, prefetch=1)[
            1:
        ]
        for split in ("train", "val", "train")
    ]
    assert asked == ["whole", "region"]
    assert [name for name, _ in found] == ["native"] * 3
    assert all("region decode hung" in reason and "with a slice hung" in reason for _, reason in found)


def key_of(data, variant="region", interpolation="bilinear"):
    return selfcheck.key_of(data, CPU, variant, np.arange(len(data)), interpolation)


def test_a_verdict_hangs_on_gpu_driver_versions_variant_interpolation_and_packing(shard_sets, monkeypatch):
    data = shard_sets["jpg"]
    key = key_of(data)
    assert key["versions"]["nvidia-dali"][0].isdigit() and key["versions"]["torch"][0].isdigit()
    others = [key_of(data, "whole"), key_of(data, interpolation="bicubic"), key_of(shard_sets["raw"])]
    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, "_gpu_name", lambda device: "NVIDIA H100")
        others.append(key_of(data))
        patch.setattr(selfcheck, "_driver_version", lambda device: "580.1")
        others.append(key_of(data))
    others.append(key | {"versions": key["versions"] | {"nvidia-dali": "2.5.0"}})
    files = {kept.file_of("dali", one) for one in [key, *others]}
    assert len(files) == 7
    kept.keep("dali", key, {"passed": True, "reason": "agreed"})
    assert kept.recall("dali", key, {"passed": bool, "reason": str}) == {"passed": True, "reason": "agreed"}
    assert kept.recall("dali", key, {"passed": str}) is kept.recall("dali", others[0], {"passed": bool}) is None


def test_a_verdict_hangs_on_the_encodings_that_were_checked(shard_sets):
    """Two sets of one write mode, as `smart` with two thresholds makes them."""
    raw, mixed = shard_sets["raw"], shard_sets["mixed"]
    assert raw.manifest.encode == mixed.manifest.encode
    assert key_of(raw) != key_of(mixed)
    only_raw = np.flatnonzero(mixed.column("encoding") == "raw")
    assert selfcheck.key_of(mixed, CPU, "region", only_raw)["encodings"] == ["raw"]
    selfcheck.check(raw.select("train"), CPU, "region", child=answers(AGREES))
    assert not selfcheck.check(mixed.select("train"), CPU, "region", child=python("os.abort()"))[0]


def test_a_damaged_or_unwritable_cache_means_another_check(shard_sets, cache, caplog):
    selection = shard_sets["jpg"].select("train")
    key = selfcheck.key_of(selection.data, CPU, "region", selection.samples)
    cache.mkdir(parents=True)
    kept.file_of("dali", key).write_text('{"key":')
    with caplog.at_level(logging.WARNING, logger="shards"):
        assert selfcheck.check(selection, CPU, "region", child=answers(AGREES))[0]
        assert "found out again" in caplog.text
        assert json.loads(kept.file_of("dali", key).read_text())["passed"] is True
        for file in cache.iterdir():
            file.unlink()
        cache.rmdir()
        cache.write_text("in the way")
        assert selfcheck.check(selection, CPU, "region", child=answers(AGREES))[0]
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("encoding", "found", "on_cpu", "on_gpu"),
    [
        ("jpg", (0.1, 1, 1.0), True, True),
        ("jpg", (0.9, 30, 0.9995), False, True),
        ("jpg", (1.1, 3, 1.0), False, False),
        ("jpg", (0.5, 9, 0.998), False, False),
        ("raw", (0.1, 1, 1.0), True, True),
        ("raw", (0.01, 2, 1.0), False, False),
    ],
)
def test_the_tolerances(encoding, found, on_cpu, on_gpu):
    apart = {"raw": {"mean": 0.0, "max": 0.0, "within_4": 1.0}}
    apart |= {encoding: dict(zip(("mean", "max", "within_4"), found, strict=True))}
    assert selfcheck.judge(apart, "cpu")[0] is on_cpu
    assert selfcheck.judge(apart, "cuda:0")[0] is on_gpu


def test_samples_of_both_encodings_are_checked(shard_sets):
    selection = shard_sets["mixed"].select("train")
    rows = selfcheck._some_of_each(selection)
    encodings = selection.data.column("encoding")[rows]
    assert len(rows) == len(np.unique(rows)) == 64
    assert (encodings == "jpg").sum() == (encodings == "raw").sum() == 32
