"""Whether compiling pays: the rule, and the trial that has the last word on a CPU."""

import time

import pytest
import torch

from train import compiling

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def never():
    raise AssertionError("asked for: nothing is to be timed")


@pytest.mark.parametrize("wanted", ["on", "off"])
def test_what_is_asked_for_is_done(wanted):
    assert compiling.decide(wanted, 21, CPU, never).value == wanted


def test_a_short_run_does_not_pay_for_compiling_and_a_long_one_does():
    for device, seconds in ((CPU, 21 * 3.5 / 0.05), (CUDA, 21 * 3.5 / 0.2)):
        assert compiling.decide("auto", 21, device, lambda s=seconds: 0.9 * s).value == "off"
        assert compiling.decide("auto", 21, device, lambda s=seconds: 1.1 * s).value == "on"


def test_without_a_compiler_it_is_off(monkeypatch):
    monkeypatch.setattr(compiling, "compiler", lambda: None)
    assert "no C++ compiler" in compiling.decide("on", 21, CPU, never).reason


@pytest.mark.parametrize(("eager_s", "compiled_s", "value"), [(0.002, 0.02, "off"), (0.02, 0.002, "on")])
def test_the_faster_one_is_kept_and_the_network_stays(eager_s, compiled_s, value):
    net = torch.nn.BatchNorm2d(3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def step(seconds):
        def run(batch):
            time.sleep(seconds)
            loss = net(batch[0].float()).sum()
            loss.backward()
            return loss.detach()

        return run

    random_state = torch.get_rng_state()
    found = compiling.faster(net, step(eager_s), step(compiled_s), 2, 8, CPU)
    assert found.value == value
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(random_state, torch.get_rng_state())
