"""The networks: eight by short names and any other of timm by its own, each built for a size and number of classes."""

import difflib
import functools
import inspect
from collections.abc import Collection
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shards.common.errors import UsageError, one_line
from train.config import RAMP_STEP_PX
from train.device import Decision
from train.head import InputHead
from train.weights import Norm, Weights, downloading, load_fitting, read_weights


@dataclass(frozen=True)
class Known:
    """One of the eight. timm: its name in timm, None for torchvision's. least_px, multiple_px: which sizes it takes."""

    timm: str | None
    family: str
    least_px: int = 32
    multiple_px: int = 1


MODELS = {
    "alexnet": Known(None, "alexnet", least_px=63),  # with less, nothing is left for its last pooling
    "resnet18": Known("resnet18", "batchnorm"),
    "resnet34": Known("resnet34", "batchnorm"),
    "resnet50": Known("resnet50", "batchnorm"),
    "resnet101": Known("resnet101", "batchnorm"),
    "resnet152": Known("resnet152", "batchnorm"),
    "vit_b16": Known("vit_base_patch16_224", "layernorm", least_px=16, multiple_px=16),
    "mixer_b16": Known("mixer_b16_224", "layernorm", least_px=16, multiple_px=16),
}

HALF_NORM: Norm = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET_NORM: Norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation that torchvision's weights are trained with (torchvision's `transforms._presets`)."""


_CONVERSIONS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
"""Names of timm's functions that rename the tensors of a paper's own code, and resample position embeddings."""


@dataclass(frozen=True)
class Start:
    """What a network starts from. loaded: what did not fit. norm, interpolation: of the images that the given weights
    were trained on, and how it is known."""

    weights: str = "random"
    loaded: str = "no weights were given"
    norm: tuple[Norm, str] | None = None
    interpolation: tuple[str, str] = "bilinear", "no weights were given"


class Classifier(nn.Module):
    """Input head and network: bytes and colour maps to logits."""

    def __init__(self, head: InputHead, body: nn.Module) -> None:
        """body: (N, 3, H, W) float32 → (N, classes)."""
        super().__init__()
        self.head = head
        self.body = body
        self.decisions: dict[str, Decision] = {}
        """What it starts from, for the run's record."""
        self.frozen = False
        """Whether only the classifier is trained."""

    def forward(self, images: Tensor, colour: Tensor, mix: Tensor | None = None) -> Tensor:
        """images (N, 3, H, W) uint8, 0–255; colour (N, 3, 4) float32 → logits (N, classes) float32. mix: of `head`."""
        return self.body(self.head(images, colour, mix)).float()

    def train(self, mode: bool = True) -> "Classifier":
        """As of every module, but a frozen network stays as in evaluation, with the means of its batch norms."""
        return super().train(mode and not self.frozen)

    def tested(self, images: Tensor, colour: Tensor, tta: str) -> Tensor:
        """The mean of the logits over the views of `tta`, a key of `config.TTA`; shapes as in `forward`.

        `flips`: an image and its mirror images left-right, top-bottom and both. `symmetries`: also their transposes.
        """
        turned = (images, images.transpose(2, 3)) if tta == "symmetries" else (images,)
        axes = ((), (3,), (2,), (2, 3)) if tta != "none" else ((),)
        return torch.stack([self(one.flip(flipped), colour) for one in turned for flipped in axes]).mean(0)


# ------------------------------------------------------------------ what a name stands for


def timm_name(name: str) -> str | None:
    """The name of a model in timm, None for AlexNet. Raises UsageError, with the known names, for an unknown one."""
    if name in MODELS:
        return MODELS[name].timm
    import timm

    if timm.is_model(name):
        return name
    near = difflib.get_close_matches(name, [*MODELS, *timm.list_models()], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UsageError(
        f"model '{name}' is unknown: use {', '.join(MODELS)}, or the name of any other model of timm "
        f"{timm.__version__}{hint}"
    )


def family(name: str) -> str:
    """The family that decides the recipe (`config.RECIPES`): `alexnet`, `batchnorm` or `layernorm`."""
    timm_name(name)
    if name in MODELS:
        return MODELS[name].family
    layers = _skeleton(name, None).modules()
    return "batchnorm" if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in layers) else "layernorm"


