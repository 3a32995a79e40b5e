"""timm's ResNets once more, for prediction alone, so that it does not import timm.

`import timm` brings torchvision and the compiler with it. With timm, `train.predict` starts in 4.3 s instead of 2.1 s
(medians of 7 on 2 cores, AMD EPYC of family 25). Names, tensors and logits equal timm's bit for bit; a test checks
that. He et al. 2016 (CVPR), with the stride in the 3×3 convolution of a bottleneck, as in torchvision and timm.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

LAYERS = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
"""By name: the kind of block, and the number of blocks in each of the four stages."""


class Block(nn.Module):
    """A residual block: convolutions with batch norm, the input added before the last ReLU."""

    def __init__(self, sizes: tuple[int, ...], kernels: tuple[int, ...], stride: int) -> None:
        """sizes: channels before, between and after the convolutions. kernels: their sides. stride: that of the 3×3."""
        super().__init__()
        self.depth = len(kernels)
        strided = kernels.index(3)
        for number, ((before, behind), kernel) in enumerate(zip(pairwise(sizes), kernels, strict=True)):
            step = stride if number == strided else 1
            convolution = nn.Conv2d(before, behind, kernel, step, padding=kernel // 2, bias=False)
            setattr(self, f"conv{number + 1}", convolution)
            setattr(self, f"bn{number + 1}", nn.BatchNorm2d(behind))
        self.downsample: nn.Module | None = None
        if stride != 1 or sizes[0] != sizes[-1]:
            convolution = nn.Conv2d(sizes[0], sizes[-1], 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        short = x if self.downsample is None else self.downsample(x)
        for number in range(1, self.depth + 1):
            x = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x))
            if number < self.depth:
                x = torch.relu(x)
        return torch.relu(x + short)


class ResNet(nn.Module):
    """(N, 3, H, W) float32 → (N, classes), with the method names of timm's models."""

    def __init__(self, name: str, classes: int) -> None:
        """name: one of LAYERS. The tensors are on `meta`: set them with `load_state_dict(…, assign=True)`."""
        super().__init__()
        kind, layers = LAYERS[name]
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
            width = 64
            for stage, count in enumerate(layers):
                inner = 64 * 2**stage
                blocks = []
                for number in range(count):
                    stride = 2 if stage and not number else 1
                    if kind == "basic":
                        blocks.append(Block((width, inner, inner), (3, 3), stride))
                    else:
                        blocks.append(Block((width, inner, inner, 4 * inner), (1, 3, 1), stride))
                    width = inner if kind == "basic" else 4 * inner
                setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            self.fc = nn.Linear(width, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, C, H / 32, W / 32)."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, C, h, w) → (N, classes), or the pooled (N, C) with `pre_logits`."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) float32 → (N, classes) logits."""
        return self.forward_head(self.forward_features(x))
