"""Whether compiling pays off: the rule, the timing that checks it on a CPU, and what a process keeps."""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.train_runs import Heard, child_environment, small, step_of
from train import compiling, models
from train import device as devices
from train.compiling import Trial
from train.config import resolution_of
from train.device import Decision
from train.distributed import World

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_without_a_gpu_nothing_is_said_of_a_cuda_toolkit():
    script = """
import torch
from train import device
device.prepare(torch.device("cpu"))
from torch.utils import cpp_extension  # looks for the toolkit
cpp_extension.logger.warning("another warning")
cpp_extension.logger.filters.clear()
cpp_extension._find_cuda_home()
"""
    hidden = {"CUDA_HOME": "/toolkit", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=child_environment() | hidden, capture_output=True, text=True, check=True)
    first, second = done.stderr.splitlines()
    assert first.endswith("another warning")
    assert second.endswith("No CUDA runtime is found, using CUDA_HOME='/toolkit'")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """No finding of this machine, and none left to it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def never():
    raise AssertionError("asked for: nothing is to be timed")


@pytest.mark.parametrize("wanted", ["on", "off"])
def test_what_is_asked_for_is_done(wanted):
    assert compiling.choose(wanted, 21, CPU, never).value == wanted


def test_a_short_run_does_not_pay_for_compiling_and_a_long_one_does():
    for device, seconds in ((CPU, 21 * 3.5 / 0.1), (CUDA, (10 + 21 * 0.5) / 0.5)):
        assert compiling.choose("auto", 21, device, lambda s=seconds: 0.9 * s).value == "off"
        assert compiling.choose("auto", 21, device, lambda s=seconds: 1.1 * s).value == "on"


def test_what_was_timed_here_counts_instead_of_what_is_expected():
    for trial, value in (
        (Trial(eager_s=1.0, compiled_s=0.9, compile_s=11), "off"),  # saves 10 of 100 s
        (Trial(eager_s=1.0, compiled_s=0.9, compile_s=9), "on"),
        (Trial(eager_s=1.0, compiled_s=1.1, compile_s=0), "off"),
    ):
        found = compiling.choose("auto", 21, CPU, lambda: 100.0, trial)
        assert found.value == value and "measured here before" in found.reason


def test_the_rule_takes_what_was_faster_on_a_gpu():
    """By the committed evidence: 30 epochs of HAM10000's training split, 7,010 images."""
    evidence = json.loads((ROOT / "benchmarks" / "results" / "gpu" / "nvidia-h100-80gb-hbm3.json").read_text())
    numbers = {check["name"]: check["numbers"] for check in evidence["checks"]}
    for name, layers in (("resnet18", 21), ("vit_b16", 50)):
        eager, compiled = (numbers[f"training of {name}{kind}"] for kind in ("", " (compiled)"))
        for images in (1_000, 30 * 7_010):
            eager_s = images / eager["cached_img_per_s"]
            compiled_s = images / compiled["cached_img_per_s"] + compiled["compile_s"]
            expected = "on" if compiled_s < eager_s else "off"
            assert compiling.choose("auto", layers, CUDA, lambda s=eager_s: s).value == expected, (name, images)


def test_a_ramp_is_charged_for_every_size_that_is_compiled(monkeypatch):
    monkeypatch.setattr(compiling, "compiler", lambda: "c++")
    monkeypatch.setattr(compiling, "step_s", lambda *_: 1.0)  # a step of the full size
    for start, sizes, steps in ((None, 1, 32), (32, 3, 4 * (3 / 9 + 3 * 4 / 9 + 2))):
        config = small("no data", epochs=8, compile="auto", resolution=96, start_resolution=start)
        step, compilation = step_of(config), compiling.Compilation()
        ramp = [resolution_of(config, epoch, 8) for epoch in range(8)]
        compilation.decide(step, config, ramp, 32, World(), None)
        costs = 3.5 * models.depth(step.net) * sizes
        reason = f"compiling takes about {costs:.0f} s and saves about {0.1 * steps:.0f} s of the {steps:.0f} s"
        assert compilation.decision.reason.startswith(reason)
        compilation.forget()
        compilation.images_ahead = 16 * 100  # later runs of 100 steps
        compilation.decide(step, config, ramp, 32, World(), None)
        assert f"of the {steps + 100:.0f} s without it" in compilation.decision.reason


