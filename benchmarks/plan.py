"""Where the bottleneck would be, worked out on paper: a model, GPUs and cores → what each engine gives and what limits.

Every rate is a range. Of the GPU: the slowest and the fastest published training of ResNet-50 on it, carried over to
other models by how their shares of one and the same GPU's peak compare. Of the CPU: from cores that are hyperthreads,
two of which do the work of one, to whole cores. Measured costs come from `plan_costs`, published figures from
`published`; `plan_beside` holds it against what has run on a GPU.
"""

import math
from dataclasses import dataclass

from benchmarks.plan_costs import Costs
from benchmarks.published import GPUS, MIXER_GMACS, SAME_GPU, Gpu
from shards.errors import UsageError

REFERENCE = "resnet50"
SPARE = 0.1  # of the GPU's memory, as the resident engine leaves it to the model
HAM10000_IMAGES = 10_015
"""Tschandl et al. 2018, doi:10.1038/sdata.2018.161: all images of HAM10000."""
CHANNEL_BYTES = 3
LINK = "PCIe"
"""How `Way.limits` calls the link to the GPU."""


@dataclass(frozen=True)
class Span:
    """From `low` to `high`; `high` is infinite where no upper figure is known."""

    low: float
    high: float

    def times(self, factor: float) -> "Span":
        """Both ends times a number."""
        return Span(self.low * factor, self.high * factor)

    def least(self, other: "Span") -> "Span":
        """The lesser of both, end by end."""
        return Span(min(self.low, other.low), min(self.high, other.high))


@dataclass(frozen=True)
class Machine:
    """gpu: a key of GPUS. cores: of the whole machine, one of which each GPU's training process keeps for itself."""

    gpu: str
    gpus: int
    cores: int

    def __post_init__(self) -> None:
        """Refuse what cannot be worked out. Raises UsageError."""
        if self.gpu not in GPUS:
            raise UsageError(f"--gpu '{self.gpu}' is unknown: figures are there for {', '.join(GPUS)}")
        if self.gpus < 1 or self.cores <= self.gpus:
            raise UsageError(
                f"--cores {self.cores}: each of {self.gpus} GPUs needs a core for its training process, and loading at "
                f"least one more: give {self.gpus + 1} or more"
            )

    @property
    def card(self) -> Gpu:
        """The figures of one GPU."""
        return GPUS[self.gpu]

    def __str__(self) -> str:
        return f"{self.gpus}×{self.card.name}, {self.cores} cores"


@dataclass(frozen=True)
class Way:
    """One way to load: limits are (what, img/s of the whole machine). fits: whether memory holds the data set."""

    name: str
    engine: str
    limits: tuple[tuple[str, Span], ...]
    fits: bool = True

    @property
    def rate(self) -> Span:
        """img/s that it loads."""
        span = Span(math.inf, math.inf)
        for _, limit in self.limits:
            span = span.least(limit)
        return span

    @property
    def narrowest(self) -> str:
        """What limits it first."""
        return min(self.limits, key=lambda limit: (limit[1].low, limit[1].high))[0]

    def verdict(self, gpu: Span) -> str:
        """What limits training: `GPU`, this way's narrowest part, or either."""
        if self.rate.low >= gpu.high * (1 - 1e-9):  # one published rate may stand on both sides
            return "GPU"
        if self.rate.high <= gpu.low * (1 + 1e-9):
            return self.narrowest
        return f"GPU or {self.narrowest}"


@dataclass(frozen=True)
class Plan:
    """What comes out: img/s that the GPUs train at, the ways to load, and the one to take with its reason."""

    machine: Machine
    model: str
    images: int
    gpu: Span
    ways: tuple[Way, ...]
    use: Way
    why: str


def forward_flop(model: str, resolution_px: int) -> int:
    """FLOPs of an image's forward pass, counted over the model itself (a multiply-add is two)."""
    from train.models import check_resolution, cost

    check_resolution(model, resolution_px)
    return cost(model, resolution_px, 7)[1]


def published_flop(model: str) -> tuple[float, str]:
    """The same at 224 px and 1,000 classes as the model's own library says it, and where."""
    if model == "mixer_b16":
        return 2e9 * MIXER_GMACS.value, MIXER_GMACS.source
    import torchvision

    names = {"alexnet": "AlexNet_Weights", "vit_b16": "ViT_B_16_Weights"}
    weights = getattr(torchvision.models, names.get(model, model.replace("resnet", "ResNet") + "_Weights"))
    return 2e9 * weights.IMAGENET1K_V1.meta["_ops"], f"torchvision's `{weights.__name__}.IMAGENET1K_V1`"


def train_flop(model: str, resolution_px: int) -> float:
    """FLOPs of a training step per image."""
    from benchmarks.speed import FORWARD_AND_BACKWARD

    return FORWARD_AND_BACKWARD * forward_flop(model, resolution_px)


def relative_share(model: str) -> float | None:
    """The model's share of a GPU's peak over ResNet-50's, both at 224 px on the same GPU; None where nobody says."""
    own, other = SAME_GPU[model], SAME_GPU[REFERENCE]
    if own is None or other is None:
        return None
    return own.value * forward_flop(model, 224) / (other.value * forward_flop(REFERENCE, 224))


