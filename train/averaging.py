"""An exponential moving average of a network's weights, kept on its device and updated without a host sync."""

import copy

import torch

from train.models import Classifier


class Average:
    """`net` holds the average: decay·average + (1 − decay)·weights after every step.

    Early on the decay is lower, (1 + t) / (10 + t) at step t, so that the random start is soon forgotten
    (TensorFlow's `ExponentialMovingAverage` with `num_updates`). Buffers (running means) are copied.
    """

    def __init__(self, net: Classifier, decay: float) -> None:
        """decay: in (0, 1); 0.999 remembers about 1,000 steps."""
        self.decay = decay
        self.net = copy.deepcopy(net).requires_grad_(False)
        self._mine = [parameter.detach() for parameter in self.net.parameters()]
        self._theirs = [parameter.detach() for parameter in net.parameters()]
        self._buffers = list(zip(self.net.buffers(), net.buffers(), strict=True))

    def update(self, step: int) -> None:
        """Take in the weights after `step` (0 the first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mine, self._theirs, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
