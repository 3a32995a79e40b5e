"""The settings of one training run, and their defaults by model family. A run is a function of these and the data."""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from shards.common.errors import DataError, UsageError

LOSSES = ("logit-adjusted", "class-weighted", "plain")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
COMPILE = ("auto", "on", "off")
ENGINES = ("auto", "native", "dali", "resident")
FORWARD_AND_BACKWARD = 3
"""FLOPs of a training step over those of its forward pass: the backward pass has two products for each one (Kaplan et
al. 2020, arXiv:2001.08361, section 2.1)."""
RAMP_STEP_PX = 32
RAMP_END = 0.75
"""The resolution ramp reaches the full size after this share of the epochs, so that the last quarter trains at it."""


@dataclass(frozen=True)
class Recipe:
    """The optimizer of a model family.

    lr: the peak learning rate for a global batch of 64 from random weights. lr_power: it grows with
    (batch / 64) ** lr_power, linearly for SGD (Goyal et al. 2017, arXiv:1706.02677) and by the root for Adam
    (Malladi et al. 2022, arXiv:2205.10287). warmup: share of all steps. clip: largest gradient norm, or None.
    finetune: what `lr` is multiplied by when training starts from given weights.
    """

    optimizer: str
    lr: float
    lr_power: float
    weight_decay: float
    warmup: float
    clip: float | None
    finetune: float


RECIPES = {
    "batchnorm": Recipe("sgd-nesterov", 0.05, 1.0, 5e-4, warmup=0.05, clip=None, finetune=0.2),
    "alexnet": Recipe("sgd-nesterov", 0.01, 1.0, 5e-4, warmup=0.05, clip=5.0, finetune=0.2),
    "layernorm": Recipe("adamw", 3e-4, 0.5, 0.05, warmup=0.10, clip=1.0, finetune=0.1),
}
"""By model family (`train.models.family`): convolutional nets with batch norm; AlexNet, which has no normalisation; and
everything else (ViT, Mixer, ConvNeXt, Swin …)."""


