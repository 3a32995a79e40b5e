"""The page docs/scaling.md: all its numbers come out of `plan`, `plan_costs` and `published`."""

from benchmarks.plan import (
    HAM10000_IMAGES,
    LINK,
    SPARE,
    Machine,
    Span,
    cores_needed,
    forward_flop,
    gpu_rate,
    images_in,
    plan,
    published_flop,
    python_rate,
    relative_share,
    share_of_peak,
    ways,
)
from benchmarks.plan_beside import beside_measured
from benchmarks.plan_costs import PARTS, Costs
from benchmarks.plan_words import cpu, digits, exact, span
from benchmarks.published import BACKWARD, GPUS, H100_HOST, MIXER_GMACS, SAME_GPU, Figure
from benchmarks.tables import clock_text, grid

MACHINES = (
    Machine("a100", 1, 16),
    Machine("h100", 1, 16),
    *(Machine("h100", 8, cores) for cores in (16, 32, 64, 128)),
)
"""What the page works out."""

RAM_GB = (16, 64, 256, 1000, 2000)


def page(costs: Costs) -> str:
    """docs/scaling.md."""
    parts = [
        _INTRODUCTION,
        _in_short(costs),
        beside_measured(costs),
        _measured(costs),
        _published(),
        _models(costs),
        _bottlenecks(costs),
        _memories(costs),
    ]
    return "\n".join([*parts, _NOT_COUNTED])


_INTRODUCTION = """# Where the bottleneck would be on a GPU

Worked out on paper: it joins what an image costs a CPU, measured here, to what others have published about GPUs. What
has run on one since stands beside it, under "Beside one H100 80 GB SXM". The page is written by
`python -m benchmarks.run plan --page docs/scaling.md`, and a test holds it to what the code gives. One case at a time,
and your own CPU:

    python -m benchmarks.run plan --gpu h100 --cores 16 --model resnet18
    python -m benchmarks.run plan --measure --data data/shards       # writes benchmarks/results/plan-costs.json

Every rate is a range, and a verdict holds for the whole of it: "GPU" where the slowest loading outruns the fastest
training, the part of the loader that gives way first where the fastest loading does not keep up with the slowest
training, and both names where the ranges overlap. What an image costs the CPU enters as its median: the
intervals of those measurements, which stand below, are not in the ranges.

- **GPU**: img/s = peak × share of the peak ÷ FLOPs of a training step, which are three forward passes. The share is an
  assumption. ResNet-50's comes from the slowest and the fastest published training rate found for the GPU; another
  model's is that times how the two compare on one RTX 3090, where all but AlexNet have been timed alike.
- **native**: the least of cores ÷ CPU seconds per image, processes ÷ Python seconds per image, and the link to the GPU
  ÷ bytes of a finished image. One core per GPU is left to the training process. The upper end takes cores as the one
  measured; the lower end takes them for hyperthreads, two of which do the work of one core.
- **dali**: the least of what nvJPEG decodes, cores ÷ CPU seconds, what feeds it, and the link ÷ bytes of a JPEG. The
  third of the images that the engine does not give to the hardware decoder costs the CPU nothing at the upper end, and
  a whole decode at the lower.
- **resident**: reading the crop and writing the image in the GPU's own memory, with every neighbour read once or four
  times; possible while the decoded set fits.
"""

_NOT_COUNTED = """## What this leaves out

- Whether threads scale: the costs are of one. The Python part assumes that one process runs one core's worth of it;
  the training loop's own Python shares that core and is not counted.
- What DALI's hybrid decoder takes from the GPU's cores, and exactly what from the CPU: no figure per image was found.
- The first images of an epoch, disks that are slower than the rate above, the memory bandwidth of the host (at the
  rates above a small part of what servers have), communication between GPUs, and batches too small to fill a GPU.
- `torch.compile` and newer software than the published rates had: both raise what a GPU asks for.
- Other GPUs' or CPUs' figures: measure your own CPU; for GPUs, `make gpu-check` measures instead of guessing.
"""


def _in_short(costs: Costs) -> str:
    """For every machine: the models that a way is sure to keep the GPU busy with."""
    lines = []
    for machine in MACHINES:
        plans = [plan(machine, model, costs) for model in SAME_GPU]
        cells = [str(machine)]
        for position in range(len(plans[0].ways)):
            sure = [each.model for each in plans if each.ways[position].verdict(each.gpu) == "GPU"]
            cells.append("all eight" if len(sure) == len(plans) else ", ".join(sure) or "none")
        lines.append(cells)
    names = [way.name for way in ways(MACHINES[0], costs, HAM10000_IMAGES)]
    wide = " The link to the GPU is nowhere the narrowest part." if _link_is_wide(costs) else ""
    return f"""## In short

Models with which the GPU is sure to be the limit, over the whole of both ranges:

{grid(["machine", *names], lines)}
Resident, as long as the set fits.{wide}
"""


