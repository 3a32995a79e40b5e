"""Random erasing, MixUp and CutMix: applied to a batch on the device, after the colours and the normalisation.

The host draws them for a whole epoch from the raw stream of Philox, keyed by (seed, epoch) and indexed by the position
in the epoch's order. So they do not depend on the engine, on the number of processes or on a restart. Images are mixed
in pairs of consecutive positions, which are never in two processes.
"""

import numpy as np
import torch
from torch import Tensor

from shards.order import rank_slice
from train.config import Config
from train.distributed import World

_STREAM = 3  # the last word of Philox's counter; shards/order.py and shards/plan.py use 1 and 2
_DRAWS = 12
"""Raw numbers per position: 5 for erasing, 4 for the pair, the rest to fill Philox's blocks of 4."""
_ERASED_AREA = 0.02, 1 / 3
_ERASED_RATIO = 0.3
"""Area of an erased box as a share of the image's, and its smallest ratio of the sides (Zhong et al. 2020,
arXiv:1708.04896, with the ratio on a logarithmic scale as in torchvision)."""


class Mixing:
    """What is drawn for the batches of one process: on the device for an epoch, with a cursor that picks the batch.

    Both stay in the same memory, so a CUDA graph can record `batch`; `seek` comes before each replay.
    """

    def __init__(self, config: Config, epoch_steps: int, world: World) -> None:
        """config: resolved; its batch is a multiple of 2 · processes if it mixes. epoch_steps: batches in an epoch."""
        self._config, self._steps = config, epoch_steps
        self._part = rank_slice(config.batch_size, world.rank, world.size)
        images = self._part.stop - self._part.start
        self._of: tuple[int, int] | None = None  # epoch and px of the table
        self._table = torch.zeros(epoch_steps, images, 10 if mixes(config) else 4, device=world.device)
        self._cursor = torch.zeros(1, dtype=torch.int64, device=world.device)

    def seek(self, step: int, px: int) -> None:
        """Make the batch of `step` (0 the first of the run), of images of `px`, the next one. Draws once an epoch."""
        epoch, number = divmod(step, self._steps)
        if self._of != (epoch, px):
            whole = drawn(self._config, epoch, self._steps * self._config.batch_size, px)
            mine = whole.reshape(self._steps, self._config.batch_size, -1)[:, self._part]
            self._table.copy_(torch.from_numpy(np.ascontiguousarray(mine)))
            self._of = epoch, px
        self._cursor.fill_(number)

    def batch(self, count: int) -> Tensor:
        """What is drawn for the first `count` images of this process's batch: see `drawn`. No host sync."""
        return self._table.index_select(0, self._cursor)[0, :count]


def drawn(config: Config, epoch: int, count: int, px: int) -> np.ndarray:
    """(count, 4) float32, for images of `px`: y, x, height, width of the erased box; empty where nothing is erased.

    (count, 10) if the run mixes: also the box in which the partner is mixed in, the partner's share of a pixel there,
    and the image's own share of the label. MixUp (Zhang et al. 2018, arXiv:1710.09412): the box is the whole image.
    CutMix (Yun et al. 2019, arXiv:1905.04899): the share is 1. With both, each pair has one of them, as in timm; the
    shares are from Beta(α, α), rounded to 1/1024 because libraries may differ in the last bits.
    """
    stream = np.random.Philox(key=[config.seed, epoch], counter=[0, 0, 0, _STREAM])
    draws = (stream.random_raw(count * _DRAWS).reshape(count, _DRAWS) >> np.uint64(11)) * 2.0**-53
    erased = _erased(draws[:, :5], config.erasing or 0.0, px)
    if not mixes(config):
        return erased
    return np.concatenate([erased, np.repeat(_pairs(draws[::2, 5:9], config, px), 2, axis=0)], axis=1)


def mixes(config: Config) -> bool:
    """Whether a run mixes pairs of images. config: resolved."""
    return bool(config.mixup or config.cutmix)


def _erased(draws: np.ndarray, share: float, px: int) -> np.ndarray:
    """(N, 4) float32 boxes."""
    low, high = _ERASED_AREA
    area = (low + (high - low) * draws[:, 1]) * px * px
    ratio = np.exp((2 * draws[:, 2] - 1) * np.log(1 / _ERASED_RATIO))
    sides = np.minimum(np.rint(np.sqrt(np.stack([area / ratio, area * ratio], axis=1))), px)
    places = np.floor(draws[:, 3:5] * (px - sides + 1))
    return (np.concatenate([places, sides], axis=1) * (draws[:, :1] < share)).astype(np.float32)


def _pairs(draws: np.ndarray, config: Config, px: int) -> np.ndarray:
    """(pairs, 6) float32: box, share of the partner in it, share of the label."""
    from scipy.special import betaincinv

    mixup, cutmix = config.mixup or 0.0, config.cutmix or 0.0
    cut = draws[:, 0] < (0.5 if mixup and cutmix else float(cutmix > 0))
    alpha = np.where(cut, cutmix, mixup)
    own = np.rint(betaincinv(alpha, alpha, draws[:, 1]) * 1024) / 1024
    sides = np.rint(px * np.sqrt(1 - own))[:, None]
    first = np.floor(draws[:, 2:4] * px) - np.floor(sides / 2)
    start, end = np.clip(first, 0, px), np.clip(first + sides, 0, px)
    whole = np.array([0, 0, px, px])
    box = np.where(cut[:, None], np.concatenate([start, end - start], axis=1), whole)
    own = np.where(cut, 1 - box[:, 2] * box[:, 3] / (px * px), own)
    return np.column_stack([box, np.where(cut, 1.0, 1 - own), own]).astype(np.float32)


# ------------------------------------------------------------------ on the device


def partners(values: Tensor) -> Tensor:
    """(N, …) in pairs → the same with the two of each pair exchanged."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def apply(pixels: Tensor, table: Tensor) -> Tensor:
    """pixels (N, 3, S, S) float32, normalised; table of `drawn` → the same, erased with the mean, and mixed."""
    pixels = pixels.masked_fill(_inside(table[:, :4], pixels), 0.0)
    if table.shape[1] == 4:
        return pixels
    weight = _inside(table[:, 4:8], pixels) * table[:, 8, None, None, None]
    return torch.lerp(pixels, partners(pixels), weight)


def _inside(boxes: Tensor, pixels: Tensor) -> Tensor:
    """(N, 4) boxes → (N, 1, S, S) bool, True within."""
    at = torch.arange(pixels.shape[-1], device=pixels.device)
    rows, columns = (
        (at >= boxes[:, axis, None]) & (at < (boxes[:, axis] + boxes[:, axis + 2])[:, None]) for axis in (0, 1)
    )
    return rows[:, None, :, None] & columns[:, None, None, :]