def share_of_peak(gpu: str, model: str) -> Span:
    """Share of the GPU's peak that training reaches: ResNet-50's published rates, times the relative share."""
    card = GPUS[gpu]
    per_image = train_flop(REFERENCE, 224) / (card.peak.value * 1e12)
    reference = Span(card.resnet50[0].value, card.resnet50[1].value).times(per_image)
    return reference.times(relative_share(model) or 1.0)


def gpu_rate(gpu: str, model: str, resolution_px: int) -> Span:
    """img/s that one GPU trains at when it never waits."""
    peak = GPUS[gpu].peak.value * 1e12
    return share_of_peak(gpu, model).times(peak / train_flop(model, resolution_px))


def python_rate(costs: Costs, kind: str) -> Span:
    """img/s of `jpg` or `raw` that the Python of one process gives: one core's worth of it."""
    return Span(0.5, 1.0).times(1 / (costs.s("python") + (costs.s("cut") if kind == "jpg" else 0.0)))


def ways(machine: Machine, costs: Costs, images: int) -> tuple[Way, ...]:
    """The ways to load on a machine, from the one that asks for least to the one that asks for most."""
    from shards.engines.dali import Graph
    from shards.engines.dali_feed import READERS

    card, gpus, spare_cores = machine.card, machine.gpus, machine.cores - machine.gpus
    pixels = costs.resolution_px**2 * CHANNEL_BYTES

    def cores(seconds: float) -> Span:
        return Span(0.5, 1.0).times(spare_cores / seconds)

    def python(kind: str) -> Span:  # one process a GPU
        return python_rate(costs, kind).times(gpus)

    def link(bytes_: float) -> Span:
        return Span(card.pcie[0].value, card.pcie[1].value).times(1e9 * gpus / bytes_)

    fed = costs.s("feed")
    # The JPEGs that the hardware decoder is not given go through a hybrid one, whose part on the CPU is less than all.
    hybrid = (1 - Graph("jpg").hw_decoder_load) * costs.s("decode whole")
    beside = Span(0.5 * spare_cores / (fed + hybrid), spare_cores / fed)
    slowest, fastest = card.decode
    packed = costs.packed_px[0] * costs.packed_px[1]
    decoders = Span(slowest.value, fastest.value * card.decode_px / packed if fastest else math.inf).times(gpus)
    memory = card.bandwidth.value * 1e12 * gpus  # the gather: no neighbour kept in a cache, or every one
    held = images * costs.packed_px[0] * costs.packed_px[1] * CHANNEL_BYTES
    return (
        Way(
            "jpg, native",
            "native",
            (("CPU cores", cores(costs.s("jpg"))), ("Python", python("jpg")), (LINK, link(pixels))),
        ),
        Way(
            "jpg, dali",
            "dali",
            (
                ("JPEG decoding", decoders),
                ("CPU cores", beside),
                ("feeding DALI", Span(0.5, READERS).times(gpus / fed)),
                (LINK, link(costs.jpg_bytes)),
            ),
        ),
        Way(
            "raw, native",
            "native",
            (("CPU cores", cores(costs.s("raw"))), ("Python", python("raw")), (LINK, link(pixels))),
        ),
        Way(
            "resident",
            "resident",
            (
                (
                    "GPU memory",
                    Span(memory / (5 * pixels), memory / (pixels + CHANNEL_BYTES * costs.crop_px)),
                ),
            ),
            fits=held <= (1 - SPARE) * card.memory.value * 1e9,
        ),
    )


def plan(machine: Machine, model: str, costs: Costs, images: int = HAM10000_IMAGES) -> Plan:
    """Work it out. Raises UsageError for an unknown GPU or model, and for too few cores."""
    if model not in SAME_GPU:
        raise UsageError(f"--model '{model}' is unknown: figures are there for {', '.join(SAME_GPU)}")
    if images < 1:
        raise UsageError(f"--images {images}: give 1 or more")
    gpu = gpu_rate(machine.gpu, model, costs.resolution_px).times(machine.gpus)
    found = ways(machine, costs, images)
    fitting = [way for way in found if way.fits]
    for way in fitting:
        if way.verdict(gpu) == "GPU":
            why = "it keeps the GPU busy even where that is fastest and the cores are slowest"
            if way is not fitting[0]:
                why += f"; {fitting[0].name} is not sure to ({fitting[0].narrowest})"
            return Plan(machine, model, images, gpu, found, way, why)
    best = max(fitting, key=lambda way: (min(way.rate.low, gpu.low), way.rate.low))
    why = f"the fastest at the low end; no way is sure to keep the GPU busy ({best.narrowest} may limit)"
    return Plan(machine, model, images, gpu, found, best, why)


def images_in(gigabytes: float, bytes_per_image: float) -> int:
    """How many images a memory holds, if it holds nothing else."""
    return int(gigabytes * 1e9 / bytes_per_image)


def cores_needed(gpu: Span, seconds: float, python: Span) -> Span | None:
    """Cores, the training process's own among them, that load as fast as one GPU trains; None where none do.

    python: img/s that the Python of one process gives (`python_rate`). Cores beyond those that it keeps busy do not
    help: where the GPU may outrun it, the range ends with them.
    """
    if gpu.low >= python.high:
        return None
    return Span(1 + math.ceil(gpu.low * seconds), 1 + math.ceil(2 * min(gpu.high, python.low) * seconds))