def _link_is_wide(costs: Costs) -> bool:
    """Whether something else is narrower than the link in every way to load, at both ends of the range."""
    for machine in MACHINES:
        for way in ways(machine, costs, HAM10000_IMAGES):
            link = dict(way.limits).get(LINK)
            if link is not None and (link.low <= way.rate.low or link.high <= way.rate.high):
                return False
    return True


def _measured(costs: Costs) -> str:
    """The per-image costs."""
    height, width = costs.packed_px
    lines = [
        [name, what, f"{1e6 * c.median:.1f} [{1e6 * c.low:.1f}, {1e6 * c.high:.1f}]"]
        for name, what in PARTS.items()
        if (c := costs.seconds[name])
    ]
    machine = costs.environment
    jpg, raw, crop = (exact(value) for value in (costs.jpg_bytes, costs.raw_bytes, costs.crop_px))
    return f"""## What an image costs a CPU

One core of {cpu(costs)}, {clock_text(machine)} MHz, of
{machine.cores} that the process could use; one thread. {costs.images} images packed at {width}×{height} px, of
{jpg} bytes as JPEG and {raw} raw; random-resized crops of {crop} px on average to {costs.resolution_px} px.
CPU time, not the clock's: medians of {costs.rounds} rounds with 95 % intervals.

{grid(["part", "what", "µs an image"], lines)}
"all of it" is timed by itself; decoding, resizing and Python are differences between timings of the same round, as
`benchmarks/plan_costs.py` says.

`{machine.command}`, {machine.date}, commit {machine.commit}; Python {machine.python}; {machine.versions}.
"""


def _link(figure: Figure) -> str:
    return f"[{figure.source}]({figure.url})"


def _published() -> str:
    """The published figures."""
    lines = []
    for card in GPUS.values():
        named = [
            ("peak", card.peak),
            ("memory", card.memory),
            ("memory bandwidth", card.bandwidth),
            ("host to device, slowest", card.pcie[0]),
            ("host to device, fastest", card.pcie[1]),
            ("training ResNet-50, slowest", card.resnet50[0]),
            ("training ResNet-50, fastest", card.resnet50[1]),
            ("decoding JPEGs, slowest", card.decode[0]),
            ("decoding JPEGs, fastest", card.decode[1]),
            *(("beside it, not used", figure) for figure in card.also),
        ]
        for name, figure in named:
            if figure is None:
                lines.append([card.name, name, "none found", "", ""])
            else:
                value = f"{exact(figure.value)} {figure.unit}"
                lines.append([card.name, name, value, figure.what, _link(figure)])
    return f"""## What others have published

{grid(["GPU", "figure", "value", "what", "source"], lines)}
The fastest decoding was of larger images; it is scaled by their pixels to ours, which is the most that smaller images
can give. Where none was found, decoding has no upper end here.

A training step has {BACKWARD.value:g} times the FLOPs of its forward pass: {_link(BACKWARD)}.
"""


def _models(costs: Costs) -> str:
    """FLOPs, their cross-check, and what the GPUs would train."""
    flops, rates = [], []
    for model, timed in SAME_GPU.items():
        counted, at_224 = forward_flop(model, costs.resolution_px), forward_flop(model, 224)
        published, where = published_flop(model)
        link = f"[{where}]({MIXER_GMACS.url})" if model == "mixer_b16" else where
        off = f"{100 * (at_224 / published - 1) + 0.0:+.1f} %".replace("-0.0", "0.0").replace("+0.0", "0.0")
        flops.append([model, f"{counted / 1e9:.2f}", f"{published / 1e9:.2f}", off, link])
        share, rate = relative_share(model), "none found"
        if timed is not None:
            rate = digits(timed.value)
        of_gpus = []
        for gpu in GPUS:
            of_gpus += [
                span(share_of_peak(gpu, model), 100) + " %",
                span(gpu_rate(gpu, model, costs.resolution_px)),
            ]
        rates.append([model, rate, "1 assumed" if share is None else digits(share), *of_gpus])
    timed = next(figure for figure in SAME_GPU.values() if figure)
    titles = ["model", "RTX 3090, img/s", "share of peak over ResNet-50's"]
    for card in GPUS.values():
        titles += [f"{card.name}: share of peak", "img/s"]
    return f"""## The models

FLOPs of a forward pass at {costs.resolution_px} px, counted over the models themselves with 7 classes (PyTorch's
FlopCounterMode; a multiply-add is two), beside those that their libraries give at 224 px with 1,000 classes:

{grid(["model", "GFLOP, counted", "GFLOP, published", "difference at 224 px", "source"], flops)}
What one GPU would train, if it never waited:

{grid(titles, rates)}
RTX 3090: {timed.what}, {_link(timed)}.
"""


