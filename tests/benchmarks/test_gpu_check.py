"""The checks of a GPU. With one, each section is a test; without, all of them are run on the CPU.

Each comparison is also tested with engines that are wrong in a known way.
"""

import itertools
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import checks, gpu_check, trainings
from benchmarks.checks import WRITE_MODES, Check, Context, Settings, engine_checks, make_sets
from benchmarks.evidence import Evidence, read_evidence
from benchmarks.gpu_check import LIMIT_S, Section, attempt, run_checks, run_section, sections_of
from shards.common.errors import DataError
from shards.shardset import ShardSet

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = Settings(
    batches=3,
    load_side=64,
    load_repeats=1,
    causes=(("test_resnet", False),),
    models=("test_vit",),
    styles=("eager", "graphed"),
    whole_run="test_resnet",
    steps=2,
    seconds=0.1,
    compared=6,
    at_once=(1,),
    batch_size=8,
    resolution=32,
)


# ------------------------------------------------------------------ on a GPU


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """Device, settings, sets and scratch of the sections."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder = tmp_path_factory.mktemp("gpu")
    return torch.device("cuda", 0), Settings(), make_sets(folder, Settings()), folder


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(9))
def test_section_passes_on_a_gpu(number: int, on_gpu, tmp_path):
    section, evidence = sections_of(Settings(), list(WRITE_MODES), "cuda")[number], Evidence(tmp_path / "e", {}, print)
    run_section(section, (*on_gpu[:3], tmp_path), evidence, section.limit_s)
    assert not [check for check in evidence.checks if check["result"] != "pass"]


# ------------------------------------------------------------------ the list


def test_every_check_is_listed_once_and_all_sections_end_within_the_limit():
    sections = sections_of(Settings(), list(WRITE_MODES), "cuda")
    names = [check.name for section in sections for check in section.checks]
    assert len(set(names)) == len(names) and len(sections) == 9
    assert sum(section.limit_s for section in sections) <= LIMIT_S
    assert sections[0].name == "engines" and all(section.name.startswith("causes") for section in sections[1:4])
    for source in trainings.SOURCES:
        assert f"resnet18, compiled: {source}" in names
    for model, style in itertools.product(trainings.models.MODELS, Settings().styles):
        assert {f"speed of {model}, {style}: cached", f"speed of {model}, {style}: resident"} <= set(names)


# ------------------------------------------------------------------ on a CPU


def passed(evidence: Evidence) -> dict[str, dict]:
    """The numbers of each check by its name; all have to have passed."""
    assert not [check for check in evidence.checks if check["result"] != "pass"]
    return {check["name"]: check["numbers"] for check in evidence.checks}


@pytest.mark.slow
def test_the_whole_check_runs_on_a_cpu_and_says_that_it_counts_for_nothing(shard_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, lines = tmp_path / "deep" / "cpu.json", []
    sets = {"jpg": shard_sets["jpg"].path}
    # a busy machine takes long to start its processes
    monkeypatch.setattr(
        gpu_check, "sections_of", lambda *a: [replace(section, limit_s=1e4) for section in sections_of(*a)]
    )
    evidence = run_checks(CPU, out, TINY, sets, command="a test", announce=lines.append, limit_s=1e4)
    found = json.loads(out.read_text())
    assert found["device"] == "cpu" and found["counts_as_gpu_evidence"] is False
    with pytest.raises(DataError, match="made on a CPU"):
        read_evidence(out)
    assert found["finished"] and found["environment"]["command"] == "a test" and found["settings"]["steps"] == 2
    assert "torch" in found["environment"]["versions"] and found["environment"]["torch"]["device"] == "cpu"
    numbers = passed(evidence)
    assert found["passed"] and len(found["checks"]) == len(lines)
    listed = [check.name for section in sections_of(TINY, ["jpg"], "cpu") for check in section.checks]
    assert list(numbers) == listed
    parity = numbers["parity of dali region (jpg, training)"]
    assert parity["images"] == 24 and parity["max_difference"] <= 1 and parity["values"] == 24 * 3 * 32 * 32
    assert sum(parity["histogram"]) == parity["values"]
    assert "agreed with native" in numbers["self-check of dali whole (jpg)"]["reason"]
    speeds = [found for found in numbers.values() if "source" in found]
    assert len(speeds) == len(trainings.SOURCES) + 2 * 2
    for one in speeds:
        assert one["img_per_s"] > 0 and one["steps"] >= 2 and one["switches_per_step"] >= 0 and one["gpu_busy"] is None
        assert 0 < one["main_cpu_share"] < 1.5 and one["kernel_share"] > 0
    assert numbers["losses of graphed steps"]["largest_difference"] == 0
    resumed = numbers["resumed run"]
    assert resumed["uninterrupted"]["train_loss"] == resumed["resumed"]["train_loss"]
    assert numbers["run with averaged weights"]["weights"].startswith("average")
    assert numbers["1 cells at a time"]["img_per_s"] > 0
    assert len(numbers["grid of 2 × 2"]["seconds"]) == 2
    assert numbers["whole run of test_resnet"]["seconds"]["train"] > 0


# A section runs in a process of its own, which finds it by its name: this stands in for the list there and here.


def stand_in(settings: Settings, contents: list[str], device_type: str) -> list[Section]:
    def hang(context: Context) -> checks.Found:
        time.sleep(600)
        return True, {}

    def die(context: Context) -> checks.Found:
        os._exit(3)

    def good(context: Context) -> checks.Found:
        return True, {"n": 1}

    ends = {"hangs": hang, "dies": die, "ends": good}
    return [
        Section(name, 60, [Check("before", good), Check(name, end), Check("after", good)]) for name, end in ends.items()
    ]


def serve_stand_in(pipe, name, given):
    gpu_check.sections_of = stand_in
    gpu_check_serve(pipe, name, given)


gpu_check_serve = gpu_check._serve


def test_a_crash_or_a_limit_ends_its_section_alone_and_is_in_the_file_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_serve", serve_stand_in)
    clock = SimpleNamespace(ahead=0.0, perf_counter=lambda: time.perf_counter() + clock.ahead)
    monkeypatch.setattr(gpu_check, "time", clock)
    evidence = Evidence(tmp_path / "e.json", {}, lambda line: None)
    kept: dict[str, list[int]] = {}
    keep = evidence.keep

    def watched(section: str, check: dict) -> None:
        keep(section, check)
        clock.ahead += 1e6 if section == "hangs" else 0.0
        kept.setdefault(section, []).append(len(json.loads(evidence.out.read_text())["checks"]))

    monkeypatch.setattr(evidence, "keep", watched)
    for section in stand_in(TINY, [], "cpu"):
        run_section(section, (CPU, TINY, {}, tmp_path), evidence, 300.0)
    assert kept == {"hangs": [1, 2, 3], "dies": [4, 5, 6], "ends": [7, 8, 9]}
    results = [check["result"] for check in evidence.checks]
    assert results == ["pass", "fail", "not run", "pass", "fail", "not run", "pass", "pass", "pass"]
    assert evidence.checks[1]["error"] == "not done when the 300 s of its section were over"
    assert evidence.checks[4]["error"] == "its process ended with exit code 3"


def test_the_time_in_which_kernels_ran_counts_none_twice():
    assert trainings.union([]) == 0
    assert trainings.union([(5, 6), (0, 2), (1, 3), (1, 2), (3, 4)]) == 5
    spans = [(start, start + 1) for start in torch.rand(50).mul(20).tolist()]
    grid = torch.arange(0, 21, 0.001)
    covered = sum((grid >= start) & (grid < end) for start, end in spans) > 0  # pyright: ignore
    assert trainings.union(spans) == pytest.approx(float(covered.sum()) * 0.001, abs=0.06)


def test_the_profiler_sees_what_ran_and_not_the_rest():
    matrix = torch.rand(400, 400)

    def work() -> None:
        time.sleep(0.3)
        matrix @ matrix

    assert 0 < trainings.kernel_s(CPU, work) < 0.3


def engine_of(change):
    """Native, with something done to the list of its batches."""

    class Wrong:
        def __init__(self, data):
            self.native = checks.NativeEngine(data, "cpu")

        def run(self, requests, resolution):
            yield from change([images.clone() for images in self.native.run(requests, resolution)])

    return Wrong


def brighter_by(values):
    return lambda batches: [torch.clamp(b.int() + values, 0, 255).to(torch.uint8) for b in batches]


@pytest.fixture
def compared(shard_sets):
    """A call that gives native's batches of 8 at 32 px to an engine, changed, and compares what comes out."""
    data = shard_sets["jpg"].select("train")
    requests = checks.requests_of(data, train=True, batch_size=8, batches=4)
    expected = checks.reference(data, requests, 32)

    def compare(change, allowed, load=None):
        engine = engine_of(change)(data.data)
        if load is not None:
            return checks.stress(engine, requests, expected, 32, allowed, load)
        return checks.parity(engine, CPU, requests, expected, 32, allowed)

    return compare


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
def test_parity_fails_where_pixels_differ_by_more_than_is_allowed(compared, change, allowed, passes):
    passed, numbers = compared(change, allowed)
    assert passed is passes
    assert numbers["images"] == 32 and numbers["values"] == 32 * 3 * 32 * 32


