"""The checks of a GPU. With one, each check is a test; without, the list is run whole on the CPU.

Each comparison is also tested with engines that are wrong in a known way.
"""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import checks
from benchmarks.checks import WATCHED, WRITE_MODES, Check, Context, Settings, checks_of, make_sets, training_steps
from benchmarks.evidence import FOLDER, Evidence, read_evidence
from benchmarks.gpu_check import attempt, run_checks
from shards.common.errors import DataError
from shards.shardset import ShardSet

ROOT = Path(__file__).parents[2]
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


# ------------------------------------------------------------------ on a GPU


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """What the checks run on, and a file of evidence that is thrown away."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    settings, folder = Settings(), tmp_path_factory.mktemp("gpu")
    (folder / "scratch").mkdir()
    sets = make_sets(folder, settings.images, settings.packed_px)
    context = Context(torch.device("cuda"), settings, sets, folder / "scratch")
    yield context, Evidence(folder / "evidence.json", {}, print)
    context.close()


@pytest.mark.gpu
@pytest.mark.parametrize("check", checks_of(Settings(), list(WRITE_MODES), "cuda"), ids=lambda check: check.name)
def test_check_passes_on_a_gpu(check: Check, on_gpu):
    context, evidence = on_gpu
    attempt(check, context, evidence)
    found = evidence.checks[-1]
    assert found["result"] == "pass", found


def test_the_list_has_the_names_of_the_committed_evidence():
    listed = [check.name for check in checks_of(Settings(), list(WRITE_MODES), "cuda")]
    assert len(set(listed)) == len(listed)
    for path in (ROOT / FOLDER).glob("*.json"):
        assert [check["name"] for check in read_evidence(path)["checks"]] == listed


# ------------------------------------------------------------------ on a CPU


@pytest.mark.slow
def test_the_whole_check_runs_on_a_cpu_and_says_that_it_counts_for_nothing(shard_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, lines = tmp_path / "deep" / "cpu.json", []
    evidence = run_checks(CPU, out, TINY, {"mixed": shard_sets["mixed"].path}, command="a test", announce=lines.append)
    found = json.loads(out.read_text())
    assert found["device"] == "cpu" and found["counts_as_gpu_evidence"] is False
    with pytest.raises(DataError, match="made on a CPU"):
        read_evidence(out)
    assert found["finished"] and found["environment"]["command"] == "a test" and found["settings"]["steps"] == 2
    assert "torch" in found["environment"]["versions"] and found["environment"]["torch"]["device"] == "cpu"
    results = {check["name"]: check for check in found["checks"]}
    assert len(results) == len(found["checks"]) == len(lines)
    errors = {name: check["error"] for name, check in results.items() if check["error"]}
    busy = {"sampling"}  # its pace depends on the load of this machine
    assert {name for name, check in results.items() if check["result"] != "pass"} <= busy, errors
    assert found["passed"] is (not evidence.failed)
    assert list(results) == [check.name for check in checks_of(TINY, ["mixed"], "cpu")]
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
    lines = []
    evidence = Evidence(tmp_path / "e.json", {"format": 1}, lines.append)
    assert evidence.check("good", lambda: (True, {"worst": float("nan")}))
    assert evidence.check("empty", lambda: (True, {})) == {}
    assert evidence.check("broken", lambda: 1 / 0) is None  # type: ignore[arg-type, return-value]
    assert evidence.check("bad", lambda: (False, {"n": 1})) is None
    before = json.loads((tmp_path / "e.json").read_text())
    assert before["finished"] is before["passed"] is False and len(before["checks"]) == 4
    evidence.leave_out("later", "the reason")
    evidence.write(finished=True)
    after = json.loads((tmp_path / "e.json").read_text())
    assert [c["result"] for c in after["checks"]] == ["pass", "pass", "fail", "fail", "not run"]
    assert after["checks"][0]["numbers"] == {"worst": "nan"}
    assert after["checks"][2]["error"].startswith("ZeroDivisionError") and "ZeroDivisionError" in lines[2]
    assert evidence.failed == ["broken", "bad", "later"] and after["finished"] and not after["passed"]


def run(checks_: list[Check], shard_sets, tmp_path, settings=TINY) -> Evidence:
    """The evidence of these checks on the CPU."""
    context = Context(CPU, settings, {name: data.path for name, data in shard_sets.items()}, tmp_path)
    evidence = Evidence(tmp_path / "e.json", {}, lambda line: None)
    for check in checks_:
        attempt(check, context, evidence)
    context.close()
    return evidence


def test_a_variant_whose_self_check_fails_is_not_loaded_in_this_process(shard_sets, tmp_path, monkeypatch):
    def wrong(*_, variant, **__):
        built.append(variant)
        raise RuntimeError("a decoder that fails")

    built: list[str] = []
    monkeypatch.setattr(checks, "_self_check", lambda contents, variant, context: (variant == "whole", {}))
    monkeypatch.setattr(checks, "DaliEngine", wrong)
    evidence = run([c for c in checks_of(TINY, ["jpg"], "cpu") if "(jpg" in c.name], shard_sets, tmp_path)
    results = {check["name"]: check for check in evidence.checks}
    assert set(built) == {"whole"}
    left_out = {name for name, check in results.items() if check["result"] == "not run"}
    assert left_out == {name for name in results if "of dali region" in name and "self-check" not in name}
    assert results["parity of dali whole (jpg, training)"]["error"] == "RuntimeError: a decoder that fails"
    assert results["parity of resident (jpg, training)"]["result"] == "pass"


def trained(monkeypatch, loss) -> list[Check]:
    """The checks that train, which take no time here: losses are 1, or what `loss(model, compiled)` says."""

    def steps(path, model, device, settings, compiled):
        return True, {"span": (0.0, 1.0), **dict.fromkeys(("first_loss", "last_loss"), 1.0), **loss(model, compiled)}

    monkeypatch.setattr(checks, "training_steps", steps)
    monkeypatch.setattr(checks, "_whole_run", lambda *_: (True, {}))
    return [check for check in checks_of(Settings(), ["jpg"], "cpu") if "(jpg" not in check.name]


def test_training_goes_on_if_the_device_cannot_be_read(shard_sets, tmp_path, monkeypatch):
    def refuse(device):
        raise DataError("no driver")

    monkeypatch.setattr(checks, "reader_of", refuse)
    evidence = run(trained(monkeypatch, lambda model, compiled: {}), shard_sets, tmp_path)
    assert evidence.failed == ["connection to the counters", "sampling"]
    names = [check["name"] for check in evidence.checks]
    assert sum(name.startswith("training of") for name in names) == 10 and "training of resnet18 (compiled)" in names


@pytest.mark.parametrize("which", ["first_loss", "last_loss"])
def test_compiled_training_with_other_losses_is_found(shard_sets, tmp_path, monkeypatch, which):
    loss = lambda model, compiled: {which: 0.9 if model == "vit_b16" else 0.98} if compiled else {}  # noqa: E731
    evidence = run(trained(monkeypatch, loss), shard_sets, tmp_path)
    assert [name for name in evidence.failed if name.startswith("training")] == ["training of vit_b16 (compiled)"]
    assert evidence.checks[-3]["numbers"]["eager_losses"] == [1.0, 1.0]


@pytest.mark.slow
def test_steps_whose_speed_is_taken_do_not_wait_for_the_device(tiny_shards, monkeypatch):
    waits = []
    monkeypatch.setattr("train.device.synchronize", waits.append)
    settings = replace(TINY, steps=30, batch_size=4)
    passed, found = training_steps(tiny_shards, "resnet18", CPU, settings, compiled=False)
    assert passed and found["img_per_s"] > 0 and found["cached_img_per_s"] > 0
    assert 0 <= found["data_wait_share"] <= 1
    assert WATCHED < len(waits) < 30


def test_sampling_is_judged_by_pace_cost_and_end(tmp_path):
    good = {"error": "", "reached_hz": 8.0, "sampler_core_share": 0.004}  # slower while networks were compiled
    paced = [{"reached_hz": 9.0, "span_s": 1.0}, {"reached_hz": 12.0, "span_s": 3.0}]

    def judge(change: dict, trained: list) -> tuple:
        context = Context(CPU, TINY, {}, tmp_path, dict(enumerate(trained)))  # type: ignore[arg-type]
        context.sampler = SimpleNamespace(summary=lambda: good | change)  # type: ignore[assignment]
        return checks._judge_sampling(context)

    assert judge({}, paced)[0] and judge({}, paced)[1]["training_hz"] == pytest.approx(11.25)
    assert not judge({"error": "x"}, paced)[0]
    assert not judge({}, [*paced, {"reached_hz": 9.0, "span_s": 9.0}])[0]
    assert not judge({}, [])[0]
    assert not judge({"sampler_core_share": 0.02}, paced)[0]


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

    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: no CUDA device") and len(done.stderr.splitlines()) == 1
