"""The augmentation of each sample of an epoch: crop, symmetry and colour, a pure function of (seed, epoch, sample).

The raw stream of Philox is keyed by (seed, epoch) and indexed by sample number. So any rank, engine or restart computes
the same plan, also for one sample alone. Only additions, multiplications, divisions and square roots are used, which
IEEE 754 rounds the same on every machine; exponential, sine and cosine are short series of them.
"""

import functools
from dataclasses import dataclass

import numpy as np

from shards.common.errors import UsageError
from shards.kernels.load import holding_the_lock
from shards.order import check_seed

_STREAM = 2  # order.py uses another
INTERPOLATIONS = ("bilinear", "bicubic")
_TRIES = 10  # as many as torchvision's RandomResizedCrop makes before it takes the centre
_DRAWS = 28
"""Raw numbers per sample: 2 per try, 2 for the place, 1 for symmetry, 4 for colour, 1 to fill Philox's blocks of 4."""
_BLOCK = 1 << 16  # samples whose draws are in memory at a time

LUMA = np.array([0.299, 0.587, 0.114])  # Y of NTSC's YIQ


@dataclass(frozen=True)
class Augment:
    """How training images vary, and how evaluation crops.

    scale: share of the image's area that a crop takes, low and high. ratio: its width over height, low and high, with
    low = 1 / high. symmetries: draw one of the eight flips and transposes of the square (dermoscopy has no up).
    brightness, contrast, saturation: factors are drawn from [1 - v, 1 + v]. hue: rotations from [-v, v] turns of YIQ's
    chroma plane. eval_crop: side of evaluation's centre square, as a share of the shorter side. interpolation: one of
    INTERPOLATIONS, by which all engines resize crops (`shards/engines/resample.py`).
    """

    scale: tuple[float, float] = (0.25, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    symmetries: bool = True
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.02
    eval_crop: float = 0.875
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        """Check the values. Raises UsageError."""
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(f"crop scale {self.scale}: two shares of the area, 0 < low <= high <= 1")
        if not (1 <= self.ratio[1] <= 4 and abs(self.ratio[0] * self.ratio[1] - 1) < 1e-9):
            raise UsageError(f"crop ratio {self.ratio}: must be (1 / r, r) with r from 1 to 4")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} is outside [0, 1)")
        if not 0 <= self.hue <= 0.25:
            raise UsageError(f"hue {self.hue} is outside [0, 0.25] turns")
        if not 0 < self.eval_crop <= 1:
            raise UsageError(f"eval crop {self.eval_crop} is outside (0, 1]")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(f"interpolation '{self.interpolation}' is unknown: use {' or '.join(INTERPOLATIONS)}")


@dataclass(frozen=True)
class Plan:
    """What to do to N samples.

    boxes: (N, 4) int32, the crop's y, x, height, width in px of the packed image. symmetry: (N,) uint8, 0 to 7; of
    the resized crop: bit 2 transposes, then bit 0 mirrors left-right, then bit 1 mirrors top-bottom. colour: (N, 3, 4)
    float32; on RGB in 0 to 1, out = colour[:, :, :3] @ rgb + colour[:, :, 3], without a clamp.
    """

    boxes: np.ndarray
    symmetry: np.ndarray
    colour: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> "Plan":
        """The plan of some of the samples."""
        return Plan(self.boxes[rows], self.symmetry[rows], self.colour[rows])


