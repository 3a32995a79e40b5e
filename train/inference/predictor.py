"""A trained run, ready to judge foreign images the way its evaluation judged the test split.

    predictor = Predictor(Path("runs/x"))
    prepared = predictor.prepare(read_image(Path("mole.jpg")), "mole")
    predictor.probabilities(predictor.logits(prepared.square[None]))    # (1, 7)

Only the run's model.safetensors is read: it names its model, the packer's settings, its prior and temperature.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from shards.common.errors import DataError, UsageError
from shards.decode import decode_whole
from shards.encode import BadImageError, encode_pixels
from shards.engines.resample import Resampler
from shards.format import EncodeSpec
from shards.plan import Augment, evaluation_plan
from train import device as devices
from train.inference.images import Picture
from train.inference.resnet import LAYERS, ResNet
from train.metrics.calibration import at_prior, check_prior, softmax
from train.record import CONFIG, RESULT, WEIGHTS
from train.weights import read_weights

if TYPE_CHECKING:
    from train.models import Classifier


@dataclass(frozen=True)
class About:
    """What model.safetensors says of itself.

    resolution: px a side. mean, std: RGB, 0 to 1. encode, eval_crop: how images were packed and are cut. prior: which
    one the logits stand for. temperature: what they are divided by. class_counts: training images of each class.
    """

    model: str
    resolution: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    encode: EncodeSpec
    eval_crop: float
    prior: str
    temperature: float
    class_counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """One image as the model sees it.

    packed: (h, w, 3) uint8 RGB, after the packer's round trip. box: y, x, height, width of what is cut out of it.
    square: (S, S, 3) uint8, the cut, resized.
    """

    packed: np.ndarray
    box: tuple[int, int, int, int]
    square: np.ndarray


def read_about(run: Path) -> About:
    """The description in a run folder's weights. Raises DataError where there are none, or none of a finished run."""
    from safetensors import SafetensorError, safe_open

    path = run / WEIGHTS
    if not path.is_file():
        raise DataError(f"{run}: {_why_without_weights(run)} (no {WEIGHTS})")
    try:
        with safe_open(path, framework="pt") as file:
            raw: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: no readable weights ({error})") from None
    try:
        return About(
            model=raw["model"],
            resolution=int(raw["resolution"]),
            classes=tuple(json.loads(raw["classes"])),
            mean=tuple(json.loads(raw["mean"])),
            std=tuple(json.loads(raw["std"])),
            encode=EncodeSpec(**json.loads(raw["encode"])),
            eval_crop=float(raw["eval_crop"]),
            prior=raw["logits_prior"],
            temperature=float(raw["temperature"]),
            class_counts=tuple(json.loads(raw["training_images_per_class"])),
        )
    except KeyError as error:
        raise DataError(f"{path}: does not say its {error.args[0]}; train the run again with this release") from None
    except (TypeError, ValueError, UsageError) as error:
        raise DataError(f"{path}: its description is damaged ({error})") from None


def _why_without_weights(run: Path) -> str:
    """Why a folder holds no weights, and what to do."""
    if (run / RESULT).is_file():
        return (
            "this finished run has no weights any more (a grid with `--keep results` keeps none); to have them, delete "
            "this folder and train it anew, with the same train.run or, a grid's cell, with its grid and --keep weights"
        )
    return "this run is not finished; go on with --resume" if (run / CONFIG).is_file() else "not a run folder"


def load_network(run: Path, about: About) -> "Classifier":
    """The network on the CPU, channels-last, in evaluation mode. Raises DataError where the weights do not fit."""
    from train import models
    from train.head import InputHead

    weights = read_weights(run / WEIGHTS)
    quick = about.model in LAYERS
    if quick:
        net = models.Classifier(InputHead(about.mean, about.std), ResNet(about.model, len(about.classes)))
    else:
        net = models.build(about.model, about.resolution, len(about.classes), about.mean, about.std)
    try:
        net.body.load_state_dict(weights.state, assign=quick)
    except RuntimeError as error:
        raise DataError(f"{run / WEIGHTS}: these are not the weights of {about.model} ({error})") from None
    return net.to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]


