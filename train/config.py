"""The settings of a run: fields, options, limits, defaults by model family, schedules. A run depends on them and the
data alone."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from shards.common.errors import DataError, UsageError

OPTIMIZERS = ("sgd-nesterov", "adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant")
TTA = {"none": 1, "flips": 4, "symmetries": 8}
"""How many views of an image are averaged when it is tested, by name."""
SAMPLERS = ("uniform", "balanced", "weighted:COLUMN")
LOSSES = ("logit-adjusted", "class-weighted", "plain", "focal")
NORMALIZE = ("auto", "data", "imagenet", "half")
INTERPOLATIONS = ("auto", "bilinear", "bicubic")
MEMORY_FORMATS = ("auto", "channels-last", "contiguous")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
COMPILE = ("auto", "on", "off")
ENGINES = ("auto", "native", "dali", "resident")
FORWARD_AND_BACKWARD = 3
"""FLOPs of a training step over those of its forward pass: the backward pass computes two products for each product of
the forward pass (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). With `freeze` the step is the forward pass."""
RAMP_STEP_PX = 32
RAMP_END = 0.75
"""The resolution ramp reaches the full size after this share of the epochs; the last quarter trains at full size."""


@dataclass(frozen=True)
class Recipe:
    """How a model family is trained, unless options say otherwise. Fields with the name of an option are its default.

    lr: peak learning rate for a global batch of 64 and random weights. lr_power: the rate grows with
    (batch / 64) ** lr_power: linearly for SGD (Goyal et al. 2017, arXiv:1706.02677), with the square root for Adam
    (Malladi et al. 2022, arXiv:2205.10287). finetune: factor of `lr` if training starts from given weights. probe: the
    same if only the classifier is trained.
    """

    optimizer: str
    lr: float
    lr_power: float
    weight_decay: float
    warmup: float
    clip: float | None
    finetune: float
    probe: float = 1.0
    schedule: str = "cosine"
    label_smoothing: float = 0.0
    crop_scale: float = 0.25
    colour_jitter: float = 0.2
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    drop_path: float = 0.0
    layer_decay: float = 1.0
    sampler: str = "uniform"


RECIPES = {
    "batchnorm": Recipe(
        *("sgd-nesterov", 0.1, 1.0, 5e-4),
        warmup=0.05,
        clip=None,
        finetune=0.2,
        probe=0.1,
        crop_scale=0.5,
        colour_jitter=0.0,
    ),
    "alexnet": Recipe(
        *("sgd-nesterov", 0.01, 1.0, 5e-4), warmup=0.05, clip=5.0, finetune=0.2, crop_scale=0.5, colour_jitter=0.0
    ),
    "layernorm": Recipe("adamw", 3e-4, 0.5, 0.05, warmup=0.10, clip=1.0, finetune=0.1),
}
"""By model family (`train.models.family`): convolutional nets with batch norm; AlexNet, which has no normalisation; and
everything else (ViT, Mixer, ConvNeXt, Swin …).