def evaluation_plan(heights: np.ndarray, widths: np.ndarray, augment: Augment) -> Plan:
    """Centre squares of `augment.eval_crop` times the shorter side; no symmetry, no colour change.

    heights, widths: (N,) px of the packed images.
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    sides = np.maximum(np.rint(augment.eval_crop * np.minimum(heights, widths)), 1).astype(np.int64)
    boxes = np.stack([(heights - sides) // 2, (widths - sides) // 2, sides, sides], axis=1).astype(np.int32)
    colour = np.zeros((len(sides), 3, 4), np.float32)
    colour[:, [0, 1, 2], [0, 1, 2]] = 1
    return Plan(boxes, np.zeros(len(sides), np.uint8), colour)


def training_plan(
    seed: int, epoch: int, samples: np.ndarray, heights: np.ndarray, widths: np.ndarray, augment: Augment
) -> Plan:
    """Random-resized crop (Szegedy et al. 2015, with torchvision's tries and fallback), symmetry and colour.

    samples: (N,) sample numbers, rows of the index. heights, widths: (N,) px of their packed images.
    """
    check_seed(seed, epoch)
    library = holding_the_lock()
    if library is None:
        return numpy_plan(seed, epoch, np.asarray(samples), heights, widths, augment)
    samples = np.ascontiguousarray(samples, np.int64)
    heights, widths = (np.ascontiguousarray(sides, np.uint16) for sides in (heights, widths))
    count = len(samples)
    plan = Plan(np.empty((count, 4), np.int32), np.empty(count, np.uint8), np.empty((count, 3, 4), np.float32))
    given = (heights, widths, numbers_of(augment), plan.boxes, plan.symmetry, plan.colour)
    library.dermscale_plan(seed, epoch, samples.ctypes.data, count, *(array.ctypes.data for array in given))
    return plan


@functools.cache
def numbers_of(augment: Augment) -> np.ndarray:
    """`struct augment` of kernels.h, as 8-byte numbers."""
    yiq = [part.ravel() for part in _yiq_parts()]
    shape = [*augment.scale, *augment.ratio, _log(augment.ratio[1])]
    colour = [augment.brightness, augment.contrast, augment.saturation, augment.hue * 2 * np.pi]
    numbers = np.concatenate([shape, colour, *yiq, [augment.eval_crop]])
    return np.concatenate([numbers.view(np.int64), [int(augment.symmetries)]])


def numpy_plan(
    seed: int, epoch: int, samples: np.ndarray, heights: np.ndarray, widths: np.ndarray, augment: Augment
) -> Plan:
    """`training_plan` in NumPy, equal to the bit: used if there is no compiled library, and as its test."""
    draws = _uniform(seed, epoch, samples)
    boxes = _crops(draws, heights.astype(np.float64), widths.astype(np.float64), augment)
    symmetry = (draws[:, 22] * 8).astype(np.uint8) if augment.symmetries else np.zeros(len(boxes), np.uint8)
    return Plan(boxes, symmetry, _colours(draws[:, 23:27], augment))


def _uniform(seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """(N, 28) float64 in [0, 1): row i depends on sample number samples[i] alone."""
    out = np.empty((len(samples), _DRAWS))
    blocks = samples // _BLOCK
    for block in np.unique(blocks):
        rows = np.flatnonzero(blocks == block)
        within = samples[rows] - block * _BLOCK
        counter = int(block) * _BLOCK * _DRAWS // 4
        stream = np.random.Philox(key=[seed, epoch], counter=[counter, 0, 0, _STREAM])
        raw = stream.random_raw((int(within.max()) + 1) * _DRAWS).reshape(-1, _DRAWS)
        out[rows] = (raw[within] >> np.uint64(11)) * 2.0**-53
    return out


def _crops(draws: np.ndarray, heights: np.ndarray, widths: np.ndarray, augment: Augment) -> np.ndarray:
    """(N, 4) int32 boxes y, x, h, w."""
    low, high = augment.scale
    area = (low + (high - low) * draws[:, 0 : 2 * _TRIES : 2]) * (heights * widths)[:, None]
    log_high = _log(augment.ratio[1])
    ratio = _exp((2 * draws[:, 1 : 2 * _TRIES : 2] - 1) * log_high)
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w >= 1) & (h >= 1) & (w <= widths[:, None]) & (h <= heights[:, None])
    first = np.argmax(fits, axis=1)[:, None]
    found = fits.any(axis=1)
    # torchvision's fallback: the largest centred box whose shape is within the ratios.
    whole = widths / heights
    fallback_w = np.where(whole > augment.ratio[1], np.rint(heights * augment.ratio[1]), widths)
    fallback_h = np.where(whole < augment.ratio[0], np.rint(widths / augment.ratio[0]), heights)
    w = np.where(found, np.take_along_axis(w, first, 1)[:, 0], fallback_w)
    h = np.where(found, np.take_along_axis(h, first, 1)[:, 0], fallback_h)
    y = np.where(found, np.floor(draws[:, 20] * (heights - h + 1)), np.floor((heights - h) / 2))
    x = np.where(found, np.floor(draws[:, 21] * (widths - w + 1)), np.floor((widths - w) / 2))
    return np.stack([y, x, h, w], axis=1).astype(np.int32)


def _colours(draws: np.ndarray, augment: Augment) -> np.ndarray:
    """(N, 3, 4) float32: brightness, then contrast about mid-grey, then saturation and hue in YIQ, as one affine map.

    It stays one matrix because, unlike in torchvision's ColorJitter, the order is fixed, contrast is relative to 0.5
    and not to the image's own mean, and nothing is clamped in between.
    """
    strength = np.array([augment.brightness, augment.contrast, augment.saturation])
    factors = 1 + strength * (2 * draws[:, :3] - 1)
    angle = (2 * draws[:, 3] - 1) * (augment.hue * 2 * np.pi)
    brightness, contrast, saturation = factors.T
    luma, chroma, turned = _yiq_parts()
    rotation = (
        luma + (saturation * _cos(angle))[:, None, None] * chroma + (saturation * _sin(angle))[:, None, None] * turned
    )
    out = np.empty((len(draws), 3, 4), np.float32)
    out[:, :, :3] = rotation * (brightness * contrast)[:, None, None]
    out[:, :, 3] = (0.5 * (1 - contrast))[:, None]  # grey has no chroma, so saturation and hue do not move the pivot
    return out


def _yiq_parts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(3, 3) each: RGB → grey of its luma; RGB → its chroma; RGB → its chroma rotated by 90° in the I-Q plane."""
    to_yiq = np.array([LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    luma = np.tile(LUMA, (3, 1))
    from_iq = np.linalg.inv(to_yiq)[:, 1:]
    turned = np.rint((from_iq @ np.array([[0.0, -1.0], [1.0, 0.0]]) @ to_yiq[1:]) * 2**30) * 2.0**-30
    return luma, np.eye(3) - luma, turned  # rounded: a linear-algebra library may differ in the last bits


def _exp(x: np.ndarray) -> np.ndarray:
    """exp for |x| below 1.4, by its series; within 1e-15 relative."""
    total = np.ones_like(x)
    for k in range(22, 0, -1):
        total = total * x / k + 1
    return total


@functools.cache  # it takes 2 ms, as long as the plan of a thousand samples
def _log(x: float) -> float:
    """Natural logarithm of 1 <= x <= 4, by Newton's method on `_exp`."""
    y = 0.0
    for _ in range(60):
        y += x / float(_exp(np.array(y))) - 1
        y = min(max(y, 0.0), 1.4)
    return y


def _sin(x: np.ndarray) -> np.ndarray:
    """Sine for |x| up to pi / 2, by its series; within 1e-15."""
    total = np.ones_like(x)
    for k in range(20, 1, -2):
        total = 1 - total * x * x / (k * (k + 1))
    return total * x


def _cos(x: np.ndarray) -> np.ndarray:
    """Cosine for |x| up to pi / 2, by its series; within 1e-15."""
    total = np.ones_like(x)
    for k in range(19, 0, -2):
        total = 1 - total * x * x / (k * (k + 1))
    return total
