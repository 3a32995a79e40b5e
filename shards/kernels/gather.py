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
def _neighbours(place, start, extent, side, bits: tl.constexpr):
    """As in resident.py. A double is added before the division, because that rounds towards zero."""
    double = 2 * side
    numerator = (2 * place + 1) * extent - side
    low = (numerator + double) // double - 1
    weight = (((numerator - low * double) << bits) + side) // double
    before = tl.minimum(tl.maximum(low, 0), extent - 1)
    after = tl.minimum(tl.maximum(low + 1, 0), extent - 1)
    return start + before, start + after, weight


@triton.jit
def _mixed(pixels, above, below, weight, inside, row_bits: tl.constexpr, fraction: tl.constexpr):
    """The mix of the values above and below, with `fraction` more bits."""
    upper = tl.load(pixels + above, mask=inside, other=0).to(tl.int32) << fraction
    lower = tl.load(pixels + below, mask=inside, other=0).to(tl.int32) << fraction
    return upper + (((lower - upper) * weight + (1 << (row_bits - 1))) >> row_bits)


@triton.jit
def _gather(
    pixels,
    table,
    out,
    side,
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
    top, bottom, share_y = _neighbours(tl.where(transposed, column, row), y, h, side, row_bits)
    left, right, share_x = _neighbours(tl.where(transposed, row, column), x, w, side, column_bits)
    weight = tl.minimum(share_y, (1 << row_bits) - 1)
    upper, lower = first + (top * width).to(tl.int64), first + (bottom * width).to(tl.int64)
    shift: tl.constexpr = fraction + column_bits
    for channel in tl.static_range(3):
        one = _mixed(pixels + channel, (upper + left) * 3, (lower + left) * 3, weight, inside, row_bits, fraction)
        other = _mixed(pixels + channel, (upper + right) * 3, (lower + right) * 3, weight, inside, row_bits, fraction)
        mixed = one * ((1 << column_bits) - share_x) + other * share_x
        value = ((mixed + (1 << (shift - 1))) >> shift).to(tl.uint8)
        tl.store(out + (image.to(tl.int64) * side * side + at) * 3 + channel, value, mask=inside)


def gather(pixels: Tensor, table: Tensor, resolution: int, row_bits: int, column_bits: int, fraction: int) -> Tensor:
    """Crop, resize and turn a batch: (n, S, S, 3) uint8.

    pixels: (pixels, 3) uint8. table: (n, 7) int64, as `ResidentEngine.table`. row_bits, column_bits, fraction: of the
    weights, and of a mixed row.
    """
    n = len(table)
    out = torch.empty((n, resolution, resolution, 3), dtype=torch.uint8, device=pixels.device)
    grid = (n, triton.cdiv(resolution * resolution, _PIXELS))
    _gather[grid](pixels, table, out, resolution, row_bits, column_bits, fraction, count=_PIXELS)
    return out
