"""The network's answers for a whole split, each sample once, however many ranks share the work."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from train import device as devices
from train.distributed import World
from train.models import Classifier

if TYPE_CHECKING:
    from shards import Loader


@dataclass(frozen=True)
class Answers:
    """samples: (N,) int64 sample numbers, ascending; logits: (N, classes) float32."""

    samples: np.ndarray
    logits: np.ndarray


def answers(
    net: Classifier, loader: "Loader", precision: str, world: World, between: Callable[[int], None]
) -> Answers | None:
    """The logits of a whole split; None on all ranks but the first.

    net: with the weights to evaluate, not compiled: an evaluation is too short to pay for it. loader: of a whole split.
    between: called after each batch with the number of batches done. Padded samples are dropped. Raises ValueError
    where a sample is missing or counted twice.
    """
    world.same_buffers(net)
    was_training = net.training
    net.eval()
    parts = []
    try:
        with closing(iter(loader)) as batches:  # pyright: ignore[reportArgumentType]  # a generator
            for number, batch in enumerate(batches, 1):
                with torch.inference_mode(), devices.autocast(world.device, precision):
                    parts.append((batch.samples, net(batch.images, batch.colour), batch.mask))
                between(number)
    finally:
        net.train(was_training)
    # fetched once, at the end: the device never waits for the host in between
    samples, logits, mask = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    rows = world.gather_rows({"samples": samples[mask], "logits": logits[mask]})
    if not rows:
        return None
    order = np.argsort(rows["samples"], kind="stable")
    found = rows["samples"][order]
    if not np.array_equal(found, loader.selection.samples):
        raise ValueError(f"an evaluation of {len(loader.selection)} samples gave {len(found)} answers, or others")
    return Answers(found, rows["logits"][order])