Evidence for batchnorm: a search with ResNet-18 at 64 px from random weights (docs/results.md). In a quarter of the time
of 12 epochs, a rate of 0.1, crops from 0.6 of the area and no colour jitter gave a balanced accuracy of 0.508; the
former 0.05, 0.25 and 0.2 gave 0.456. From ImageNet weights (EfficientNet-Lite0, 8 epochs, 64 px, batches of 32,
validation images): fine-tuned on a quarter with two seeds and on a sixteenth with one, mean 0.455 with a rate of 0.02,
0.465 with 0.01, 0.451 with 0.005; frozen, on all and on an eighth, mean 0.385 with 0.05, 0.434 with 0.005, 0.443 with
0.002. For alexnet: 3 epochs at 64 px, one seed; on the validation images, crops from
half of the area and no colour jitter gave 0.423, the former 0.25 and 0.2 gave 0.353; twice the rate gave 0.397, four
times 0.349. For layernorm: ViT-B/16, 2 epochs at 64 px, one seed; on the validation images, crops from a quarter of the
area with jitter gave 0.431, crops from half of it without jitter 0.433, which is no difference. Its learning rates were
not compared. Longer runs and larger images were not compared for any family.
"""


def read_fraction(text: str, option: str = "--fraction") -> float:
    """`0.25` or `1/4` as a number in (0, 1], to six digits. Raises UsageError for anything else."""
    try:
        top, _, bottom = str(text).partition("/")
        value = float(top) / float(bottom) if bottom else float(top)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{option} '{text}' is not a number like 0.25 or 1/4") from None
    if not 0.0 < value <= 1.0:
        raise UsageError(f"{option} {text} is outside (0, 1]: 1 is the whole training split")
    return float(f"{value:.6g}")


def _option(default: Any, help: str, **more: Any) -> Any:
    """A field of Config that is a command-line option too; `training_options` makes the option.

    default: `...` if there is none. help: says what the option costs or changes; `{choices}` stands for these. more:
    choices: all allowed values. least, most: the smallest and the largest allowed one; no `most` without `least`. path:
    True for a file or folder. read: makes a float of the text. shown: what `--help` shows as the default. run_only:
    True if a grid has no such option.
    """
    metadata = {"help": help, **more}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """The settings of one run, and their defaults: `train.run` and the other commands make their options from these.

    What is None is filled in by `resolved` from the model's family. The field without an option, steps: optimizer steps
    in place of epochs (a grid with equal steps).
    """

    model: str = _option(
        ...,
        "alexnet, resnet18/34/50/101/152, vit_b16, mixer_b16 or any timm model. Larger ones take longer.",
        run_only=True,
    )
    data: str = _option(
        "data/shards",
        "Shard set: a folder, or an address such as s3://bucket/set (docs/stores.md). A run goes on only with the set "
        "that it began with.",
        path=True,
    )
    fraction: float = _option(
        1.0,
        "Share of the training lesions, in (0, 1], as 0.25 or 1/4. An epoch takes so much of the time.",
        read=read_fraction,
        run_only=True,
    )
    seed: int = _option(
        0,
        "Seed of weights, order and augmentation. Another seed gives another result of the same quality.",
        least=0,
        run_only=True,
    )
    subset_seed: int = _option(
        0, "Seed that picks the lesions of a fraction. It changes nothing at fraction 1.", least=0, run_only=True
    )
    where: str | None = _option(
        None,
        "Use only images that meet this condition on columns of the set, in all splits. A fraction is one of these. "
        "Example: \"sex == 'female' and age >= 60\".",
    )
    epochs: int = _option(30, "Passes over the training images. The time grows in proportion.", least=1)
    steps: int | None = None
    batch_size: int = _option(
        64,
        "Images in a global batch, shared by all processes. Memory grows with it, and so does the default of --lr.",
        least=1,
    )
    resolution: int = _option(224, "Side of the images in px. Time and memory grow with its square.", least=1)
    start_resolution: int | None = _option(
        None, "Start at this side and go up in steps of 32 px. Saves time; compiling takes longer, once for each size."
    )
    crop_scale: float | None = _option(
        None,
        "Smallest share of an image's area that a training crop takes; the largest is 1. Smaller crops vary more, and "
        "so need more epochs.",
        least=0.01,
        most=1.0,
        shown="by model",
    )
    crop_ratio: float = _option(
        4 / 3,
        "Largest ratio of the sides of a training crop, either way. 1: squares, which distort nothing.",
        least=1.0,
        most=4.0,
        shown="4/3",
    )
    colour_jitter: float | None = _option(
        None,
        "Brightness, contrast and saturation of training images vary by this share, and hue by a tenth of it, in "
        "turns. 0: colours stay as they are.",
        least=0.0,
        most=0.99,
        shown="by model",
    )
    symmetries: bool = _option(
        True, "Turn and mirror each training image in one of the eight ways of a square. Varies images more."
    )
    sampler: str | None = _option(
        None,
        "Order of the training images: {choices}. balanced: each class comes equally often, so images of small classes "
        "are repeated and a large class needs several epochs. weighted: each image comes in proportion to a column of "
        "numbers of the set. An epoch has as many images as before.",
        choices=SAMPLERS,
        shown="by model",
    )
    window: int | None = _option(
        None,
        "Draw the shards in random order, and images from about so many of them at a time. For sets in a store that do "
        "not fit into the cache; images are mixed less. Without it, images are drawn from all shards.",
        least=1,
        most=100_000,
    )
    erasing: float | None = _option(
        None,
        "Share of the training images in which a random box is erased. Varies images more, and so needs more epochs.",
        least=0.0,
        most=1.0,
        shown="by model",
    )
    mixup: float | None = _option(
        None,
        "Mix pairs of training images, and their labels, in shares from Beta(α, α) with this α, e.g. 0.2. Needs more "
        "epochs. 0: not at all.",
        least=0.0,
        most=100.0,
        shown="by model",
    )
    cutmix: float | None = _option(
        None,
        "Put a box of one training image into another, of an area from Beta(α, α) with this α, e.g. 1. Needs more "
        "epochs; with --mixup too, each pair has one of them.",
        least=0.0,
        most=100.0,
        shown="by model",
    )
    eval_crop: float = _option(
        0.875,
        "Evaluation and prediction look at the centre square with this share of the shorter side.",
        least=0.01,
        most=1.0,
    )
    tta: str = _option(
        "none",
        "Test with the mean over views of each image: {choices}; flips are 4 times the work and symmetries 8 times. It "
        "holds for the evaluation at the end and for prediction.",
        choices=tuple(TTA),
    )
    optimizer: str | None = _option(
        None,
        "Optimizer: {choices}. Another than the model's own needs --lr and --weight-decay. adamw takes more memory; "
        "muon makes steps longer, most of all on a CPU and with small images.",
        choices=OPTIMIZERS,
        shown="by model",
    )
    lr: float | None = _option(
        None,
        "Peak learning rate, after the warm-up. If it is too high, the loss stops being a number.",
        shown="by model",
    )
    weight_decay: float | None = _option(
        None, "Weight decay: more keeps weights smaller. Biases and normalisation have none.", shown="by model"
    )
    schedule: str | None = _option(
        None,
        "Learning rate after the warm-up: {choices}. The first two fall to zero at the end.",
        choices=SCHEDULES,
        shown="by model",
    )
    warmup: float | None = _option(
        None,
        "Share of the steps in which the learning rate rises to its peak. Too little, and the loss may stop being a "
        "number.",
        least=0.0,
        most=1.0,
        shown="by model",
    )
    clip: float | None = _option(
        None, "Largest norm of the gradient; longer ones are made shorter. 0: no limit.", shown="by model"
    )
    loss: str = _option(
        "logit-adjusted",
        "Cross-entropy: {choices}. Only plain and focal keep the frequencies of the training images.",
        choices=LOSSES,
    )
    label_smoothing: float | None = _option(
        None,
        "Share of each target that goes to all classes alike. Makes the network less certain of its answers.",
        least=0.0,
        most=0.99,
        shown="by model",
    )
    drop_path: float | None = _option(
        None,
        "Stochastic depth: share of the images for which the last residual branch is left out, fewer for those before. "
        "The network fits its training images less closely, and needs more epochs.",
        least=0.0,
        most=0.9,
        shown="by model",
    )
    layer_decay: float | None = _option(
        None,
        "Factor of the learning rate from each layer to the one before it, e.g. 0.75 to keep what given weights know. "
        "1: all learn alike.",
        least=0.01,
        most=1.0,
        shown="by model",
    )
    ema: float | None = _option(
        None,
        "Evaluate and save a moving average of the weights with this decay, e.g. 0.999. Costs one copy of the weights.",
    )
    device: str = _option("auto", "auto, cpu, cuda or cuda:N. auto takes a GPU if there is one.")
    precision: str = _option(
        "auto",
        "Number format of the matrix products: {choices}. auto takes the fastest, fp32 is the most exact.",
        choices=PRECISIONS,
    )
    memory_format: str = _option(
        "auto",
        "Layout of images and weights in memory: {choices}. contiguous is slower; auto takes it where channels-last is "
        "unsafe.",
        choices=MEMORY_FORMATS,
    )
    compile: str = _option(
        "auto",
        "torch.compile: {choices}. Compiling takes a minute or more; auto estimates whether it pays.",
        choices=COMPILE,
    )
    engine: str = _option(
        "auto",
        "Loader: {choices}. All load the same batches; resident keeps the whole set in the memory of the device.",
        choices=ENGINES,
    )
    pretrained: bool = _option(
        False, "Start from ImageNet weights (downloaded once). The default of --lr is lower then."
    )
    weights: str | None = _option(
        None, "Start from the weights in this file (.safetensors or .pt). The default of --lr is lower then.", path=True
    )
    freeze: bool = _option(
        False,
        "Train the classifier alone, on the features of the given weights. Takes less time than fine-tuning, and is "
        "usually less accurate.",
    )
    normalize: str = _option(
        "auto",
        "Mean and deviation of the input: {choices}. auto: as the given weights were trained; without weights, those "
        "of the training images (data). half: 0.5. Another choice than that of the weights costs accuracy.",
        choices=NORMALIZE,
    )
    interpolation: str = _option(
        "auto",
        "How crops are resized: {choices}. auto: as for the given weights; bilinear without weights. bicubic takes "
        "longer to load.",
        choices=INTERPOLATIONS,
    )
    sync_batch_norm: bool = _option(
        False,
        "Batch norm over all processes of the job; needs GPUs. Costs an exchange for each such layer and step.",
        run_only=True,
    )
    threads: int | None = _option(
        None,
        "CPU threads. Fewer leave cores to other programs; on a CPU another number changes the last bits.",
        least=1,
        shown="the cores",
    )
    checkpoint_s: float = _option(
        60.0,
        "Minimum seconds between two checkpoints; 0: one after every step. A kill costs the time since the last one.",
    )
    eval_epochs: int = _option(
        1,
        "Evaluate on val every so many epochs, and after the last. Costs time, changes no weights.",
        least=1,
    )

    def __post_init__(self) -> None:
        """Refuse values that no run can have. Raises UsageError naming the value, the limit and what to do."""
        for one in fields(self):
            value, option = getattr(self, one.name), f"--{one.name.replace('_', '-')}"
            least, most = one.metadata.get("least"), one.metadata.get("most", math.inf)
            if least is not None and value is not None and not least <= value <= most:
                limit = f"under {least}" if most == math.inf else f"outside {least:g} to {most:g}"
                raise UsageError(f"{option} {value} is {limit}")
            allowed = one.metadata.get("choices")
            form = SAMPLERS[-1] if str(value).startswith("weighted:") else value
            if allowed and value is not None and form not in allowed:
                raise UsageError(f"{option} '{value}' is unknown: use one of {', '.join(allowed)}")
        if str(self.sampler).startswith("weighted:") and self.loss in ("plain", "focal"):
            raise UsageError(
                f"--sampler {self.sampler} needs --loss logit-adjusted or class-weighted: {self.loss} would take the "
                "frequencies of the drawn images for those of the classes"
            )
        if not 0.0 < self.fraction <= 1.0:
            raise UsageError(f"--fraction {self.fraction} is outside (0, 1]: 1 is the whole training split")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"steps {self.steps} is under 1")
        for name in ("lr", "weight_decay", "checkpoint_s", "clip"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise UsageError(f"--{name.replace('_', '-')} {value} is not a number of 0 or more")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise UsageError(f"--ema {self.ema} is outside (0, 1): 0.999 is usual")
        if self.pretrained and self.weights:
            raise UsageError("--pretrained and --weights exclude each other: choose one source of weights")
        if self.freeze and not (self.pretrained or self.weights):
            raise UsageError("--freeze needs weights to start from: add --pretrained or --weights FILE")
        layers = {"drop-path": self.drop_path, "layer-decay": self.layer_decay not in (None, 1.0)}
        idle = [name for name, asked in (layers | {"sync-batch-norm": self.sync_batch_norm}).items() if asked]
        if self.freeze and idle:
            raise UsageError(f"--freeze leaves --{idle[0]} nothing to do: leave one of them out")
        start = self.start_resolution
        if start is not None and not 1 <= start <= self.resolution:
            raise UsageError(
                f"--start-resolution {start} is outside 1 to {self.resolution}, the --resolution at the end"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return asdict(self)


def training_options(command: Callable[..., Any], run_only: bool = False) -> Callable[..., Any]:
    """Give a click command the options that are fields of Config; it gets them as keyword arguments of the same names.

    run_only: add those that only `train.run` has.
    """
    import click

    for one in reversed(fields(Config)):
        about = one.metadata
        if not about or (about.get("run_only") and not run_only):
            continue
        *others, last = about.get("choices", ("",))
        kind = next(kind for kind in (*get_args(one.type), one.type) if kind is not type(None))
        # click 8.5 takes `default=None` for a value: an option that has it is not required any more
        given: dict[str, Any] = {"required": True} if one.default is MISSING else {"default": one.default}
        name = one.name.replace("_", "-")
        command = click.option(
            f"--{name}/--no-{name}" if one.default is True else f"--{name}",
            type=click.Path() if about.get("path") else about.get("read", kind),
            metavar="FLOAT" if "read" in about else None,
            is_flag=kind is bool,
            show_default=about.get("shown"),
            help=about["help"].replace("{choices}", f"{', '.join(others)} or {last}"),
            **given,
        )(command)
    return command


def resolved(config: Config, family: str) -> Config:
    """`config` with every None that a recipe knows filled in from that of a model family.

    Raises UsageError for another optimizer than the family's without a learning rate of its own.
    """
    recipe = RECIPES[family]
    other = config.optimizer not in (None, recipe.optimizer)
    if other and (config.lr is None or config.weight_decay is None):
        raise UsageError(
            f"--optimizer {config.optimizer}: the learning rate and weight decay of {config.model} are for "
            f"{recipe.optimizer}; give --lr and --weight-decay too"
        )
    lr = recipe.lr * (config.batch_size / 64) ** recipe.lr_power
    if config.pretrained or config.weights:
        lr *= recipe.probe if config.freeze else recipe.finetune
    settings = asdict(config)
    missing = {name: value for name, value in asdict(recipe).items() if name in settings and settings[name] is None}
    return replace(config, **(missing | ({"lr": lr} if "lr" in missing else {})))


def check_batch(config: Config, family: str, processes: int = 1) -> None:
    """Raise UsageError if a global batch gives a process fewer images than a model family needs, or an odd number.

    config: resolved.
    """
    batch_size = config.batch_size
    least = (2 if family == "batchnorm" else 1) * processes
    if batch_size < least:
        why = "batch norm needs 2 images in each process" if family == "batchnorm" else "each process needs 1 image"
        shared = f" with {processes} processes" if processes > 1 else ""
        raise UsageError(f"--batch-size {batch_size}{shared}: {why}; choose {least} or more")
    if (config.mixup or config.cutmix) and batch_size % (2 * processes):
        raise UsageError(
            f"--batch-size {batch_size}: --mixup and --cutmix mix images in pairs; choose a multiple of {2 * processes}"
            f"{', twice the number of processes' if processes > 1 else ''}"
        )


ADDED = {
    "where": None,
    "threads": None,
    "normalize": "auto",
    "interpolation": "auto",
    "memory_format": "auto",
    "freeze": False,
    "schedule": "cosine",
    "label_smoothing": 0.0,
    "crop_scale": 0.25,
    "crop_ratio": 4 / 3,
    "colour_jitter": 0.2,
    "symmetries": True,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "eval_crop": 0.875,
    "drop_path": 0.0,
    "layer_decay": 1.0,
    "sampler": "uniform",
    "window": None,
    "tta": "none",
}
"""Fields that the files of older releases lack, and the values that these releases used."""


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that this or an older release has written, with those that it lacks as it had them."""
    started = settings.get("pretrained") or settings.get("weights")  # these were resized bilinearly too
    return ADDED | {"interpolation": "bilinear" if started else "auto"} | dict(settings)


