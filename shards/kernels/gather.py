"""The gather of the resident engine as one Triton kernel: `gather` of shards/engines/resident.py, to the bit.

Each program makes some output pixels of one image. Triton comes with PyTorch's builds for CUDA.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (what Triton compiles looks like Python, and has other types)

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIXELS = 256
"""Output pixels of a program."""


@triton.jit
def _place(place, extent, side, bits: tl.constexpr):
    """As in resident.py: the line before a position, which may be -1, and the weight of the one behind it.

    A double is added before the division, because that rounds towards zero.
    """
    double = 2 * side
    numerator = (2 * place + 1) * extent - side
    low = (numerator + double) // double - 1
    return low, (((numerator - low * double) << bits) + side) // double


@triton.jit
def _weight(number: tl.constexpr, after, lines: tl.constexpr, bits: tl.constexpr):
    """The weight of a line, as in resident.py."""
    before = (1 << bits) - after
    if lines == 4:
        product = (before * after + (1 << (bits - 1))) >> bits
        first = (product * before + (1 << bits)) >> (bits + 1)
        last = (product * after + (1 << bits)) >> (bits + 1)
        if number == 0:
            weight = -first
        elif number == 1:
            weight = before + 2 * first - last
        elif number == 2:
            weight = after + 2 * last - first
        else:
            weight = -last
    elif number == 0:
        weight = before
    else:
        weight = after
    return weight


@triton.jit
def _inside(line, extent):
    return tl.minimum(tl.maximum(line, 0), extent - 1)


@triton.jit
def _gather(
    pixels,
    table,
    out,
    side,
    lines: tl.constexpr,
    row_bits: tl.constexpr,
    column_bits: tl.constexpr,
    fraction: tl.constexpr,
    count: tl.constexpr,
):
    image = tl.program_id(0)
    at = tl.program_id(1) * count + tl.arange(0, count)
    inside = at < side * side
    row, column = at // side, at % side
    of_image = table + image.to(tl.int64) * 7
    first = tl.load(of_image)
    width = tl.load(of_image + 1).to(tl.int32)
    y, x = tl.load(of_image + 2).to(tl.int32), tl.load(of_image + 3).to(tl.int32)
    h, w = tl.load(of_image + 4).to(tl.int32), tl.load(of_image + 5).to(tl.int32)
    symmetry = tl.load(of_image + 6).to(tl.int32)
    row = tl.where((symmetry & 2) != 0, side - 1 - row, row)
    column = tl.where((symmetry & 1) != 0, side - 1 - column, column)
    transposed = (symmetry & 4) != 0
    top, below = _place(tl.where(transposed, column, row), h, side, row_bits)
    left, right = _place(tl.where(transposed, row, column), w, side, column_bits)
    half: tl.constexpr = lines // 2
    down: tl.constexpr = row_bits - fraction
    shift: tl.constexpr = fraction + column_bits
    for channel in tl.static_range(3):
        mixed = tl.zeros((count,), tl.int32)
        for i in tl.static_range(lines):
            place = x + _inside(left + (i - half + 1), w)
            total = tl.zeros((count,), tl.int32)
            for k in tl.static_range(lines):
                line = y + _inside(top + (k - half + 1), h)
                source = first + (line * width).to(tl.int64) + place
                value = tl.load(pixels + source * 3 + channel, mask=inside, other=0).to(tl.int32)
                total += value * _weight(k, below, lines, row_bits)
            mixed += ((total + (1 << (down - 1))) >> down) * _weight(i, right, lines, column_bits)
        value = _inside((mixed + (1 << (shift - 1))) >> shift, 256).to(tl.uint8)
        tl.store(out + (image.to(tl.int64) * side * side + at) * 3 + channel, value, mask=inside)


def gather(
    pixels: Tensor, table: Tensor, resolution: int, lines: int, row_bits: int, column_bits: int, fraction: int
) -> Tensor:
    """Crop, resize and turn a batch: (n, S, S, 3) uint8.

    pixels: (pixels, 3) uint8. table: (n, 7) int64, as `ResidentEngine.table`. lines: that are mixed, 2 or 4. row_bits,
    column_bits, fraction: of the weights, and of a mixed row.
    """
    n = len(table)
    out = torch.empty((n, resolution, resolution, 3), dtype=torch.uint8, device=pixels.device)
    grid = (n, triton.cdiv(resolution * resolution, _PIXELS))
    _gather[grid](pixels, table, out, resolution, lines, row_bits, column_bits, fraction, count=_PIXELS)
    return out
