"""Which places of an image speak for a class: maps from captum, and the image with such a map laid over it.

Networks whose features are a grid of channels: Grad-CAM (Selvaraju et al. 2017, ICCV). ViT, Mixer and others whose
features are patches: gradient times activation of each patch where it enters the last block, summed over its features.
A map says where the evidence for a class lies, not whether it is right.
"""

from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np
import torch
from torch import nn

from shards.common.errors import UsageError

if TYPE_CHECKING:
    from train.inference.predictor import Predictor, Prepared

_LEAST_CELLS = 4
"""Places a side that a map shall have: the stage before the last is taken where the last has fewer."""

_STRENGTH = 0.6


class Explainer:
    """Maps of evidence for one predictor."""

    def __init__(self, predictor: "Predictor") -> None:
        """Raises UsageError for a model without a layer that knows places."""
        self._predictor = predictor
        body: Any = predictor.net.body
        self._layer, self._form = _layer(body, predictor.about.model, predictor.about.resolution)
        self._skip = int(getattr(body, "num_prefix_tokens", 0)) if self._form == "patches" else 0

    def maps(self, squares: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 and the (N,) class to explain → (N, h, w) float32, 0 to 1 where the evidence is strongest.

        All 0 where no place speaks for the class.
        """
        from captum.attr import LayerGradCam, LayerGradientXActivation

        predictor = self._predictor
        inputs = predictor.inputs(squares).requires_grad_()
        target = torch.from_numpy(classes.astype(np.int64)).to(predictor.device)
        if self._form == "channels":
            found = _attribute(LayerGradCam(predictor.net.body, self._layer), inputs, target)[:, 0]
        else:
            found = _attribute(LayerGradientXActivation(predictor.net.body, self._layer), inputs, target).sum(-1)
            if self._form == "patches":
                found = found[:, self._skip :]
                found = found.unflatten(1, (round(found.shape[1] ** 0.5), -1))  # the image is a square
        found = found.detach().relu()
        top = found.amax((1, 2), keepdim=True)
        return torch.where(top > 0, found / top.clamp_min(1e-30), 0.0).float().cpu().numpy()


def _attribute(method: Any, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """captum's answer for one layer, which for one layer is one tensor."""
    return method.attribute(inputs, target)


def _layer(body: Any, model: str, resolution: int) -> tuple[nn.Module, str]:
    """The layer to explain, and the form of what it gives: `channels` NCHW, `channels-last` NHWC, or `patches` NTC."""
    blocks: Any = getattr(body, "blocks", None)
    if isinstance(blocks, nn.Sequential) and hasattr(blocks[-1], "norm1"):
        return cast(nn.Module, blocks[-1].norm1), "patches"
    if model == "alexnet":
        return body.features[11], "channels"  # the ReLU behind the last convolution
    stages = [(f"layer{n}", 2 ** (n + 1)) for n in range(1, 5)] if hasattr(body, "layer4") else []
    if not stages:
        stages = [(info["module"], info["reduction"]) for info in getattr(body, "feature_info", None) or []]
    known = dict(body.named_modules())
    stages = [(name, reduction) for name, reduction in stages if name in known]
    if not stages:
        raise UsageError(f"--explain: {model} has no layer that is known to keep places; leave it out")
    fine = [name for name, reduction in stages if resolution >= _LEAST_CELLS * reduction]
    form = "channels-last" if getattr(body, "output_fmt", "NCHW") == "NHWC" else "channels"
    return known[fine[-1] if fine else stages[0][0]], form


def overlay(prepared: "Prepared", evidence: np.ndarray) -> np.ndarray:
    """The packed image with a map over what the model saw of it: (h, w, 3) uint8 RGB.

    evidence: (rows, columns) float32, 0 to 1. What the model did not see is darker.
    """
    y, x, height, width = prepared.box
    image = (prepared.packed * 0.45).astype(np.uint8)
    seen = prepared.packed[y : y + height, x : x + width]
    heat = np.clip(cv2.resize(evidence, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    colours = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO)[:, :, ::-1]
    share = (_STRENGTH * heat)[:, :, None]
    image[y : y + height, x : x + width] = np.rint(seen * (1 - share) + colours * share).astype(np.uint8)
    return image


def beside(prepared: "Prepared", evidence: np.ndarray) -> np.ndarray:
    """The packed image and, to its right, the same with the map: (h, 2w, 3) uint8 RGB."""
    return np.concatenate([prepared.packed, overlay(prepared, evidence)], axis=1)


def png(image: np.ndarray) -> bytes:
    """A PNG file of (h, w, 3) uint8 RGB."""
    done, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise ValueError(f"OpenCV could not encode an image of shape {image.shape}")
    return data.tobytes()