class Predictor:
    """Images → logits → probabilities. `prepare` may be called from many threads, the others from one at a time."""

    def __init__(self, run: Path, device: str = "auto") -> None:
        """Load the run. Turns OpenCV's own threads off, process-wide. Raises DataError or UsageError."""
        self.about = read_about(run)
        self.device = devices.choose(device)
        devices.prepare(self.device)
        cv2.setNumThreads(0)
        self.net = load_network(run, self.about).to(self.device)
        self.augment = Augment(eval_crop=self.about.eval_crop)
        self._colour = torch.eye(3, 4, device=self.device)[None]

    def prepare(self, picture: Picture, name: str) -> Prepared:
        """Pack an image as the run's shard set was packed, and cut it as evaluation does.

        name: the image's; with `proportion` the packer chooses by it. What has been packed before is taken as it is.
        Raises MemoryError or BadImageError where there is no memory for it.
        """
        spec, packed = self.about.encode, picture.pixels
        try:
            if not picture.packed or max(packed.shape[:2]) > spec.max_resolution:
                encoded = encode_pixels(packed, name, spec)
                packed = decode_whole(memoryview(encoded.payload), encoded.encoding, encoded.height, encoded.width)
            return self.cut(packed)
        except cv2.error as error:  # what OpenCV raises in the place of a MemoryError
            raise BadImageError(f"cannot be packed (OpenCV: {error.err})") from None

    def cut(self, packed: np.ndarray) -> Prepared:
        """The evaluation crop of a packed image, (h, w, 3) uint8."""
        height, width = packed.shape[:2]
        plan = evaluation_plan(np.array([height]), np.array([width]), self.augment)
        y, x, h, w = plan.boxes[0].tolist()
        side = self.about.resolution
        square = np.empty((side, side, 3), np.uint8)
        Resampler(side)(packed[y : y + h, x : x + w], 0, square)
        return Prepared(packed, (y, x, h, w), square)

    def inputs(self, squares: np.ndarray) -> torch.Tensor:
        """(N, S, S, 3) uint8 → what the network's body is given: (N, 3, S, S) float32 on the device."""
        images = torch.from_numpy(squares).to(self.device).permute(0, 3, 1, 2)
        return self.net.head(images, self._colour.expand(len(squares), 3, 4))

    def logits(self, squares: np.ndarray, flips: bool = False) -> np.ndarray:
        """(N, S, S, 3) uint8 → (N, classes) float64; with `flips`, the mean over the image and its three mirrorings."""
        with torch.inference_mode():
            x = self.inputs(squares)
            views = [x, x.flip(3), x.flip(2), x.flip(2, 3)] if flips else [x]
            return torch.stack([self.net.body(view).double() for view in views]).mean(0).cpu().numpy()

    def features(self, squares: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 → (N, F) float32: what the classifier of the network is given."""
        with torch.inference_mode():
            x, body = self.inputs(squares), _any(self.net.body)
            if hasattr(body, "forward_head"):
                found = body.forward_head(body.forward_features(x), pre_logits=True)
            else:  # torchvision's AlexNet
                found = body.classifier[:-1](torch.flatten(body.avgpool(body.features(x)), 1))
            return found.float().flatten(1).cpu().numpy()

    def probabilities(self, logits: np.ndarray, prior: str | None = None) -> np.ndarray:
        """(N, classes) probabilities after temperature scaling, under `prior` or else the run's own.

        The temperature was fitted under the run's own prior, so it comes first and the change of prior after it.
        """
        about = self.about
        wanted = prior or about.prior
        check_prior(wanted)
        scaled = logits / about.temperature
        return softmax(at_prior(scaled, estimated=about.prior, wanted=wanted, training_prior=about.class_counts))


def _any(body: Any) -> Any:
    """The body of a network, whose methods hang on the model."""
    return body