def _bottlenecks(costs: Costs) -> str:
    """For every machine: what each way loads, and for every model what limits."""
    parts = ["## Where the bottleneck is\n"]
    for machine in MACHINES:
        plans = [plan(machine, model, costs) for model in SAME_GPU]
        found = plans[0].ways
        parts.append(f"### {machine}\n")
        loads = [
            [way.name, span(way.rate), "; ".join(f"{name} {span(limit)}" for name, limit in way.limits)]
            for way in found
        ]
        parts.append(grid(["way", "loads, img/s", "its parts"], loads))
        lines = []
        for each in plans:
            without = plan(machine, each.model, costs, images=10**9)
            verdicts = (way.verdict(each.gpu) for way in each.ways)
            lines.append([each.model, span(each.gpu), *verdicts, each.use.name, without.use.name])
        titles = ["model", "GPU, img/s", *(way.name for way in found)]
        parts.append(grid([*titles, f"use, {HAM10000_IMAGES:,} images", "use, a set too large for the GPU"], lines))
    lines = []
    for model in SAME_GPU:
        cells = [model]
        for gpu in GPUS:
            rate = gpu_rate(gpu, model, costs.resolution_px)
            cells += [_cores(rate, costs, kind) for kind in ("jpg", "raw")]
        lines.append(cells)
    titles = [f"{card.name}, {kind}" for card in GPUS.values() for kind in ("jpg", "raw")]
    parts.append("Cores that one GPU needs, its training process's among them, for the native engine:\n")
    parts.append(grid(["model", *titles], lines))
    jpg, raw = (span(python_rate(costs, kind)) for kind in ("jpg", "raw"))
    parts.append(
        f"One process's Python gives {jpg} img/s of jpg and {raw} of raw. Where the GPU may train faster,\n"
        "the cores are those that Python keeps busy, and more do not help; where it is sure to, no number does.\n"
    )
    return "\n".join(parts)


def _cores(gpu: Span, costs: Costs, kind: str) -> str:
    """The cores that one GPU needs, and whether Python gives way before they are enough."""
    python = python_rate(costs, kind)
    needed = cores_needed(gpu, costs.s(kind), python)
    if needed is None:
        return "Python limits first"
    return _count(needed) + (", then Python limits" if gpu.high > python.low else "")


def _count(range_: Span) -> str:
    return f"{range_.low:,.0f}–{range_.high:,.0f}" if range_.low != range_.high else f"{range_.low:,.0f}"


def _memories(costs: Costs) -> str:
    """What size of data set leaves the GPU's memory and RAM, and what a disk has to give then."""
    height, width = costs.packed_px
    pixels = 3 * height * width
    held = [
        [f"{gb:,} GB", *(digits(images_in(gb, size)) for size in (costs.jpg_bytes, costs.raw_bytes))] for gb in RAM_GB
    ]
    memory = {card.memory.value for card in GPUS.values()}
    resident = "; ".join(f"{gb:g} GB hold {digits(images_in(gb * (1 - SPARE), pixels))}" for gb in sorted(memory))
    rates = []
    for model in SAME_GPU:
        cells = [model]
        for gpu in GPUS:
            rate = gpu_rate(gpu, model, costs.resolution_px)
            cells += [span(rate, size / 1e9) for size in (costs.jpg_bytes, costs.raw_bytes)]
        rates.append(cells)
    titles = [f"{card.name}, {kind}" for card in GPUS.values() for kind in ("jpg", "raw")]
    jpg, raw = (digits(HAM10000_IMAGES * size / 1e9) for size in (costs.jpg_bytes, costs.raw_bytes))
    host = f"{exact(H100_HOST.value)} GB: {_link(H100_HOST)}"
    return f"""## What size of data set leaves memory

Images packed at {width}×{height} px that RAM holds, if it holds nothing else. A DGX H100 has
{host}.

{grid(["RAM", "jpg", "raw"], held)}
HAM10000's {HAM10000_IMAGES:,} images take {jpg} GB as jpg and {raw} GB raw. Decoded in the GPU's memory, of which
a tenth is left free, {resident} images. Every GPU holds the whole training split, so eight hold no more than one;
what the model needs comes off.

Once a set has left RAM, a disk has to give, in GB/s for one GPU that never waits:

{grid(["model", *titles], rates)}"""
