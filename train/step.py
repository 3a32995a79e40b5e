"""One training step: forward, loss, backward, update, in this order and with nothing that waits for the device.

A run builds one (`train/prepare.py`) and calls it once for each batch (`train/loop.py`). It needs neither a shard set
nor a run folder, so anything that has a network and a batch can take the same step, a benchmark for example.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from train import device as devices
from train import models
from train.config import Config
from train.distributed import World
from train.loss import Loss
from train.mixing import Mixing
from train.models import Classifier


class TrainingStep:
    """`loss = step(images, colour, labels, lr)`: one optimizer step on this process's share of a global batch.

    net: the network, which owns the weights. model: what the step calls, one of: `net`, its compiled form, or either
    of them wrapped for several processes. precision: `fp32`, `bf16` or `fp16`. world: the processes that share each
    global batch; one until `distribute`. mixing: erases and mixes the images of each batch. done: optimizer steps so
    far. graphed: whether CUDA graphs will hold the steps (`train/graphed.py`), so that compiled code needs none of its
    own.
    """

    def __init__(self, net: Classifier, config: Config, class_counts: list[float], precision: str) -> None:
        """Take `net` as it is, on its device. config: resolved. class_counts: how often each class comes, (C,)."""
        self.device = net.head.mean.device
        self.net = net
        self.model: Callable[..., Tensor] = net
        self.loss = Loss(config.loss, class_counts, self.device, config.label_smoothing or 0.0)
        self.optimizer = devices.optimizer(
            models.parameter_groups(net, config.weight_decay or 0.0, config.layer_decay or 1.0),
            config.optimizer or "",
            config.lr or 0.0,
        )
        self.precision = precision
        self.scaler = devices.scaler(self.device, precision)
        self.batch_size = config.batch_size
        self.clip = config.clip
        self.mixing: Mixing | None = None
        self.average = Average(net, config.ema) if config.ema else None
        self.world = World(device=self.device)
        self.done = 0
        self.graphed = False

    def __call__(self, images: Tensor, colour: Tensor, labels: Tensor, lr: float) -> Tensor:
        """Update the weights once; return this process's share of the global batch's mean loss, () on the device.

        images (N, 3, H, W) uint8, colour (N, 3, 4) float32, labels (N,) int64, as in `shards.Batch`. No host
        sync; with `mixing`, the first step of an epoch copies its table to the device.
        """
        if self.mixing is not None:
            self.mixing.seek(self.done, images.shape[-1])
        loss = self.backward(images, colour, labels)
        self.update(lr)
        return loss

    def backward(self, images: Tensor, colour: Tensor, labels: Tensor) -> Tensor:
        """Forward pass, loss and backward pass: add the gradients of the share that is returned.

        With `mixing`, the images are erased and mixed as at the step that was sought last.
        """
        mix = () if self.mixing is None else (self.mixing.batch(len(images)),)
        with devices.autocast(self.device, self.precision):
            logits = self.model(images, colour, *mix)
        total, weight = self.loss(logits, labels, *(table[:, 9] for table in mix if table.shape[1] > 4))
        share = total / (self.batch_size if weight is None else self.world.sum(weight.detach()))
        # times the number of processes, because DistributedDataParallel takes the mean of their gradients
        self.scaler.scale(share * self.world.size).backward()
        return share.detach()

    def update(self, lr: float) -> None:
        """Clip the gradients, update the weights with them, drop them, and update the average."""
        self.apply(lr, 0.0 if self.average is None else self.average.share(self.done))
        self.done += 1

    def apply(self, lr: float | Tensor, share: float | Tensor) -> None:
        """`update` without counting the step. A CUDA graph takes numbers that change from tensors, ().

        share: of the new weights in the average.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(share)

    @property
    def reported(self) -> Classifier:
        """The network with the weights that are evaluated and saved: the averaged ones if there is an average."""
        return self.net if self.average is None else self.average.net

    def distribute(self, world: World) -> None:
        """Share each global batch with the other processes of `world` from now on. Comes after compiling."""
        self.world = world
        self.model = world.wrap(self.model)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps. Tensors have the network's own names: no prefix of the compiler or of DDP."""
        return {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.net.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], done: int) -> None:
        """Go on from what `state_dict` gave after `done` steps."""
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if the run was not in fp16 before
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.net.load_state_dict(state["average"])
        self.done = done


@contextmanager
def leaving_no_trace(step: TrainingStep) -> Iterator[None]:
    """On leaving, put back weights, buffers, average, optimizer and random state, and the count; drop the gradients.

    Each tensor stays where it is in memory, as CUDA graphs need. Optimizer state that is new becomes zero, which is
    what both optimizers begin with.
    """

    def tensors() -> list[Tensor]:
        nets = [step.net] if step.average is None else [step.net, step.average.net]
        of_nets = [tensor for net in nets for tensor in (*net.parameters(), *net.buffers())]
        states = [value for state in step.optimizer.state.values() for value in state.values()]
        return of_nets + [value for value in states if isinstance(value, Tensor)]

    random_state, done = devices.random_state(step.device), step.done
    before = {tensor: tensor.detach().clone() for tensor in tensors()}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor in tensors():
                if tensor in before:
                    tensor.copy_(before[tensor])
                else:
                    tensor.zero_()
        for parameter in step.net.parameters():
            parameter.grad = None
        step.done = done
        devices.set_random_state(step.device, random_state)


class Average:
    """An exponential moving average (EMA) of a network's weights, on its device.

    After every step, `net` holds decay · average + (1 − decay) · weights. The decay starts lower, (1 + t) / (10 + t) at
    step t, so that the random start is soon forgotten (TensorFlow's `ExponentialMovingAverage` with `num_updates`).
    Buffers (running means) are copied. `torch.optim.swa_utils.AveragedModel` can do the same, but it collects all
    tensors anew at every step: with 200 parameters and 150 buffers that took 1.7 ms on the host instead of 0.2 ms.
    """

    def __init__(self, net: Classifier, decay: float) -> None:
        """decay: in (0, 1); 0.999 remembers about 1,000 steps."""
        self.decay = decay
        self.net = copy.deepcopy(net).requires_grad_(False)
        self._averages = [parameter.detach() for parameter in self.net.parameters()]
        self._weights = [parameter.detach() for parameter in net.parameters()]
        self._buffers = list(zip(self.net.buffers(), net.buffers(), strict=True))

    def share(self, step: int) -> float:
        """What the weights after `step` (0 the first) are multiplied by: 1 − decay."""
        return 1.0 - min(self.decay, (1 + step) / (10 + step))

    def update(self, share: float | Tensor) -> None:
        """Include the weights, multiplied by `share`."""
        if isinstance(share, Tensor):  # the loop over all in C++ takes none
            for average, weight in zip(self._averages, self._weights, strict=True):
                average.lerp_(weight, share)
        else:
            torch._foreach_lerp_(self._averages, self._weights, share)  # pyright: ignore[reportPrivateImportUsage]
        for average, buffer in self._buffers:
            average.copy_(buffer)
