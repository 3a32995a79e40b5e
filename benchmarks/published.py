"""What others have published about GPUs and training rates, each figure with the place where it stands.

The only figures of `plan` that nobody measured here. One that could not be found is None, and the page says so.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One published number. what: measured or stated how; source: its name; url: where it was read."""

    value: float
    unit: str
    what: str
    source: str
    url: str


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet and others' measurements have it.

    peak: dense bf16 matrix product, TFLOP/s. memory: GB. bandwidth: of the memory, TB/s. pcie: slowest and fastest
    rate from host memory, GB/s. resnet50: slowest and fastest published training rate of ResNet-50 at 224 px in mixed
    precision, img/s of one GPU. decode: what DALI and nvJPEG decode, img/s of one GPU; the last is of larger images
    than ours, `decode_px` pixels each, or None where no such figure was found. also: beside them, not used.
    """

    name: str
    peak: Figure
    memory: Figure
    bandwidth: Figure
    pcie: tuple[Figure, Figure]
    resnet50: tuple[Figure, Figure]
    decode: tuple[Figure, Figure | None]
    decode_px: int = 0
    also: tuple[Figure, ...] = ()


_A100 = ("NVIDIA's A100 data sheet, as quoted by G. Lockwood", "https://glennklockwood.com/garden/processors/A100")
_H100 = ("NVIDIA's H100 white paper, as quoted by G. Lockwood", "https://glennklockwood.com/garden/processors/h100")
_LAMBDA = (
    "Lambda, deeplearning-benchmark, `pytorch-train-throughput-fp16.csv`",
    "https://github.com/lambdal/deeplearning-benchmark/blob/master/pytorch/pytorch-train-throughput-fp16.csv",
)
_EXAMPLES = (
    "NVIDIA, DeepLearningExamples, ResNet-50 v1.5 for PyTorch",
    "https://github.com/NVIDIA/DeepLearningExamples/blob/master/PyTorch/Classification/ConvNets/resnet50v1.5/README.md",
)
_MLPERF = (
    "MLPerf Training v3.0, NVIDIA's log of one DGX H100",
    "https://github.com/mlcommons/training_results_v3.0/blob/main/NVIDIA/results/dgxh100_ngc23.04_mxnet/resnet/result_0.txt",
)
_DALI = ("NVIDIA/DALI issue 5362, on NVIDIA's article", "https://github.com/NVIDIA/DALI/issues/5362")
_VISION = ("pytorch/vision pull request 8496", "https://github.com/pytorch/vision/pull/8496")

GPUS = {
    "a100": Gpu(
        name="A100 80 GB SXM",
        peak=Figure(312, "TFLOP/s", "bf16, dense", *_A100),
        memory=Figure(80, "GB", "HBM2e", *_A100),
        bandwidth=Figure(2.039, "TB/s", "of the memory", *_A100),
        pcie=(
            Figure(
                24.8,
                "GB/s",
                "nvbandwidth, copy engine, host to device, A100 SXM4",
                "NVIDIA developer forum, thread 352186",
                "https://forums.developer.nvidia.com/t/asymmetric-pcie-bandwidth-in-bidirectional-transfers-h2d-drops-56-"
                "while-d2h-maintains-performance/352186",
            ),
            Figure(32, "GB/s", "PCIe 4.0 x16, each way", *_A100),
        ),
        resnet50=(
            Figure(1582, "img/s", "PyTorch, mixed precision, 1 GPU", *_LAMBDA),
            Figure(2470, "img/s", "PyTorch, mixed precision, channels-last, 1 GPU", *_EXAMPLES),
        ),
        decode=(
            Figure(5000, "img/s", "DALI, every image on the hardware decoder", *_DALI),
            Figure(1000 / 0.1276548, "img/s", "torchvision on nvJPEG, 1,000 images of 551×676 px at once", *_VISION),
        ),
        decode_px=551 * 676,
        also=(
            Figure(7000, "img/s", "DALI, three quarters of the images on the hardware decoder", *_DALI),
            Figure(16621, "img/s", "ResNet-50, 8 GPUs: 6.72 times one", *_EXAMPLES),
        ),
    ),
    "h100": Gpu(
        name="H100 80 GB SXM",
        peak=Figure(989.4, "TFLOP/s", "bf16, dense", *_H100),
        memory=Figure(80, "GB", "HBM3", *_H100),
        bandwidth=Figure(3.35, "TB/s", "of the memory", *_H100),
        pcie=(
            Figure(
                35.2,
                "GB/s",
                "nvbandwidth, copy by a kernel, host to device; none was found for the copy engine",
                "NVIDIA/nvbandwidth issue 24",
                "https://github.com/NVIDIA/nvbandwidth/issues/24",
            ),
            Figure(64, "GB/s", "PCIe 5.0 x16, each way (128 GB/s both ways)", *_H100),
        ),
        resnet50=(
            Figure(2616, "img/s", "PyTorch, mixed precision, 1 GPU", *_LAMBDA),
            Figure(56041 / 8, "img/s", "MXNet, one of 8 GPUs (56,041 together), tuned for the record", *_MLPERF),
        ),
        decode=(
            Figure(
                56041 / 8,
                "img/s",
                "what DALI fed each of 8 GPUs while they trained, with 112 cores: no limit of its own",
                *_MLPERF,
            ),
            None,
        ),
        also=(Figure(20728, "img/s", "ResNet-50, 8 GPUs: 7.9 times one", *_LAMBDA),),
    ),
}
"""By the name that `--gpu` takes."""

_TIMM = (
    "timm, `benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv`",
    "https://github.com/huggingface/pytorch-image-models/blob/main/results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv",
)
_TRAIN = "training step, mixed precision, channels-last, one RTX 3090"
SAME_GPU: dict[str, Figure | None] = {
    "alexnet": None,
    "resnet18": Figure(3481.78, "img/s", _TRAIN, *_TIMM),
    "resnet34": Figure(2036.51, "img/s", _TRAIN, *_TIMM),
    "resnet50": Figure(1218.01, "img/s", _TRAIN, *_TIMM),
    "resnet101": Figure(747.89, "img/s", _TRAIN, *_TIMM),
    "resnet152": Figure(501.44, "img/s", _TRAIN, *_TIMM),
    "vit_b16": Figure(392.99, "img/s", _TRAIN, *_TIMM),
    "mixer_b16": Figure(556.6, "img/s", _TRAIN, *_TIMM),
}
"""Training rates of the eight models on one and the same GPU, which say how their shares of its peak compare. None: no
published rate was found."""

MIXER_GMACS = Figure(
    12.6,
    "GMAC",
    "forward pass at 224 px",
    "timm's model card of mixer_b16_224",
    "https://huggingface.co/timm/mixer_b16_224.goog_in21k_ft_in1k",
)
"""torchvision, whose weights say the multiply-adds of the other seven, has no Mixer."""

H100_HOST = Figure(
    2000,
    "GB",
    "memory of a DGX H100: 8 GPUs, 2×56 cores",
    "MLPerf Training v3.0, NVIDIA's description of the system",
    "https://github.com/mlcommons/training_results_v3.0/blob/main/NVIDIA/systems/dgxh100_ngc23.04_mxnet.json",
)

BACKWARD = Figure(
    3,
    "×",
    "FLOPs of a training step over those of its forward pass",
    "Kaplan et al. 2020, arXiv:2001.08361, section 2.1",
    "https://arxiv.org/abs/2001.08361",
)