def check_resolution(name: str, px: int, start_px: int | None = None) -> None:
    """Raise UsageError if a model is unknown, or cannot train at `px`, or not on a ramp from `start_px` to `px`."""
    timm_model = timm_name(name)
    least = px if start_px is None else min(start_px, px)
    if least != px and timm_model is not None and _fixed_size(timm_model) and not _is_dynamic(timm_model):
        # a Mixer, for example: its token mixing has a weight for every pair of patches
        raise UsageError(f"--start-resolution: {name} is built for one size; leave the option out")
    if name in MODELS:
        known = MODELS[name]
        if least < known.least_px:
            raise UsageError(f"{name} at {least} px: it needs {known.least_px} px or more")
        for size in (px, least):
            if size % known.multiple_px:
                raise UsageError(
                    f"{name} at {size} px: the size must be a multiple of {known.multiple_px} px, its patch; "
                    f"use {max(size // known.multiple_px, 1) * known.multiple_px}"
                )
        return
    body = _skeleton(name, px).eval()
    # every size of the ramp: the ends may be divisible by the patch (14 px: 224 and 448) and no size between
    for size in (*range(least, px, RAMP_STEP_PX), px):
        try:
            body(torch.empty(1, 3, size, size, device="meta"))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UsageError(f"{name} at {size} px: it cannot take this size ({one_line(error, 160)})") from None


def check_layers(name: str, drop_path: float | None, layer_decay: float | None) -> None:
    """Raise UsageError if a model has no residual branches that could be left out, or no order of its layers."""
    import timm
    from timm.layers.drop import DropPath

    timm_model, ordered = timm_name(name), layer_decay not in (None, 1.0)
    if not drop_path and not ordered:
        return
    wanted: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    body: nn.Module | None = None
    with torch.device("meta"), suppress(TypeError):  # of a model that does not know the argument
        body = timm.create_model(timm_model, **wanted) if timm_model else None
    if drop_path and not (body and any(isinstance(layer, DropPath) for layer in body.modules())):
        raise UsageError(f"--drop-path: {name} cannot leave out residual branches; leave the option out")
    if ordered and not hasattr(body, "group_matcher"):
        raise UsageError(f"--layer-decay: the layers of {name} have no known order; leave the option out")


def _fixed_size(name: str) -> bool:
    from timm.models import get_pretrained_cfg_value

    return bool(get_pretrained_cfg_value(name, "fixed_input_size"))


def _is_dynamic(name: str) -> bool:
    """Whether a model of timm takes `dynamic_img_size`: the plain ViTs."""
    from timm.models import model_entrypoint

    return model_entrypoint(name).__module__ in ("timm.models.vision_transformer", "timm.models.deit")


def _size_arguments(name: str, px: int | None, ramp: bool) -> dict[str, Any]:
    """The arguments with which timm builds a model for `px`."""
    arguments: dict[str, Any] = {}
    if px is not None and _fixed_size(name):
        arguments["img_size"] = px
        if ramp and _is_dynamic(name):
            arguments["dynamic_img_size"] = True
    return arguments


def _skeleton(name: str, px: int | None, classes: int = 2) -> nn.Module:
    """A model of timm on the meta device: it has no memory for its weights. Without classes it has no classifier."""
    import timm

    with torch.device("meta"):
        try:
            return timm.create_model(name, num_classes=classes, **_size_arguments(name, px, ramp=True))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise UsageError(f"{name}: timm cannot build it for {px} px ({one_line(error, 160)})") from None


# ------------------------------------------------------------------ building one


