"""The loss of a batch: the sum over its samples, and the denominator of the mean, which ranks can add up."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from train.mixing import partners

LOGITS_PRIOR = {"logit-adjusted": "balanced", "class-weighted": "balanced", "plain": "training", "focal": "training"}
"""Loss → the class prior that the logits of a model trained with it are for (`train/metrics/calibration.py`)."""


class Loss:
    """Cross-entropy in one of four forms, with or without label smoothing (Szegedy et al. 2016, arXiv:1512.00567).

    `logit-adjusted`: the log of the training prior is added to the logits during training (Menon et al. 2021,
    "Long-tail learning via logit adjustment", ICLR, τ = 1), so that the logits alone estimate the balanced posterior.
    `class-weighted`: each sample's weight is inversely proportional to the size of its class. `plain`: neither.
    `focal`: each sample's loss times (1 − p)², p the probability of its class (Lin et al. 2017, arXiv:1708.02002).
    Smoothing is PyTorch's, except that a class without images has no share of a target.
    """

    def __init__(self, kind: str, counts: list[float], device: torch.device, smoothing: float = 0.0) -> None:
        """kind: one of config.LOSSES. counts: how often images of each class come, (C,); a class may have none.

        smoothing: share of each target that all classes get alike, in [0, 1).
        """
        present = torch.tensor(counts, dtype=torch.float64)
        self.weighted = kind == "class-weighted"
        self._focal = kind == "focal"
        self._smoothing = smoothing
        self._shift = self._weights = None
        if kind == "logit-adjusted":
            # a finite number for a class without images: its probability is 0 all the same, and its loss is a number
            self._shift = (present / present.sum()).log().clamp(min=-1e4).float().to(device)
        if self.weighted:
            rarity = present.sum() / (len(counts) * present)
            self._weights = torch.where(present > 0, rarity, torch.zeros_like(rarity)).float().to(device)
        elif smoothing:
            self._weights = (present > 0).float().to(device)

    def __call__(self, logits: Tensor, labels: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """logits (N, C) float32, labels (N,) int64 → the sum over the samples, and the sum of their weights.

        own: (N,) each sample's share of its own label, if pairs were mixed; the rest is the partner's.

        The mean over a global batch is the first, summed over the ranks, divided by the second, summed over the ranks.
        If the second is None, divide by the number of samples.
        """
        if self._shift is not None:
            logits = logits + self._shift
        weights = self._weights if self.weighted else None
        if own is None:
            return self._of(logits, labels, "sum"), None if weights is None else weights[labels].sum()
        others = partners(labels)
        total = torch.lerp(self._of(logits, others, "none"), self._of(logits, labels, "none"), own)
        weight = None if weights is None else torch.lerp(weights[others], weights[labels], own).sum()
        return total.sum(), weight

    def _of(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The loss of the samples: () with the reduction `sum`, (N,) with `none`."""
        entropy = functools.partial(
            F.cross_entropy, logits, labels, weight=self._weights, label_smoothing=self._smoothing
        )
        if not self._focal:
            return entropy(reduction=reduction)
        missed = 1 - logits.softmax(1).gather(1, labels[:, None])[:, 0]
        losses = missed.square() * entropy(reduction="none")
        return losses.sum() if reduction == "sum" else losses