def test_a_gpu_of_one_process_gets_graphs(monkeypatch):
    assert devices.compile_mode(CUDA, 1) == "reduce-overhead"
    assert devices.compile_mode(CUDA, 2) is devices.compile_mode(CPU, 1) is None
    assert devices.compile_mode(CUDA, 1, graphed=True) is None  # its steps are recorded as a whole
    asked = []
    monkeypatch.setattr(torch, "compile", lambda net, **options: asked.append(options) or net)
    monkeypatch.setattr(devices, "compile_mode", lambda device, *rest: f"{device.type} {rest}")
    compiled(small("no data", compile="on"))
    assert asked == [{"dynamic": False, "mode": "cpu (1, False)"}]


def test_graphs_are_recorded_before_training(monkeypatch):
    monkeypatch.setattr(compiling, "example", lambda *_: ())
    monkeypatch.setattr(compiling, "leaving_no_trace", lambda *_: nullcontext())
    monkeypatch.setattr(devices, "synchronize", lambda device: None)
    net, grads = torch.nn.Linear(2, 2), []

    def backward():
        grads.append(net.weight.grad)
        net.weight.grad = torch.ones(2, 2)

    for device, times in ((CUDA, 3), (CPU, 1)):
        compiling.warm_up(SimpleNamespace(net=net, backward=backward, device=device), 4, 32)
        assert grads == [None] * times
        grads.clear()


def compiled(config):
    """A step after `Compilation` has compiled it, the compilation, and the warnings."""
    step, compilation, console = step_of(config), compiling.Compilation(), Heard()
    compilation.decide(step, config, [32], 8, World(), None)
    compilation.compile(step, config, [32], World(), console)
    return step, compilation, console.warnings


def test_without_a_compiler_training_is_eager_with_a_warning(monkeypatch):
    monkeypatch.setattr(compiling, "compiler", lambda: None)
    step, compilation, warnings = compiled(small("no data", compile="on"))
    assert compilation.decision.value == "off" and step.model is step.net
    assert warnings == [f"training without torch.compile: {compilation.decision.reason}"]
    assert "no C++ compiler" in warnings[0]


@pytest.mark.parametrize("broken", ["warm_up", "times"])
def test_a_compiler_that_fails_leaves_the_eager_network(monkeypatch, broken):
    def fail(*_):
        raise RuntimeError("it broke")

    monkeypatch.setattr(compiling, "choose", lambda *_: Decision("on", "as a test wants"))
    monkeypatch.setattr(compiling, "warm_up", lambda *_: None)
    monkeypatch.setattr(compiling, broken, fail)
    step, compilation, warnings = compiled(small("no data", compile="auto"))
    assert compilation.decision == Decision("off", "compiling failed: it broke")
    assert step.model is step.net
    assert warnings == ["training without torch.compile: compiling failed: it broke"]


def test_later_runs_of_a_network_keep_its_decision_and_another_network_gets_its_own(monkeypatch):
    config, compilation, seen = small("no data", compile="auto"), compiling.Compilation(), []
    monkeypatch.setattr(compiling, "choose", lambda *_: seen.append(1) or Decision("off", f"decision {len(seen)}"))

    def decide(recorded=None):
        compilation.decide(step_of(config), config, [32], 8, World(), recorded)
        return compilation.decision.reason

    assert (decide(), decide()) == ("decision 1", "decision 1")
    assert decide(Decision("on", "recorded")) == "recorded"  # by an earlier start of that run; it holds for it alone
    assert decide() == "decision 1"
    compilation.forget()
    assert decide() == "decision 2"


@pytest.mark.parametrize(("eager_s", "compiled_s", "value"), [(0.002, 0.1, "off"), (0.1, 0.002, "on")])
def test_the_faster_one_is_kept_and_the_network_stays(eager_s, compiled_s, value):
    step = step_of(small("no data"))
    before = {name: tensor.clone() for name, tensor in step.net.state_dict().items()}
    random_state = torch.get_rng_state()
    step.net.register_forward_pre_hook(lambda *_: time.sleep(eager_s))

    def compiled(*batch):
        time.sleep(compiled_s)
        return step.net.forward(*batch)  # without the hook

    step.model = compiled
    config = small("no data", batch_size=2)
    assert compiling.tried(step, config, World(), 3.0).value == value
    trial = compiling.recall(step, config, 2, World())
    assert trial is not None and trial.compile_s == 3.0 and (trial.compiled_s < trial.eager_s) == (value == "on")
    others = ({"resolution": 64}, {"weights": "given.pt", "freeze": True}, {"drop_path": 0.1})
    assert all(compiling.recall(step, replace(config, **other), 2, World()) is None for other in others)
    step.graphed = True
    assert compiling.recall(step, config, 2, World()) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in step.net.state_dict().items())
    assert all(parameter.grad is None for parameter in step.net.parameters())
    assert torch.equal(random_state, torch.get_rng_state())