def read_config(path: Path) -> Config:
    """The settings in a run folder's config.json. Raises DataError if it is missing or damaged."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        known = completed(raw)
        return Config(**{one.name: known[one.name] for one in fields(Config)})
    except FileNotFoundError:
        raise DataError(f"{path.parent}: not a run folder (no {path.name})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}); start the run again in another folder") from None


DECIDES_NOTHING = ("checkpoint_s", "eval_epochs", "data", "threads")
"""Fields that may differ when a run is resumed. The data are compared by the hash of their index instead. Another
number of threads changes the last bits on a CPU: the run says so (`train.device.use_threads`)."""


def differences(old: Config, new: Config) -> list[str]:
    """The differences between two configurations that would change the weights: `name: old, now new`."""
    a, b = old.to_dict(), new.to_dict()
    return [f"{k}: {a[k]}, now {b[k]}" for k in a if a[k] != b[k] and k not in DECIDES_NOTHING]


# ------------------------------------------------------------------ schedules: pure functions of the position


def learning_rate(config: Config, step: int, total: int) -> float:
    """The learning rate of `step` (0 the first) of `total`: linear warm-up to `lr`, then `schedule`, to zero or not."""
    if config.lr is None or config.warmup is None:
        raise ValueError("the configuration is not resolved")
    warm = round(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    done = (step - warm) / max(total - warm, 1)
    if config.schedule == "linear":
        return config.lr * (1.0 - done)
    return config.lr if config.schedule == "constant" else config.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def resolution_of(config: Config, epoch: int, epochs: int) -> int:
    """The training resolution of `epoch` in pixels: FFCV's ramp, over the first three quarters.

    It goes up in steps of 32; the last step is shorter if the sizes are no multiple of 32 apart.
    """
    start = config.start_resolution
    ramp = math.floor(epochs * RAMP_END)
    if start is None or epoch >= ramp:
        return config.resolution
    smaller = -(-(config.resolution - start) // RAMP_STEP_PX)
    return start + RAMP_STEP_PX * (epoch * smaller // ramp)


def pixel_share(config: Config, epochs: int) -> float:
    """Pixels of a training image, as a share of those at full size, averaged over `epochs`: 1 without a ramp.

    The cost of a step is about proportional to them.
    """
    return sum((resolution_of(config, epoch, epochs) / config.resolution) ** 2 for epoch in range(epochs)) / epochs
