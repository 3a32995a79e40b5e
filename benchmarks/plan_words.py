"""A plan in words, and how its numbers are written."""

import math
from collections.abc import Iterable

from benchmarks.plan import Plan, Span, images_in, share_of_peak
from benchmarks.plan_costs import Costs
from benchmarks.tables import grid


def digits(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value == 0 or math.isinf(value):
        return str(value)
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{round(value, 2 - math.floor(math.log10(abs(value)))):,.{places}f}"


def span(range_: Span, factor: float = 1.0) -> str:
    """Both ends, or the lower one where the upper is not known."""
    low = digits(range_.low * factor)
    if math.isinf(range_.high):
        return f"{low} or more"
    high = digits(range_.high * factor)
    return low if low == high else f"{low}–{high}"


def exact(value: float) -> str:
    """A published value as it was published."""
    return f"{value:g}" if value < 1000 else f"{value:,.0f}"


def cpu(costs: Costs) -> str:
    """The CPU that the costs were measured on."""
    return costs.environment.cpu


def in_words(found: Plan, costs: Costs, ram_gb: float | None) -> str:
    """One plan: what each way gives, which engine to use, what will limit it, and when the data leave memory."""
    height, width = costs.packed_px
    machine, share = found.machine, share_of_peak(found.machine.gpu, found.model)
    lines = [
        f"{found.model} on {machine}, {costs.resolution_px} px, {found.images:,} images packed at {width}×{height} px.",
        f"On paper: per-image costs of {cpu(costs)}, published figures of the GPU; see docs/scaling.md.",
        "",
        f"The GPU{'s' * (machine.gpus > 1)} would train {span(found.gpu)} img/s "
        f"({span(share, 100)} % of the peak of {machine.card.peak.value:g} TFLOP/s).",
        "",
        grid(
            ["way", "loads, img/s", "what of it gives way first", "training is limited by"],
            (
                [way.name, span(way.rate), way.narrowest, way.verdict(found.gpu) if way.fits else "does not fit"]
                for way in found.ways
            ),
        ),
        f"Use: --engine {found.use.engine} ({found.use.name}): {found.why}.",
        f"Limit: {found.use.verdict(found.gpu)}.",
        *_memory(found, costs, ram_gb),
    ]
    return "\n".join(lines)


def _memory(found: Plan, costs: Costs, ram_gb: float | None) -> Iterable[str]:
    """Where the data set lies, and what a disk must give where RAM does not hold it."""
    pixels = 3 * costs.packed_px[0] * costs.packed_px[1]
    for name, size in (("jpg", costs.jpg_bytes), ("raw", costs.raw_bytes)):
        text = f"As {name} the set takes {digits(found.images * size / 1e9)} GB"
        if ram_gb is None:
            yield text + "."
            continue
        held = digits(images_in(ram_gb, size))
        if found.images * size <= ram_gb * 1e9:
            yield f"{text} and fits {ram_gb:g} GB of RAM, which holds up to {held} such images."
        else:
            yield (
                f"{text} and leaves {ram_gb:g} GB of RAM, which holds {held} images: the disk "
                f"then has to give {span(found.gpu, size / 1e9)} GB/s."
            )
    decode_s = found.images * costs.s("decode whole") / found.machine.cores
    yield (
        f"Resident, it takes {digits(found.images * pixels / 1e9)} GB of each GPU's "
        f"{found.machine.card.memory.value:g} GB, and decoding it once about {digits(decode_s)} to "
        f"{digits(2 * decode_s)} s on all cores."
    )