@pytest.mark.parametrize(
    "change",
    [
        lambda batches: batches[:-1],
        lambda batches: [b[:-1] for b in batches],
        lambda batches: [b.float() for b in batches],
    ],
    ids=["a batch too few", "an image too few", "another kind"],
)
def test_batches_of_another_shape_are_errors(compared, change):
    with pytest.raises(ValueError):
        compared(change, checks.RAW)


def unfinished(batches):
    """What an engine does that forgets to let the consumer wait: batches are filled after they were handed over."""
    for batch in batches:
        handed = torch.zeros_like(batch)
        late = threading.Thread(target=lambda batch=batch, handed=handed: (time.sleep(0.05), handed.copy_(batch)))
        late.start()
        yield handed
        late.join()


def test_stress_finds_batches_that_are_handed_over_unfinished(compared):
    load = checks.heavy_kernels(CPU, 16, 1)
    good, bad = (compared(change, checks.ROUNDING, load) for change in (iter, unfinished))
    assert good[0] and good[1]["max_difference"] == 0
    assert not bad[0] and bad[1]["max_difference"] > 50


def test_requests_are_those_of_the_loader(shard_sets):
    selection = shard_sets["jpg"].select("train")
    loader = checks.Loader(selection, batch_size=16, resolution=24, seed=1)
    steps = 2 * len(loader)
    requests = checks.requests_of(selection, train=True, batch_size=16, batches=steps)
    batches = [b for _ in range(2) for b in loader]
    assert [r.samples.tolist() for r in requests] == [b.samples.tolist() for b in batches]
    for images, batch in zip(checks.reference(selection, requests, 24), batches, strict=True):
        assert torch.equal(images, batch.images)
    val = shard_sets["jpg"].select("val")
    seen = [s for r in checks.requests_of(val, train=False, batch_size=16, batches=100) for s in r.samples.tolist()]
    assert seen == val.samples.tolist()


