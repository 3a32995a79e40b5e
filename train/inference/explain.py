"""Maps of the places in an image that support a class, computed by captum, and their overlay on the image.

Grad-CAM (Selvaraju et al. 2017, ICCV) for ResNets at 128 px and more: their last stage is known to be a grid of places,
and the logits are linear in its mean. Occlusion (Zeiler and Fergus 2014, ECCV) for all others: how much the logit falls
when a square of the image is covered. It needs only pixels and logits, so it is right for any network, but it takes 49
forward passes for an image. Gradients at one block of a transformer are no substitute, because its class token collects
evidence in every block.

A map shows where the evidence for a class is, not whether the class is right.
"""

from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from shards.common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from train.inference.predictor import Ensemble, Predictor, Prepared

_MIN_CELLS = 4
"""Minimum side of a map of Grad-CAM. With fewer cells, a map by occlusion is finer, and small images cost little."""

_CELLS = 8
"""Side of a map of occlusion. The covered square is 2 × 2 cells and moves by one cell: 7 × 7 places."""

_IMAGES_A_PASS = 32
"""Images in a forward pass of occlusion, unless more images are explained at the same time."""

_OPACITY = 0.6


def explainers_of(ensemble: "Ensemble") -> "list[Explainer]":
    """An explainer for each network. Raises UsageError if they see other parts of an image: their maps have no mean."""
    parts = {(about.encode, about.eval_crop) for about in ensemble.abouts}
    if len(parts) > 1:
        raise UsageError("maps of runs with other packing or --eval-crop have no mean; explain each run on its own")
    return [Explainer(member) for member in ensemble.members]


def mean_maps(
    explainers: "Sequence[Explainer]", prepared: "Sequence[Sequence[Prepared]]", classes: np.ndarray
) -> np.ndarray:
    """The mean of the networks' maps, resized to the finest: (N, h, w) float32, as `Explainer.maps`.

    prepared: N images, each as `Ensemble.prepare` returns it. classes: (N,) what is explained.
    """
    found = [
        one.maps(np.stack([each[place].square for each in prepared]), classes) for place, one in enumerate(explainers)
    ]
    side = max(maps.shape[1] for maps in found)
    sized = [np.stack([cv2.resize(one, (side, side)) for one in maps]) for maps in found]
    return np.mean(sized, axis=0) if len(found) > 1 else found[0]


class Explainer:
    """Maps of evidence for one predictor. method: `Grad-CAM` or `occlusion`."""

    def __init__(self, predictor: "Predictor") -> None:
        """Choose the method."""
        self._predictor = predictor
        self._layer = _layer(predictor.net.body, predictor.about.resolution)
        self.method = "occlusion" if self._layer is None else "Grad-CAM"

    def maps(self, squares: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 and the (N,) classes to explain → (N, h, w) float32: 1 where the evidence is strongest.

        A map is all 0 if no place supports the class.
        """
        target = torch.from_numpy(classes.astype(np.int64)).to(self._predictor.device)
        inputs = self._predictor.inputs(squares)
        found = (self._occlusion if self._layer is None else self._grad_cam)(inputs, target).relu()
        top = found.amax((1, 2), keepdim=True)
        return torch.where(top > 0, found / top.clamp_min(1e-30), 0.0).float().cpu().numpy()

    def _grad_cam(self, inputs: Tensor, target: Tensor) -> Tensor:
        from captum.attr import LayerGradCam

        method: Any = LayerGradCam(cast(Any, self._predictor.net.body), cast(Any, self._layer))
        return method.attribute(inputs.requires_grad_(), target).detach()[:, 0]

    def _occlusion(self, inputs: Tensor, target: Tensor) -> Tensor:
        """The mean fall of the logit over the squares that cover a cell. They have the mean colour of the image."""
        from captum.attr import Occlusion

        side = inputs.shape[-1]
        step = -(-side // _CELLS)
        square = min(2 * step, side)
        method: Any = Occlusion(self._predictor.net.body)
        found = method.attribute(
            inputs,
            sliding_window_shapes=(3, square, square),
            strides=(3, step, step),
            baselines=inputs.mean((2, 3), keepdim=True).expand_as(inputs),
            target=target,
            perturbations_per_eval=max(1, _IMAGES_A_PASS // len(inputs)),
        )
        return nn.functional.adaptive_avg_pool2d(found.mean(1), min(_CELLS, side))


def _layer(body: Any, resolution: int) -> nn.Module | None:
    """The layer for Grad-CAM; None if there is none that is known to be right."""
    return body.layer4 if type(body).__name__ == "ResNet" and resolution >= 32 * _MIN_CELLS else None


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