@dataclass(frozen=True)
class Config:
    """One run. What is None here is filled in by `resolved` from the model's family.

    data: folder of the shard set. fraction: share of the training lesions, in (0, 1]. batch_size: the global one.
    resolution, start_resolution: pixels a side; the latter starts a ramp. epochs: passes over the training images;
    steps: optimizer steps instead of epochs (a grid with equal steps), or None. lr: peak learning rate.
    warmup: share of the steps. ema: decay of the averaged weights, or None. checkpoint_s: least seconds between two
    checkpoints. eval_epochs: epochs from one evaluation on the validation split to the next.
    """

    model: str
    data: str = "data/shards"
    fraction: float = 1.0
    seed: int = 0
    subset_seed: int = 0
    epochs: int = 30
    steps: int | None = None
    batch_size: int = 64
    resolution: int = 224
    start_resolution: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    weight_decay: float | None = None
    warmup: float | None = None
    clip: float | None = None
    loss: str = "logit-adjusted"
    ema: float | None = None
    device: str = "auto"
    precision: str = "auto"
    compile: str = "auto"
    engine: str = "auto"
    pretrained: bool = False
    weights: str | None = None
    sync_batch_norm: bool = False
    checkpoint_s: float = 60.0
    eval_epochs: int = 1

    def __post_init__(self) -> None:
        """Refuse values that no run can have. Raises UsageError naming the value, the limit and what to do."""
        for name, least in (
            ("epochs", 1),
            ("eval_epochs", 1),
            ("batch_size", 1),
            ("resolution", 1),
            ("seed", 0),
            ("subset_seed", 0),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is under {least}")
        if not 0.0 < self.fraction <= 1.0:
            raise UsageError(f"--fraction {self.fraction} is outside (0, 1]: 1 is the whole training split")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"steps {self.steps} is under 1")
        for name, known in (("loss", LOSSES), ("precision", PRECISIONS), ("compile", COMPILE), ("engine", ENGINES)):
            if getattr(self, name) not in known:
                raise UsageError(f"--{name} '{getattr(self, name)}' is unknown: use one of {', '.join(known)}")
        for name in ("lr", "weight_decay", "checkpoint_s", "clip"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise UsageError(f"--{name.replace('_', '-')} {value} is not a number of 0 or more")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise UsageError(f"--ema {self.ema} is outside (0, 1): 0.999 is usual")
        if self.pretrained and self.weights:
            raise UsageError("--pretrained and --weights exclude each other: choose one source of weights")
        start = self.start_resolution
        if start is not None and (start > self.resolution or (self.resolution - start) % RAMP_STEP_PX):
            raise UsageError(
                f"--start-resolution {start} must be --resolution {self.resolution} less a multiple of {RAMP_STEP_PX}: "
                f"the ramp goes up in steps of {RAMP_STEP_PX} px"
            )

    @property
    def batch_change(self) -> float:
        """How the global batch compares with the one that the recipes are written for."""
        return self.batch_size / 64

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return asdict(self)


def resolved(config: Config, family: str) -> Config:
    """`config` with everything that was left open filled in from the recipe of a model family."""
    recipe = RECIPES[family]
    lr = recipe.lr * config.batch_change**recipe.lr_power
    if config.pretrained or config.weights:
        lr *= recipe.finetune
    return replace(
        config,
        optimizer=config.optimizer or recipe.optimizer,
        lr=lr if config.lr is None else config.lr,
        weight_decay=recipe.weight_decay if config.weight_decay is None else config.weight_decay,
        warmup=recipe.warmup if config.warmup is None else config.warmup,
        clip=recipe.clip if config.clip is None else config.clip,
    )


def check_batch(batch_size: int, family: str, processes: int = 1) -> None:
    """Raise UsageError where a global batch leaves a process fewer images than a model family can be trained on."""
    least = (2 if family == "batchnorm" else 1) * processes
    if batch_size < least:
        why = "batch norm needs 2 images in each process" if family == "batchnorm" else "each process needs an image"
        shared = f" with {processes} processes" if processes > 1 else ""
        raise UsageError(f"--batch-size {batch_size}{shared}: {why}; choose {least} or more")


def read_config(path: Path) -> Config:
    """The settings that a run folder's config.json holds. Raises DataError where it is missing or damaged."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Config(**{field.name: raw[field.name] for field in fields(Config)})
    except FileNotFoundError:
        raise DataError(f"{path.parent}: not a run folder (no {path.name})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}); start the run anew in another folder") from None


DECIDES_NOTHING = ("checkpoint_s", "eval_epochs", "data")
"""Fields that may differ between a run and its continuation: the data are compared by the hash of their index."""


def differences(old: Config, new: Config) -> list[str]:
    """What differs between two configurations and would change the weights: `name: old, now new`."""
    a, b = old.to_dict(), new.to_dict()
    return [f"{k}: {a[k]}, now {b[k]}" for k in a if a[k] != b[k] and k not in DECIDES_NOTHING]


# ------------------------------------------------------------------ schedules: pure functions of the position


def learning_rate(config: Config, step: int, total: int) -> float:
    """The learning rate of `step` (0 the first) out of `total`: linear warm-up to `lr`, then a cosine to zero."""
    if config.lr is None or config.warmup is None:
        raise ValueError("the configuration is not resolved")
    warm = round(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def resolution_of(config: Config, epoch: int, epochs: int) -> int:
    """The training resolution of `epoch` in pixels: FFCV's ramp, in steps of 32 over the first three quarters."""
    start = config.start_resolution
    ramp = math.floor(epochs * RAMP_END)
    if start is None or epoch >= ramp:
        return config.resolution
    smaller = (config.resolution - start) // RAMP_STEP_PX
    return start + RAMP_STEP_PX * (epoch * smaller // ramp)


def pixel_share(config: Config, epochs: int) -> float:
    """The mean over `epochs` of the pixels an image is trained at, as a share of the full size's: 1 without a ramp.

    What a step costs grows about as they do.
    """
    return sum((resolution_of(config, epoch, epochs) / config.resolution) ** 2 for epoch in range(epochs)) / epochs
