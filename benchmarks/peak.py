"""A device's matrix peak: products of square matrices, in the fastest way that PyTorch has there."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.worker import Running

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MATRICES = {"cpu": (2048, 2), "cuda": (8192, 20)}
"""Side of the matrices, and products in a pass, by the device's type: smaller ones do not fill a GPU."""


def matrix_peak(device: "torch.device", precision: str) -> Running:
    """Products in one precision, `fp32`, `bf16` or `fp16`; a pass counts its GFLOP (2 n³ a product)."""
    import torch

    from train import device as devices

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    side, products = _MATRICES[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))

    def took_s(product: "Callable[[], Tensor]") -> float:
        begin = time.perf_counter()
        for _ in range(products):
            product()
        devices.synchronize(device)
        return time.perf_counter() - begin

    # the first of four calls makes ready
    fastest = min(products_of(left, right), key=lambda product: min([took_s(product) for _ in range(4)][1:]))

    def once() -> float:
        took_s(fastest)
        return products * 2 * side**3 / 1e9

    def warm() -> None:
        once()

    return Running(once, warm)


def products_of(left: "Tensor", right: "Tensor") -> "list[Callable[[], Tensor]]":
    """The ways to multiply two matrices (n, n), n a multiple of 16: on a CPU also as a convolution of 1×1.

    PyTorch multiplies and convolves with different libraries there: on AMD's processors MKL takes AVX2 where oneDNN
    takes AVX-512, and networks that are mostly convolutions were faster than a peak of the first alone.
    """
    import torch

    out = torch.empty_like(left)
    ways: list[Callable[[], Tensor]] = [lambda: torch.mm(left, right, out=out)]
    if left.device.type == "cpu":
        side = len(left)  # of 16 images, for PyTorch convolves few on one thread with the first library
        pixels = left.view(16, 1, side // 16, side).permute(0, 3, 1, 2)
        kernels = right.t().contiguous()[:, :, None, None]
        ways.append(lambda: torch.nn.functional.conv2d(pixels, kernels).permute(0, 2, 3, 1).reshape(side, side))
    return ways