def build(
    name: str,
    resolution: int,
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    start_resolution: int | None = None,
    pretrained: bool = False,
    weights: Path | None = None,
    freeze: bool = False,
    normalize: str = "auto",
    interpolation: str = "auto",
    drop_path: float = 0.0,
) -> Classifier:
    """A model on the CPU in channels-last layout, its random weights drawn from torch's global generator.

    mean, std: RGB, 0 to 1, of the training images. freeze: only the classifier requires gradients. normalize: one of
    `config.NORMALIZE`. interpolation: one of `config.INTERPOLATIONS`; how images must be resized is the decision of
    this name. drop_path: rate of stochastic depth in training (Huang et al. 2016, arXiv:1603.09382). Raises UsageError
    for an unknown model or an impossible size, DataError for weights that are missing or do not fit.
    """
    timm_model = timm_name(name)
    check_resolution(name, resolution, start_resolution)
    found = read_weights(weights) if weights is not None else None
    if timm_model is None:
        body, start = _alexnet(classes, pretrained, found)
    else:
        given = _size_arguments(timm_model, resolution, ramp=start_resolution not in (None, resolution))
        if drop_path:
            given["drop_path_rate"] = drop_path
        body, start = _from_timm(name, timm_model, classes, given, pretrained, found)
    norm, why = _normalisation(normalize, (tuple(mean), tuple(std)), start)
    net = Classifier(InputHead(*norm), body)
    if freeze:
        net.frozen = True
        trained = _classifier_names(timm_model, body)
        for parameter_name, parameter in body.named_parameters():
            parameter.requires_grad_(parameter_name in trained)
    shown = ", ".join(
        f"{name} {' '.join(f'{x:.6g}' for x in of)}" for name, of in zip(("mean", "std"), norm, strict=True)
    )
    net.decisions = {
        "weights": Decision(start.weights, start.loaded),
        "normalisation": Decision(shown, why),
        "interpolation": Decision(*start.interpolation)
        if interpolation == "auto"
        else Decision(interpolation, f"--interpolation {interpolation}"),
    }
    return net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _normalisation(normalize: str, data: Norm, start: Start) -> tuple[Norm, str]:
    """Mean and deviation of the input, and why these."""
    if normalize == "auto":
        return start.norm or (data, "of the training images")
    return {"data": data, "imagenet": IMAGENET_NORM, "half": HALF_NORM}[normalize], f"--normalize {normalize}"


def _alexnet(classes: int, pretrained: bool, found: Weights | None) -> "tuple[nn.Module, Start]":
    import torchvision

    body = torchvision.models.alexnet(num_classes=classes)
    if pretrained:
        with downloading("alexnet"):
            state = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
        found = Weights("torchvision's AlexNet weights", dict(state))
    if found is None:
        _he_init(body)
        return body, Start()
    heads = _classifier_names(None, body)
    _zero(body, heads, classes)
    loaded = load_fitting(body, found, heads)
    why = "that of torchvision's weights"
    return body, _from_file(found, loaded, (IMAGENET_NORM, why), ("bilinear", why))


def _he_init(body: nn.Module) -> None:
    """Draw weights that keep the scale of activations through eight layers without normalisation (He et al. 2015,
    arXiv:1502.01852). With PyTorch's default the scale shrinks, and AlexNet learns nothing for thousands of steps."""
    layers = [layer for layer in body.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if layer is not layers[-1] else "linear")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _from_timm(
    name: str, timm_model: str, classes: int, given: dict[str, Any], pretrained: bool, found: Weights | None
) -> "tuple[nn.Module, Start]":
    import timm

    with downloading(name) if pretrained else nullcontext():
        body: Any = timm.create_model(timm_model, pretrained=pretrained, num_classes=classes, **given)
    if pretrained:
        if body.pretrained_cfg.get("num_classes") != classes:
            _zero(body, _classifier_names(timm_model, body), classes)
        about = f"its classifier is new if it is not for {classes} classes"
        return body, Start(f"timm's {timm_model}", about, *_of_timm(body.pretrained_cfg))
    if found is None:
        return body, Start()
    heads = _classifier_names(timm_model, body)
    _zero(body, heads, classes)
    module = import_module(type(body).__module__)
    convert = next((getattr(module, one) for one in _CONVERSIONS if hasattr(module, one)), None)
    takes_body = convert is not None and len(inspect.signature(convert).parameters) > 1
    adapt = convert if takes_body or convert is None else lambda state, _: convert(state)
    loaded = load_fitting(body, found, heads, adapt)
    return body, _from_file(found, loaded, *_of_timm(body.pretrained_cfg))


def _classifier_names(timm_model: str | None, body: nn.Module) -> Collection[str]:
    """Names of a network's tensors that depend on the number of classes: its last layers."""
    if timm_model is None:
        return "classifier.6.weight", "classifier.6.bias"
    return body.state_dict().keys() - _skeleton(timm_model, None, classes=0).state_dict().keys()


