"""CUDA code as far as a CPU can check it: fake CUDA tensors for the forward pass, `meta` tensors for the backward pass.

Fake tensors run no kernel, but know devices, types and shapes: tensors of mixed devices raise, and so does fetching a
value, which is what a hidden host sync does. Autocast and the backward pass do not work with them.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from shards.engines.resident import gather
from shards.loader import Tables
from tests.support.train_runs import small
from train import models
from train.config import LOSSES, resolved
from train.graphed import GraphedStep, Pass
from train.loss import Loss
from train.models import MODELS, Classifier
from train.step import TrainingStep

MEAN, STD = (0.7, 0.5, 0.4), (0.2, 0.15, 0.1)
COUNTS = [30, 40, 100, 10, 90, 600, 0]


def batch(px: int, device: str, count: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images = torch.empty(count, px, px, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    return images, torch.empty(count, 3, 4, device=device), torch.zeros(count, dtype=torch.int64, device=device)


def network(name: str, px: int) -> Classifier:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return models.build(name, px, 7, MEAN, STD).train()


def on_cuda(net: Classifier, *inputs: torch.Tensor) -> torch.Tensor:
    """The forward pass with fake CUDA tensors, of the same shapes and layouts, in the place of the `meta` ones."""
    state = {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        for name, value in (*net.named_parameters(), *net.named_buffers())
    }
    return torch.func.functional_call(net, state, inputs)


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_loss_stay_on_cuda(name: str) -> None:
    net = network(name, 96)
    with FakeTensorMode():
        images, colour, labels = batch(96, "cuda")
        mix = torch.empty(4, 10, device="cuda")
        logits = on_cuda(net, images, colour, mix)
        assert (logits.device.type, logits.dtype, logits.shape) == ("cuda", torch.float32, (4, 7))
        losses = torch.zeros(50, device="cuda")
        for kind in LOSSES:
            total, weight = Loss(kind, COUNTS, torch.device("cuda"), 0.1)(logits, labels, mix[:, 9])
            share = total / (4 if weight is None else weight)
            losses[7] = share.detach()
            assert share.device.type == losses.device.type == "cuda"


@pytest.mark.parametrize("name", MODELS)
def test_backward_gives_every_parameter_a_gradient(name: str) -> None:
    net = network(name, 96)
    images, colour, labels = batch(96, "meta")
    total, _ = Loss("logit-adjusted", COUNTS, torch.device("meta"))(net(images, colour), labels)
    (total / 4).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


@pytest.mark.parametrize(("model", "kernel"), [("test_resnet", "_fused_sgd_"), ("test_vit", "_fused_adamw_")])
def test_what_a_graph_holds_beside_the_network_stays_on_cuda(
    monkeypatch: pytest.MonkeyPatch, model: str, kernel: str
) -> None:
    """The choice of the batch, its gather, clipping and the optimizer, up to the fused kernel, which has no fake."""
    config = resolved(small("no data", model=model, clip=1.0, batch_size=4), models.family(model))  # type: ignore[arg-type]
    net, rates = models.build(model, 32, 7, MEAN, STD), []
    monkeypatch.setattr(torch, kernel, lambda *_, **settings: rates.append(settings["lr"]))
    with FakeTensorMode():
        for module in net.modules():
            for name, value in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(value.shape, device="cuda")))
            for name, value in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(value.shape, dtype=value.dtype, device="cuda"))
        step = TrainingStep(net, config, COUNTS, "fp32")
        pixels = torch.empty(1000, 3, dtype=torch.uint8, device="cuda")
        of_images, colour, mask = np.zeros((3, 4), np.int64), np.zeros((3, 4, 3, 4), np.float32), np.ones((3, 4), bool)
        tables = Tables(np.zeros((3, 4, 7), np.int64), of_images, of_images, colour, mask)
        loader = SimpleNamespace(
            device=torch.device("cuda"),
            train=False,
            tables=lambda epoch: tables,
            gather=lambda rows: gather(pixels, rows, 32).permute(0, 3, 1, 2),
        )
        batches = Pass(loader)  # type: ignore[arg-type]
        batches.upload()
        batches.seek(1)
        found, expected = batches.take(), batch(32, "cuda")
        for mine, other in zip((found.images, found.colour, found.labels), expected, strict=True):
            assert (mine.device.type, mine.shape, mine.dtype) == ("cuda", other.shape, other.dtype)
            assert mine.stride() == other.stride()
        for parameter in net.parameters():
            parameter.grad = torch.empty_like(parameter)
        graphed = GraphedStep(step, batches.take)
        step.apply(graphed._lr, graphed._share)
    # the kernels take a tensor on the device only in this type
    assert [(lr.device.type, lr.dtype) for lr in rates] == [("cuda", torch.float32)] * len(step.optimizer.param_groups)


# ------------------------------------------------------------------ what these checks notice


def test_a_host_sync_would_be_noticed() -> None:
    net = network("alexnet", 64)
    with FakeTensorMode():
        logits = on_cuda(net, *batch(64, "cuda")[:2])
        with pytest.raises(DataDependentOutputException):
            logits.sum().item()


def test_mixed_devices_would_be_noticed() -> None:
    net = network("alexnet", 64)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        on_cuda(net, batch(64, "cpu")[0], batch(64, "cuda")[1])