def test_errors_are_kept_by_name_and_the_rest_goes_on(tmp_path):
    lines: list[str] = []
    evidence = Evidence(tmp_path / "e.json", {"format": 1}, lines.append)
    context = Context(CPU, TINY, {}, tmp_path)
    found: dict[str, Any] = {
        "good": lambda _: (True, {"worst": float("nan")}),
        "broken": lambda _: 1 / 0,
        "bad": lambda _: (False, {"n": 1}),
        "later": lambda _: (True, {}),
    }
    for name, run in found.items():
        evidence.keep("a section", attempt(Check(name, run, needs="bad" if name == "later" else ""), context))
    before = json.loads((tmp_path / "e.json").read_text())
    assert before["finished"] is before["passed"] is False and len(before["checks"]) == 4
    evidence.write(finished=True)
    after = json.loads((tmp_path / "e.json").read_text())
    assert [c["result"] for c in after["checks"]] == ["pass", "fail", "fail", "not run"]
    assert after["checks"][0]["numbers"] == {"worst": "nan"} and after["checks"][0]["section"] == "a section"
    assert after["checks"][1]["error"].startswith("ZeroDivisionError") and "ZeroDivisionError" in lines[1]
    assert evidence.failed == ["broken", "bad", "later"] and after["finished"] and not after["passed"]


def test_a_variant_whose_self_check_fails_is_not_loaded_in_this_process(shard_sets, tmp_path, monkeypatch):
    def wrong(*_, variant, **__):
        built.append(variant)
        raise RuntimeError("a decoder that fails")

    built: list[str] = []
    monkeypatch.setattr(checks, "_self_check", lambda contents, variant, context: (variant == "whole", {}))
    monkeypatch.setattr(checks, "DaliEngine", wrong)
    context = Context(CPU, TINY, {"jpg": shard_sets["jpg"].path}, tmp_path)
    results = {check.name: attempt(check, context) for check in engine_checks("jpg", "cpu")}
    context.close()
    assert set(built) == {"whole"}
    left_out = {name for name, check in results.items() if check["result"] == "not run"}
    assert left_out == {name for name in results if "of dali region" in name and "self-check" not in name}
    assert results["parity of dali whole (jpg, training)"]["error"] == "RuntimeError: a decoder that fails"
    assert results["parity of resident (jpg, training)"]["result"] == "pass"


def test_graphed_steps_with_other_losses_are_found(shard_sets, tmp_path, monkeypatch):
    context = Context(CPU, TINY, {"jpg": shard_sets["jpg"].path}, tmp_path)
    steps, factor = trainings.steps, {True: 1.1, False: 1.0}

    def changed(run):
        for take in steps(run):
            yield lambda rate, take=take: take(rate) * factor[run.graphs.on]

    monkeypatch.setattr(trainings, "steps", changed)
    good, numbers = trainings.losses(context)
    context.close()
    assert not good and numbers["largest_difference"] == pytest.approx(0.1)
    assert numbers["of_two_eager_trainings"] == 0 and len(numbers["losses"]["eager"]) == TINY.compared


def test_sets_are_made_on_the_spot(tmp_path):
    sets = make_sets(tmp_path, replace(TINY, images=60, other_images=40, packed_px=64))
    for kinds, path in sets.items():
        with ShardSet(path) as data:
            assert len(data) == (60 if kinds == "jpg" else 40) and int(data.column("width").max()) == 64
            encodings = set(data.column("encoding").tolist())
            assert encodings == ({"jpg", "raw"} if kinds == "mixed" else {kinds})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_ends_in_one_line():
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: no CUDA device") and len(done.stderr.splitlines()) == 1
