"""The loss of a batch: the sum over its samples, and the denominator of the mean, which ranks can add up."""

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_PRIOR = {"logit-adjusted": "balanced", "class-weighted": "balanced", "plain": "training"}
"""Loss → the class prior that the logits of a model trained with it are for (`train/metrics/calibration.py`)."""


class Loss:
    """Cross-entropy in one of three forms.

    `logit-adjusted`: the log of the training prior is added to the logits during training (Menon et al. 2021,
    "Long-tail learning via logit adjustment", ICLR, τ = 1), so that the logits alone estimate the balanced posterior.
    `class-weighted`: each sample's weight is inversely proportional to the size of its class. `plain`: neither.
    """

    def __init__(self, kind: str, counts: list[int], device: torch.device) -> None:
        """kind: one of config.LOSSES. counts: training images of each class, (C,); a class may have none."""
        present = torch.tensor(counts, dtype=torch.float64)
        self.weighted = kind == "class-weighted"
        self._shift = self._weights = None
        if kind == "logit-adjusted":
            self._shift = (present / present.sum()).log().float().to(device)
        if self.weighted:
            rarity = present.sum() / (len(counts) * present)
            self._weights = torch.where(present > 0, rarity, torch.zeros_like(rarity)).float().to(device)

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """logits (N, C) float32, labels (N,) int64 → the sum over the samples, and the sum of their weights.

        The mean over a global batch is the first, summed over the ranks, divided by the second, summed over the ranks.
        If the second is None, divide by the number of samples.
        """
        if self._shift is not None:
            logits = logits + self._shift
        if self._weights is None:
            return F.cross_entropy(logits, labels, reduction="sum"), None
        return F.cross_entropy(logits, labels, weight=self._weights, reduction="sum"), self._weights[labels].sum()
