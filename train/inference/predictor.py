"""A trained run that predicts new images exactly as its evaluation predicted the test split.

    predictor = Predictor(Path("runs/x"))
    prepared = predictor.prepare(read_image(Path("mole.jpg")), "mole")
    predictor.probabilities(predictor.logits(prepared.square[None]))    # (1, 7)

An `Ensemble` is one predictor or several, whose probabilities are averaged. `predict_files` does this for many files,
in batches, with threads that read ahead. Of the run folder only model.safetensors is read: it names the model, the
packer's settings, the prior and the temperature.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np
import torch

from shards.common.errors import DataError, UsageError, one_line
from shards.common.files import write_durably
from shards.common.machine import available_cores
from shards.common.readahead import read_ahead
from shards.decode import decode_whole
from shards.encode import BadImageError, encode_pixels
from shards.engines.resample import Resampler
from shards.format import Classes, read_classes, read_encode
from shards.plan import Augment, evaluation_plan
from train import device as devices
from train.config import TTA
from train.inference.images import Picture, read_image
from train.inference.output import PRIORS, About, Prediction, Refused
from train.inference.resnet import LAYERS, ResNet
from train.metrics.calibration import probabilities
from train.record import CONFIG, WEIGHTS, read_result
from train.weights import load_fitting, read_interpolation, read_norm, read_weights, safetensors_file

if TYPE_CHECKING:
    from train.inference.explain import Explainer
    from train.models import Classifier


@dataclass(frozen=True, slots=True)
class Prepared:
    """One image, ready for the model.

    packed: (h, w, 3) uint8 RGB, encoded as by the packer and decoded again. box: y, x, height, width of the crop.
    square: (S, S, 3) uint8, the crop, resized.
    """

    packed: np.ndarray
    box: tuple[int, int, int, int]
    square: np.ndarray


def read_about(run: Path) -> About:
    """The description in a run folder's weights. Raises DataError if they are missing or damaged."""
    from safetensors import SafetensorError

    path = run / WEIGHTS
    if run.is_file():
        raise DataError(f"{run}: is a file; give the folder of a finished run (train.run takes files with --weights)")
    if not path.is_file():
        raise DataError(f"{run}: {_why_without_weights(run)} (no {WEIGHTS})")
    try:
        with safetensors_file(path, "pt") as file:
            raw: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: no readable weights ({error})") from None
    try:
        return _described(raw)
    except KeyError as error:
        raise DataError(f"{path}: lacks its {error.args[0]}; train the run again with this release") from None
    except ValueError as error:
        raise DataError(f"{path}: its description is damaged ({error})") from None


def _described(raw: dict[str, str]) -> About:
    """The metadata of model.safetensors. Raises KeyError for what is missing, ValueError for what is impossible."""

    def read(name: str, convert: Callable[[str], Any]) -> Any:
        try:
            return convert(raw[name])
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"its {name} is {one_line(raw[name], 60)}, which cannot be read") from None

    mean, std = read_norm(raw)
    about = About(
        model=raw["model"],
        resolution=read("resolution", int),
        classes=read_classes(read("classes", json.loads)),
        mean=mean,
        std=std,
        encode=read_encode(read("encode", json.loads)),
        eval_crop=read("eval_crop", float),
        prior=raw["logits_prior"],
        temperature=read("temperature", float),
        class_counts=read("training_images_per_class", lambda text: tuple(json.loads(text))),
        tta=raw.get("tta", "none"),  # which runs of older releases do not name
        interpolation=read_interpolation(raw),
    )
    classes, counts = about.classes, about.class_counts
    for name, right, expected in (
        ("resolution", 1 <= about.resolution <= 65_535, "1 to 65535"),
        ("eval_crop", 0.0 < about.eval_crop <= 1.0, "above 0 and at most 1"),
        ("logits_prior", about.prior in PRIORS, " or ".join(PRIORS)),
        ("tta", about.tta in TTA, " or ".join(TTA)),
        ("temperature", 0.0 < about.temperature < math.inf, "a number above 0"),
        (
            "training_images_per_class",
            len(counts) == len(classes) and all(type(one) is int and one >= 0 for one in counts) and sum(counts) > 0,
            "a number for each class",
        ),
    ):
        if not right:
            raise ValueError(f"its {name} is {one_line(raw[name], 60)}, expected {expected}")
    return about


def _why_without_weights(run: Path) -> str:
    """Why a folder holds no weights, and what the user can do."""
    if read_result(run) is not None:
        return (
            "the weights of this finished run were deleted (as a grid does with `--keep results`); to get them, delete "
            "this folder and train again; if it is a grid's cell, run the grid again with --keep weights"
        )
    return "this run is not finished; continue it with --resume" if (run / CONFIG).is_file() else "not a run folder"


