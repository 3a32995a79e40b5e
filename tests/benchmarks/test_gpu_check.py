"""The GPU check, run whole on the CPU; each comparison, with engines that are wrong in a known way."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import checks, suite
from benchmarks.check_training import WATCHED, training_steps
from benchmarks.evidence import Evidence, read_evidence
from benchmarks.gpu_check import make_sets, run_checks
from benchmarks.suite import Settings
from shards.common.errors import DataError
from shards.shardset import ShardSet

CPU = torch.device("cpu")
TINY = Settings(
    models=("resnet18",),
    compiled=(),
    steps=2,
    seconds=0.0,
    batch_size=8,
    resolution=32,
    batches=3,
    load_side=64,
    load_repeats=1,
)


@pytest.mark.slow
def test_the_whole_check_runs_on_a_cpu_and_says_that_it_counts_for_nothing(shard_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, lines = tmp_path / "deep" / "cpu.json", []
    evidence = run_checks(CPU, out, TINY, {"mixed": shard_sets["mixed"].path}, command="a test", told=lines.append)
    found = json.loads(out.read_text())
    assert (
        found["device"] == "cpu"
        and found["counts_as_gpu_evidence"] is False
        and "nothing about any GPU" in found["note"]
    )
    with pytest.raises(DataError, match="made on a CPU"):
        read_evidence(out)
    assert found["finished"] and found["environment"]["command"] == "a test" and found["settings"]["steps"] == 2
    assert "torch" in found["environment"]["versions"] and found["environment"]["torch"]["device"] == "cpu"
    results = {check["name"]: check for check in found["checks"]}
    assert len(results) == len(found["checks"]) == len(lines)
    errors = {name: check["error"] for name, check in results.items() if check["error"]}
    busy = {"sampling"}  # whether it keeps its pace hangs on how busy this machine is
    assert {name for name, check in results.items() if check["result"] != "pass"} <= busy, errors
    assert found["passed"] is (not evidence.failed)
    assert set(results) == {
        "self-check of dali region (mixed)",
        "self-check of dali whole (mixed)",
        "choice of auto (mixed)",
        *(
            f"{what} of {engine} (mixed, {which})"
            for engine in ("native", "dali region", "dali whole", "resident")
            for what, which in (
                ("parity", "training"),
                ("parity", "evaluation"),
                ("stream order", "default stream"),
            )
        ),
        "connection to the counters",
        "training of resnet18",
        "whole run of resnet18",
        "sampling",
    }
    parity = results["parity of dali region (mixed, training)"]["numbers"]
    assert parity["images"] == 24 and parity["max_difference"] <= 1 and parity["values"] == 24 * 3 * 32 * 32
    assert sum(parity["histogram"]) == parity["values"]
    training = results["training of resnet18"]["numbers"]
    assert training["img_per_s"] > 0 and training["cached_img_per_s"] > 0 and 0 <= training["data_wait_share"] <= 1
    assert training["steps"] == 2 and training["peak_memory_bytes"] > 0 and training["first_loss"] > 0
    assert isinstance(training["utilization"], dict) and "span" not in training  # steps may be too short to be read
    assert training["decisions"]["compile"]["value"] == "off"
    whole = results["whole run of resnet18"]["numbers"]
    assert whole["steps"] == 2 and 0 <= whole["test_balanced_accuracy"] <= 1
    assert results["sampling"]["numbers"]["device"] == "CPU"
    assert "agreed with native" in results["self-check of dali whole (mixed)"]["numbers"]["reason"]


def engine_of(change):
    """Native, with something done to the list of its batches."""

    class Wrong:
        def __init__(self, data):
            self.native = checks.NativeEngine(data, "cpu")

        def run(self, work, resolution):
            yield from change([images.clone() for images in self.native.run(work, resolution)])

    return Wrong


def brighter_by(values):
    return lambda batches: [torch.clamp(b.int() + values, 0, 255).to(torch.uint8) for b in batches]


@pytest.mark.parametrize(
    ("change", "allowed", "passes"),
    [
        (lambda batches: batches, checks.SAME, True),
        (brighter_by(1), checks.SAME, False),
        (brighter_by(1), checks.RAW, False),  # the mean must be under 1, not 1
        (brighter_by(2), checks.RAW, False),
        (brighter_by(1), checks.ROUNDING, False),
        (brighter_by(3), checks.DECODED_ON_GPU, False),
        (lambda batches: batches[::-1], checks.DECODED_ON_GPU, False),
        (lambda batches: [b.flip(3).contiguous(memory_format=torch.channels_last) for b in batches], checks.RAW, False),
    ],
)
def test_parity_fails_where_pixels_differ_by_more_than_is_allowed(shard_sets, change, allowed, passes):
    selection = shard_sets["jpg"].select("train")
    work = checks.work_of(selection, train=True, batch_size=8, batches=4)
    expected = checks.reference(selection, work, 40)
    passed, numbers = checks.parity(engine_of(change)(selection.data), CPU, work, expected, 40, allowed)
    assert passed is passes
    assert numbers["images"] == 32 and numbers["values"] == 32 * 3 * 40 * 40


@pytest.mark.parametrize(
    "change",
    [
        lambda batches: batches[:-1],
        lambda batches: [b[:-1] for b in batches],
        lambda batches: [b.float() for b in batches],
    ],
    ids=["a batch too few", "an image too few", "another kind"],
)
def test_batches_of_another_shape_are_errors(shard_sets, change):
    selection = shard_sets["jpg"].select("train")
    work = checks.work_of(selection, train=True, batch_size=8, batches=2)
    with pytest.raises(ValueError):
        checks.parity(
            engine_of(change)(selection.data), CPU, work, checks.reference(selection, work, 24), 24, checks.RAW
        )


def unfinished(batches):
    """What an engine does that forgets to let the consumer wait: batches are filled after they were handed over."""
    for batch in batches:
        handed = torch.zeros_like(batch)
        late = threading.Thread(target=lambda batch=batch, handed=handed: (time.sleep(0.05), handed.copy_(batch)))
        late.start()
        yield handed
        late.join()


def test_stress_finds_batches_that_are_handed_over_unfinished(shard_sets):
    selection = shard_sets["jpg"].select("train")
    work = checks.work_of(selection, train=True, batch_size=8, batches=3)
    expected = checks.reference(selection, work, 32)
    load = checks.heavy_kernels(CPU, 16, 1)
    good, bad = (
        checks.stress(engine_of(change)(selection.data), work, expected, 32, checks.ROUNDING, load)
        for change in (iter, unfinished)
    )
    assert good[0] and good[1]["max_difference"] == 0
    assert not bad[0] and bad[1]["max_difference"] > 50


def test_work_is_that_of_the_loader(shard_sets):
    selection = shard_sets["jpg"].select("train")
    loader = checks.Loader(selection, batch_size=16, resolution=24, seed=1)
    steps = 2 * len(loader)
    work = checks.work_of(selection, train=True, batch_size=16, batches=steps)
    batches = [b for _ in range(2) for b in loader]
    assert [w.samples.tolist() for w in work] == [b.samples.tolist() for b in batches]
    for images, batch in zip(checks.reference(selection, work, 24), batches, strict=True):
        assert torch.equal(images, batch.images)
    val = shard_sets["jpg"].select("val")
    seen = [s for w in checks.work_of(val, train=False, batch_size=16, batches=100) for s in w.samples.tolist()]
    assert seen == val.samples.tolist()


def test_tolerances_hang_on_engine_contents_and_device(shard_sets):
    gpu = torch.device("cuda:0")
    assert checks.tolerance("native", "jpg", gpu) == checks.SAME
    assert checks.tolerance("dali region", "raw", gpu) == checks.RAW
    assert checks.tolerance("dali whole", "mixed", gpu) == checks.DECODED_ON_GPU
    assert checks.tolerance("dali whole", "jpg", CPU) == checks.tolerance("resident", "jpg", gpu) == checks.ROUNDING
    assert "dali whole" in checks.engines(shard_sets["mixed"].select("train"), CPU)
    assert "dali whole" not in checks.engines(shard_sets["raw"].select("train"), CPU)


def test_errors_are_kept_by_name_and_the_rest_goes_on(tmp_path):
    lines = []
    evidence = Evidence(tmp_path / "e.json", {"format": 1}, lines.append)
    assert evidence.check("good", lambda: (True, {"worst": float("nan")}))
    assert not evidence.check("broken", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert not evidence.check("bad", lambda: (False, {"n": 1}))
    before = json.loads((tmp_path / "e.json").read_text())
    assert before["finished"] is before["passed"] is False and len(before["checks"]) == 3
    evidence.leave_out("later", "the reason")
    evidence.write(finished=True)
    after = json.loads((tmp_path / "e.json").read_text())
    assert [c["result"] for c in after["checks"]] == ["pass", "fail", "fail", "not run"]
    assert after["checks"][0]["numbers"] == {"worst": "nan"}
    assert after["checks"][1]["error"].startswith("ZeroDivisionError") and "ZeroDivisionError" in lines[1]
    assert evidence.failed == ["broken", "bad", "later"] and after["finished"] and not after["passed"]


def test_a_variant_whose_self_check_fails_is_not_loaded_in_this_process(shard_sets, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(suite, "_self_check", lambda selection, device, variant: (variant == "whole", {}))
    monkeypatch.setattr(checks, "DaliEngine", lambda *a, variant, **k: built.append(variant) or wrong())

    def wrong():
        raise RuntimeError("a decoder that fails")

    evidence = Evidence(tmp_path / "e.json", {}, lambda line: None)
    suite._check_engines(evidence, CPU, TINY, "jpg", shard_sets["jpg"])
    results = {check["name"]: check for check in evidence.checks}
    assert set(built) == {"whole"}
    left_out = {name for name, check in results.items() if check["result"] == "not run"}
    assert left_out == {name for name in results if "of dali region" in name and "self-check" not in name}
    assert results["parity of dali whole (jpg, training)"]["error"] == "RuntimeError: a decoder that fails"
    assert results["parity of resident (jpg, training)"]["result"] == "pass"


def test_a_device_that_cannot_be_read_is_trained_on_all_the_same(shard_sets, tmp_path, monkeypatch):
    def refuse(device):
        raise DataError("no driver")

    monkeypatch.setattr(suite, "readings_of", refuse)
    trained(monkeypatch, lambda model, compiled: {})
    evidence = Evidence(tmp_path / "e.json", {}, lambda line: None)
    suite.run_suite(evidence, CPU, Settings(), {"jpg": shard_sets["jpg"].path}, tmp_path)
    assert evidence.failed == ["connection to the counters"]
    names = [check["name"] for check in evidence.checks]
    assert sum(name.startswith("training of") for name in names) == 10 and "training of resnet18 (compiled)" in names


def trained(monkeypatch, loss) -> None:
    """Trainings that took no time, with losses of 1 but for `loss(model, compiled)`, and no other checks."""

    def steps(path, model, device, *, compiled, **settings):
        return True, {"span": (0.0, 1.0), **dict.fromkeys(("first_loss", "last_loss"), 1.0), **loss(model, compiled)}

    monkeypatch.setattr(suite, "training_steps", steps)
    monkeypatch.setattr(suite, "whole_run", lambda *a, **k: (True, {}))
    monkeypatch.setattr(suite, "_check_engines", lambda *a: None)


@pytest.mark.parametrize("which", ["first_loss", "last_loss"])
def test_compiled_training_that_learns_otherwise_is_found_out(shard_sets, tmp_path, monkeypatch, which):
    trained(monkeypatch, lambda model, compiled: {which: 0.9 if model == "vit_b16" else 0.98} if compiled else {})
    evidence = Evidence(tmp_path / "e.json", {}, lambda line: None)
    suite.run_suite(evidence, CPU, Settings(), {"jpg": shard_sets["jpg"].path}, tmp_path)
    assert [name for name in evidence.failed if name.startswith("training")] == ["training of vit_b16 (compiled)"]
    assert evidence.checks[-3]["numbers"]["eager_losses"] == [1.0, 1.0]


@pytest.mark.slow
def test_steps_whose_speed_is_taken_do_not_wait_for_the_device(tiny_shards, monkeypatch):
    waits = []
    monkeypatch.setattr("train.device.synchronize", waits.append)
    passed, found = training_steps(
        tiny_shards, "resnet18", CPU, steps=30, seconds=0, batch_size=4, resolution=32, compiled=False
    )
    assert passed and found["img_per_s"] > 0 and found["cached_img_per_s"] > 0
    assert 0 <= found["data_wait_share"] <= 1
    assert WATCHED < len(waits) < 30


def test_sampling_is_judged_by_pace_cost_and_end():
    good = {"error": "", "reached_hz": 8.0, "sampler_core_share": 0.004}  # held up while networks were compiled
    paced = [{"reached_hz": 9.0, "span_s": 1.0}, {"reached_hz": 12.0, "span_s": 3.0}]
    for change, trained, passes in (
        ({}, paced, True),
        ({"error": "x"}, paced, False),
        ({}, [*paced, {"reached_hz": 9.0, "span_s": 9.0}], False),
        ({}, [], False),
        ({"sampler_core_share": 0.02}, paced, False),
    ):
        sampler = SimpleNamespace(summary=lambda change=change: good | change)
        assert suite._judge_sampling(sampler, trained)[0] is passes  # type: ignore[arg-type]
    assert suite._judge_sampling(sampler, paced)[1]["training_hz"] == pytest.approx(11.25)  # type: ignore[arg-type]


def test_sets_are_made_on_the_spot(tmp_path):
    sets = make_sets(tmp_path, 40, 64)
    for kinds, path in sets.items():
        with ShardSet(path) as data:
            assert len(data) == 40 and int(data.column("width").max()) == 64
            encodings = set(data.column("encoding").tolist())
            assert encodings == ({"jpg", "raw"} if kinds == "mixed" else {kinds})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_ends_in_one_line():
    import subprocess
    import sys
    from pathlib import Path

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check"], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: no CUDA device") and len(done.stderr.splitlines()) == 1