def _zero(body: nn.Module, heads: Collection[str], classes: int) -> None:
    """Let a classifier that given features get start at zero (Kolesnikov et al. 2020, arXiv:1912.11370, Big Transfer).

    Random weights would first have to be unlearned: timm's for EfficientNet give logits of ±8 with seven classes.
    """
    for name in {head.rpartition(".")[0] for head in heads}:
        layer = body.get_submodule(name)
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.shape[0] == classes:  # not a norm before it
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)


def _from_file(found: Weights, loaded: str, norm: tuple[Norm, str], interpolation: tuple[str, str]) -> Start:
    """The start from a file. norm, interpolation: taken if it names no normalisation."""
    if found.norm is not None:
        named = "the file of the weights names it"
        norm = found.norm, named
        interpolation = (found.interpolation, named) if found.interpolation else ("bilinear", "the file names no other")
    return Start(found.source, loaded, norm, interpolation)


def _of_timm(config: dict[str, Any]) -> tuple[tuple[Norm, str], tuple[str, str]]:
    """Normalisation and interpolation of the images that a timm model's weights were trained on."""
    name = f"{config['architecture']}.{config['tag']}" if config.get("tag") else config["architecture"]
    why = f"that of timm's {name}"
    return ((tuple(config["mean"]), tuple(config["std"])), why), (config["interpolation"], why)


# ------------------------------------------------------------------ layout in memory


def lay_out(net: Classifier, wanted: str, device: torch.device) -> Decision:
    """Give a network and its input the layout `wanted`, one of `config.MEMORY_FORMATS`, for a device; which, and why.

    `auto` is channels-last, except on a CPU where PyTorch would write beyond its memory.
    """
    unsafe = _unsafe_convolution(net.body) if device.type == "cpu" else None
    if wanted != "auto":
        decision = Decision(wanted, "asked for")
    elif unsafe:
        decision = Decision("contiguous", f"PyTorch damages its memory in {unsafe} when it is channels-last on a CPU")
    else:
        decision = Decision("channels-last", "the usual layout")
    net.head.memory_format = torch.channels_last if decision.value == "channels-last" else torch.contiguous_format
    net.to(memory_format=net.head.memory_format)  # pyright: ignore[reportCallIssue]
    return decision


def _unsafe_convolution(body: nn.Module) -> str | None:
    """The name of the first 1×1 convolution with a stride and few input channels, as in RepVGG and FastViT.

    In float32 and channels-last it damages the heap on a CPU (https://github.com/pytorch/pytorch/issues/136348). With
    torch 2.14, training steps crashed with 1 to 15 channels; not with 16, with one group per channel, or in bfloat16.
    """
    for name, layer in body.named_modules():
        if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (1, 1) or max(layer.stride) == 1:
            continue
        if layer.in_channels < 16 and layer.groups != layer.in_channels:
            return name
    return None


# ------------------------------------------------------------------ parameters and cost


def parameter_groups(net: Classifier, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Parameters with weight decay, and without: biases, normalisation, ViT's class token and positions.

    layer_decay: if it is not 1, each layer has groups of its own with a `lr_scale`, `layer_decay` to the power of the
    layers after it (BEiT, Bao et al. 2022, arXiv:2106.08254).
    """
    from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay

    exempt = net.body.no_weight_decay() if hasattr(net.body, "no_weight_decay") else ()  # pyright: ignore
    if layer_decay == 1.0:
        groups = param_groups_weight_decay(net.body, 1.0, no_weight_decay_list=exempt)  # with 0, timm makes one group
    else:
        groups = param_groups_layer_decay(net.body, 1.0, no_weight_decay_list=exempt, layer_decay=layer_decay)
    return [group | {"weight_decay": weight_decay * group["weight_decay"]} for group in groups]


def depth(net: nn.Module) -> int:
    """Number of convolutions and linear layers. The time to compile grows with it."""
    return sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in net.modules())


@functools.lru_cache(maxsize=32)
def cost(name: str, resolution: int, classes: int) -> tuple[int, int]:
    """Number of parameters, and FLOPs of an image's forward pass (a multiply-add is two). Nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = build(name, resolution, classes, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).eval()
        images = torch.empty(1, 3, resolution, resolution, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(images, torch.empty(1, 3, 4))
    return sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops()