def load_network(run: Path, about: About) -> "Classifier":
    """The network on the CPU, in evaluation mode. Raises DataError if the weights do not fit."""
    from train import models
    from train.head import InputHead

    weights = read_weights(run / WEIGHTS)
    quick = about.model in LAYERS
    if quick:
        net = models.Classifier(InputHead(about.mean, about.std), ResNet(about.model, len(about.classes)))
    else:
        net = models.build(about.model, about.resolution, len(about.classes), about.mean, about.std)
    load_fitting(net.body, weights, assign=quick)
    return net.eval()


class Predictor:
    """Images → logits → probabilities. `prepare` may run in many threads, all other methods in one at a time."""

    def __init__(self, run: Path, device: str = "auto", memory_format: str = "auto") -> None:
        """Load the run. Switches off OpenCV's own threads in this process. Raises DataError or UsageError.

        memory_format: one of `config.MEMORY_FORMATS`; what it decided is the attribute of this name.
        """
        self.about = read_about(run)
        self.device = devices.choose(device)
        devices.prepare(self.device)
        cv2.setNumThreads(0)
        from train import models

        self.net = load_network(run, self.about).to(self.device)
        self.memory_format = models.lay_out(self.net, memory_format, self.device)
        self.augment = Augment(eval_crop=self.about.eval_crop, interpolation=self.about.interpolation)
        self._colour = torch.eye(3, 4, device=self.device)[None]

    def prepare(self, picture: Picture, name: str) -> Prepared:
        """Pack an image as the run's shard set was packed, and crop it as evaluation does.

        name: that of the image; in the write mode `proportion` the packer chooses the encoding by it. An image that
        was packed before is not packed again. Raises MemoryError or BadImageError if there is not enough memory.
        """
        spec, packed = self.about.encode, picture.pixels
        try:
            if not picture.packed or max(packed.shape[:2]) > spec.max_resolution:
                encoded = encode_pixels(packed, name, spec)
                packed = decode_whole(memoryview(encoded.payload), encoded.encoding, encoded.height, encoded.width)
            return self.cut(packed)
        except cv2.error as error:  # OpenCV raises this instead of a MemoryError
            raise BadImageError(f"cannot be packed (OpenCV: {error.err})") from None

    def cut(self, packed: np.ndarray) -> Prepared:
        """The evaluation crop of a packed image, (h, w, 3) uint8."""
        height, width = packed.shape[:2]
        plan = evaluation_plan(np.array([height]), np.array([width]), self.augment)
        y, x, h, w = plan.boxes[0].tolist()
        side = self.about.resolution
        square = np.empty((side, side, 3), np.uint8)
        Resampler(side, interpolation=self.augment.interpolation)(packed[y : y + h, x : x + w], 0, square)
        return Prepared(packed, (y, x, h, w), square)

    def inputs(self, squares: np.ndarray) -> torch.Tensor:
        """(N, S, S, 3) uint8 → the input of the network's body: (N, 3, S, S) float32 on the device."""
        return self.net.head(*self._batch(squares))

    def _batch(self, squares: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and colours as in `shards.Batch`."""
        images = torch.from_numpy(squares).to(self.device).permute(0, 3, 1, 2)
        return images, self._colour.expand(len(squares), 3, 4)

    def logits(self, squares: np.ndarray, tta: str | None = None) -> np.ndarray:
        """(N, S, S, 3) uint8 → (N, classes) float64, the mean over the views of `tta` (default: the run's own)."""
        with torch.inference_mode():
            return self.net.tested(*self._batch(squares), tta or self.about.tta).double().cpu().numpy()

    def features(self, squares: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 → (N, F) float32: the input of the network's last layer."""
        with torch.inference_mode():
            x, body = self.inputs(squares), cast(Any, self.net.body)
            if hasattr(body, "forward_head"):
                found = body.forward_head(body.forward_features(x), pre_logits=True)
            else:  # torchvision's AlexNet
                found = body.classifier[:-1](torch.flatten(body.avgpool(body.features(x)), 1))
            return found.float().flatten(1).cpu().numpy()

    def probabilities(self, logits: np.ndarray, prior: str | None = None) -> np.ndarray:
        """(N, classes) probabilities after temperature scaling, at `prior` (default: the run's own)."""
        about = self.about
        priors = {"estimated": about.prior, "wanted": prior or about.prior, "training_prior": about.class_counts}
        return probabilities(logits, about.temperature, **priors)


class Ensemble:
    """Runs that predict together: the mean of their probabilities. One run is an ensemble too."""

    def __init__(
        self, runs: Sequence[Path], device: str = "auto", memory_format: str = "auto", prior: str | None = None
    ) -> None:
        """Load the runs. Raises DataError or UsageError as `Predictor`, and if runs do not fit together.

        They must be different runs of the same classes and, where `prior` names none for all, the same prior.
        """
        if len({run.resolve() for run in runs}) < len(runs):
            raise UsageError(f"--run {', '.join(map(str, runs))}: one run is given twice; name each once")
        self.members = [Predictor(run, device, memory_format) for run in runs]
        first = self.members[0].about
        for run, about in zip(runs, self.abouts, strict=True):
            if about.classes.names != first.classes.names:
                raise UsageError(
                    f"{runs[0]} and {run}: have other classes ({one_line(', '.join(first.classes.names), 100)}; "
                    f"{one_line(', '.join(about.classes.names), 100)}), so their probabilities have no mean"
                )
            if prior is None and about.prior != first.prior:
                raise UsageError(
                    f"{runs[0]} and {run}: assume other priors ({first.prior}, {about.prior}), so their probabilities "
                    "have no mean; name one with --prior, where the command has it, or take other runs"
                )
        self.prior = prior or first.prior

    @property
    def abouts(self) -> list[About]:
        """The descriptions of the runs."""
        return [member.about for member in self.members]

    @property
    def classes(self) -> Classes:
        """The classes of all runs."""
        return self.members[0].about.classes

    def prepare(self, picture: Picture, name: str) -> list[Prepared]:
        """An image ready for each run, as `Predictor.prepare`. Runs that see it alike share the work."""
        done: dict[Any, Prepared] = {}
        for member in self.members:
            if member.about.seen not in done:
                done[member.about.seen] = member.prepare(picture, name)
        return [done[member.about.seen] for member in self.members]

    def probabilities(self, prepared: Sequence[Sequence[Prepared]], tta: str | None = None) -> np.ndarray:
        """(N, classes) mean probabilities of N images of `prepare`, after temperature scaling, at the prior of all."""
        found = [
            member.probabilities(member.logits(np.stack([one[place].square for one in prepared]), tta), self.prior)
            for place, member in enumerate(self.members)
        ]
        return np.mean(found, axis=0)


def predict_files(
    ensemble: Ensemble,
    files: Iterable[Path],
    tta: str | None = None,
    explainers: "Sequence[Explainer]" = (),
    explain_out: Path = Path(),
    batch_size: int = 32,
    read: Callable[[Path], Picture] = read_image,
) -> Iterator[list[Prediction | Refused]]:
    """The files in order, one batch at a time, each predicted or refused. Threads read up to two batches ahead.

    read: gives the picture of a file, or of an image of a shard set (`images.images_of`). Raises BadImageError.
    """
    written: set[Path] = set()
    with ThreadPoolExecutor(available_cores(), thread_name_prefix="predict") as pool:

        def submit(file: Path) -> list[Future[list[Prepared] | str]]:
            return [pool.submit(_prepare, ensemble, file, read)]

        with closing(read_ahead(submit, files, 3 * batch_size)) as prepared:
            while batch := [(file, item) for file, (item,) in islice(prepared, batch_size)]:
                good = [(file, item) for file, item in batch if not isinstance(item, str)]
                found = iter(_predict(ensemble, good, tta, explainers, explain_out, written))
                yield [Refused(file, item) if isinstance(item, str) else next(found) for file, item in batch]


def _prepare(ensemble: Ensemble, file: Path, read: Callable[[Path], Picture]) -> list[Prepared] | str:
    """One file, ready for each network, or the reason why it is refused. Runs in a reader thread."""
    try:
        return ensemble.prepare(read(file), file.stem)
    except BadImageError as error:
        return str(error)
    except MemoryError:
        return "does not fit into memory"


def _predict(
    ensemble: Ensemble,
    good: list[tuple[Path, list[Prepared]]],
    tta: str | None,
    explainers: "Sequence[Explainer]",
    explain_out: Path,
    written: set[Path],
) -> list[Prediction]:
    """Predict one batch, and draw its explanations. written: the explanations so far."""
    if not good:
        return []
    prepared = [item for _, item in good]
    probabilities = ensemble.probabilities(prepared, tta)
    found = [Prediction(file, row) for (file, _), row in zip(good, probabilities, strict=True)]
    if not explainers:
        return found
    from train.inference.explain import beside, mean_maps, png

    drawn = []
    try:
        maps = mean_maps(explainers, prepared, probabilities.argmax(axis=1))
    except Exception as error:  # noqa: BLE001 (of any kind: the probabilities do not depend on the maps)
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        return [replace(one, explanation_error=reason) for one in found]
    for one, (item, *_), evidence in zip(found, prepared, maps, strict=True):
        number, path = 1, explain_out / f"{one.name}.png"
        while path in written:  # two files of the same name in different folders
            number += 1
            path = explain_out / f"{one.name}-{number}.png"
        written.add(path)
        try:
            write_durably(path, png(beside(item, evidence)))
            drawn.append(replace(one, explanation=path))
        except OSError as error:
            drawn.append(replace(one, explanation_error=f"{path}: {error.strerror}"))
    return drawn
