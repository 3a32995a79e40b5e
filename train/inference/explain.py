"""Maps of the places in an image that support a class, computed by captum, and their overlay on the image.

If a network's features are a grid of channels: Grad-CAM (Selvaraju et al. 2017, ICCV). If they are patches, as in ViT
and Mixer: gradient times activation at the input of the last block, summed over the features of each patch. A map shows
where the evidence for a class is, not whether the class is right.
"""

from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np
import torch
from torch import nn

from shards.common.errors import UsageError

if TYPE_CHECKING:
    from train.inference.predictor import Predictor, Prepared

_MIN_CELLS = 4
"""Minimum side of a map, in cells. If the last stage of a network has fewer, an earlier stage is used."""

_OPACITY = 0.6


class Explainer:
    """Maps of evidence for one predictor."""

    def __init__(self, predictor: "Predictor") -> None:
        """Raises UsageError for a model without a layer that keeps positions in the image."""
        self._predictor = predictor
        body: Any = predictor.net.body
        self._layer, self._form = _layer(body, predictor.about.model, predictor.about.resolution)
        self._skip = int(getattr(body, "num_prefix_tokens", 0)) if self._form == "patches" else 0

    def maps(self, squares: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 and the (N,) classes to explain → (N, h, w) float32: 1 where the evidence is strongest.

        A map is all 0 if no place supports the class.
        """
        from captum.attr import LayerGradCam, LayerGradientXActivation

        predictor = self._predictor
        inputs = predictor.inputs(squares).requires_grad_()
        target = torch.from_numpy(classes.astype(np.int64)).to(predictor.device)
        method: Any = LayerGradCam if self._form == "channels" else LayerGradientXActivation
        found = method(predictor.net.body, self._layer).attribute(inputs, target).detach()
        found = found[:, 0] if self._form == "channels" else found.sum(-1)
        if self._form == "patches":
            found = found[:, self._skip :]
            found = found.unflatten(1, (round(found.shape[1] ** 0.5), -1))  # the image is a square
        found = found.relu()
        top = found.amax((1, 2), keepdim=True)
        return torch.where(top > 0, found / top.clamp_min(1e-30), 0.0).float().cpu().numpy()


def _layer(body: Any, model: str, resolution: int) -> tuple[nn.Module, str]:
    """The layer to explain, and the form of its output: `channels` NCHW, `channels-last` NHWC, or `patches` NTC."""
    blocks: Any = getattr(body, "blocks", None)
    if isinstance(blocks, nn.Sequential) and hasattr(blocks[-1], "norm1"):
        return cast(nn.Module, blocks[-1].norm1), "patches"
    if model == "alexnet":
        return body.features[11], "channels"  # the ReLU after the last convolution
    stages = [(f"layer{n}", 2 ** (n + 1)) for n in range(1, 5)] if hasattr(body, "layer4") else []
    if not stages:
        stages = [(info["module"], info["reduction"]) for info in getattr(body, "feature_info", None) or []]
    known = dict(body.named_modules())
    stages = [(name, reduction) for name, reduction in stages if name in known]
    if not stages:
        raise UsageError(f"--explain: {model} has no layer that keeps positions in the image; leave --explain out")
    fine = [name for name, reduction in stages if resolution >= _MIN_CELLS * reduction]
    form = "channels-last" if getattr(body, "output_fmt", "NCHW") == "NHWC" else "channels"
    return known[fine[-1] if fine else stages[0][0]], form


def overlay(prepared: "Prepared", evidence: np.ndarray) -> np.ndarray:
    """The packed image with a map over the crop that the model sees: (h, w, 3) uint8 RGB.

    evidence: (rows, columns) float32, 0 to 1. The rest of the image is darkened.
    """
    y, x, height, width = prepared.box
    image = (prepared.packed * 0.45).astype(np.uint8)
    seen = prepared.packed[y : y + height, x : x + width]
    heat = np.clip(cv2.resize(evidence, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    colours = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO)[:, :, ::-1]
    opacity = (_OPACITY * heat)[:, :, None]
    image[y : y + height, x : x + width] = np.rint(seen * (1 - opacity) + colours * opacity).astype(np.uint8)
    return image


def beside(prepared: "Prepared", evidence: np.ndarray) -> np.ndarray:
    """The packed image and, to its right, the overlay: (h, 2w, 3) uint8 RGB."""
    return np.concatenate([prepared.packed, overlay(prepared, evidence)], axis=1)


def png(image: np.ndarray) -> bytes:
    """A PNG file of (h, w, 3) uint8 RGB."""
    done, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise ValueError(f"OpenCV could not encode an image of shape {image.shape}")
    return data.tobytes()
