"""What is said about an image, and predictions as text: lines for people, CSV, JSON, ISIC 2018 Task 3's submission.

This file needs neither torch nor scipy, because the process of the web page imports it too.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.common.errors import UsageError
from shards.format import HAM10000, Classes, EncodeSpec

NOTICE = "Research software, not a medical device. Do not use it to diagnose or treat anyone."
"""Shown with every prediction."""

ISIC_COLUMNS = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
"""HAM10000's classes in the order that the challenge's scorer, isic-challenge-scoring, demands."""

PRIORS = {
    "balanced": "all classes are equally frequent",
    "training": "classes are as frequent as in the training images",
}
"""What probabilities assume, by the name of their prior."""


@dataclass(frozen=True)
class About:
    """The description in model.safetensors.

    resolution: side of the images in px. mean, std: RGB, 0 to 1. encode: how images were packed. eval_crop: share of
    the image that is cropped. prior: that of the logits. temperature: the divisor of the logits. class_counts: training
    images of each class. tta: a key of `config.TTA`, with which the run was tested. interpolation: by which the crop is
    resized.
    """

    model: str
    resolution: int
    classes: Classes
    mean: tuple[float, ...]
    std: tuple[float, ...]
    encode: EncodeSpec
    eval_crop: float
    prior: str
    temperature: float
    class_counts: tuple[int, ...]
    tta: str = "none"
    interpolation: str = "bilinear"

    @property
    def seen(self) -> tuple[EncodeSpec, int, float, str]:
        """What decides which pixels the network sees of an image."""
        return self.encode, self.resolution, self.eval_crop, self.interpolation


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One lesion of the training split. sample: number of its nearest image; cosine: −1 to 1; picture: a small JPEG."""

    sample: int
    image_id: str
    lesion_id: str
    dx: str
    cosine: float
    picture: bytes


@dataclass(frozen=True, slots=True)
class Prediction:
    """One image. probabilities: (classes,) float64. explanation: the PNG file of `--explain`, or None.

    explanation_error: why there is none although it was asked for.
    """

    file: Path
    probabilities: np.ndarray
    explanation: Path | None = None
    explanation_error: str | None = None

    @property
    def name(self) -> str:
        """The name of the file without its ending."""
        return self.file.stem


@dataclass(frozen=True, slots=True)
class Refused:
    """One file that cannot be used. reason: goes on after the name of the file, e.g. `is empty`."""

    file: Path
    reason: str


def named(abouts: Sequence[About]) -> str:
    """The networks that predict together, for people."""
    return " and ".join(f"{about.model} at {about.resolution} px" for about in abouts)


def temperatures(abouts: Sequence[About]) -> str:
    """The divisors of the logits of networks that predict together: `a temperature of 1.02`."""
    divisors = " and ".join(f"{about.temperature:.3g}" for about in abouts)
    return f"a temperature of {divisors}" if len(abouts) == 1 else f"temperatures of {divisors}"


@dataclass(frozen=True)
class Settings:
    """What all answers of one command share. abouts, runs: of each network whose probabilities are averaged.

    prior: that of the probabilities. tta: the views that were averaged; None: each network's own. longest: characters
    of the longest file name.
    """

    abouts: Sequence[About]
    runs: Sequence[Path]
    prior: str
    tta: str | None
    longest: int = 0

    @property
    def classes(self) -> Classes:
        """The classes of the networks."""
        return self.abouts[0].classes


Answers = Iterable[Prediction | Refused]
"""One for each file, in order. The functions below give the text of each as soon as they get it."""


def as_lines(settings: Settings, answers: Answers) -> Iterator[str]:
    """The three most likely classes of each image, for people."""
    names, abouts = settings.classes.names, settings.abouts
    for one in _predictions(answers):
        best = np.argsort(-one.probabilities, kind="stable")[:3]
        shown = "  ".join(f"{names[c]:5s} {100 * one.probabilities[c]:5.1f} %" for c in best)
        yield f"{one.file!s:{settings.longest}s}  {shown}\n"
    scaled = f"The logits were divided by {temperatures(abouts)}."
    if all(about.temperature == 1 for about in abouts):
        scaled = "There is no temperature scaling: the run's validation images did not determine a temperature."
    if len(abouts) > 1:
        yield f"They are the mean of {len(abouts)} networks: {named(abouts)}.\n"
    yield f"The probabilities assume that {PRIORS[settings.prior]} ({settings.prior} prior). {scaled}\n"


def as_csv(settings: Settings, answers: Answers) -> Iterator[str]:
    """One row per image: image, file, prediction, prior, temperature, and `prob_<dx>` for each class.

    Of several networks, the temperatures stand with blanks between them.
    """
    names, divisors = settings.classes.names, " ".join(f"{about.temperature:.6g}" for about in settings.abouts)
    yield _row("image", "file", "prediction", "prior", "temperature", *(f"prob_{dx}" for dx in names))
    for one in _predictions(answers):
        likeliest = names[int(one.probabilities.argmax())]
        yield _row(one.name, one.file, likeliest, settings.prior, divisors, *(f"{p:.6f}" for p in one.probabilities))


def as_json(settings: Settings, answers: Answers) -> Iterator[str]:
    """All settings; a line for each prediction, which is an object of its own; the refused files.

    Of several networks, what differs between them is a list in the order of `--run`.
    """
    names = settings.classes.names

    def each(values: Iterable[Any]) -> Any:
        listed = list(values)
        return listed if len(listed) > 1 else listed[0]

    head = {
        "notice": NOTICE,
        "run": each(map(str, settings.runs)),
        "model": each(about.model for about in settings.abouts),
        "resolution_px": each(about.resolution for about in settings.abouts),
        "prior": settings.prior,
        "temperature": each(about.temperature for about in settings.abouts),
        "tta": each(settings.tta or about.tta for about in settings.abouts),
    }
    yield json.dumps(head, indent=2, ensure_ascii=False, allow_nan=False).removesuffix("\n}") + ',\n  "images": [\n'
    refused: list[Refused] = []
    separator = "   "
    for one in answers:
        if isinstance(one, Refused):
            refused.append(one)
            continue
        image = {
            "image": one.name,
            "file": str(one.file),
            "prediction": names[int(one.probabilities.argmax())],
            "probabilities": {dx: round(float(p), 6) for dx, p in zip(names, one.probabilities, strict=True)},
            "explanation": str(one.explanation) if one.explanation else None,
            "explanation_error": one.explanation_error,
        }
        yield f"{separator} {json.dumps(image, ensure_ascii=False, allow_nan=False)}\n"
        separator = "  ,"
    tail = {"refused": [{"file": str(one.file), "reason": one.reason} for one in refused]}
    yield "  ],\n" + json.dumps(tail, indent=2, ensure_ascii=False).removeprefix("{\n") + "\n"


def check_names(files: Sequence[Path]) -> None:
    """Raise UsageError if two files have the same name, which the challenge's scorer refuses."""
    seen: dict[str, Path] = {}
    for file in files:
        if file.stem in seen:
            raise UsageError(f"--isic: {seen[file.stem]} and {file} are both named {file.stem}; remove or rename one")
        seen[file.stem] = file


def as_isic(settings: Settings, answers: Answers) -> Iterator[str]:
    """The form of an ISIC challenge: `image` and a column for each class, values from 0 to 1.

    HAM10000's classes stand as ISIC 2018 Task 3 demands them, `MEL,NV,BCC,AKIEC,BKL,DF,VASC`; others in their order.
    """
    names = settings.classes.names
    columns = ISIC_COLUMNS if names == HAM10000.names else names
    order = [names.index(column.lower()) for column in columns] if columns is ISIC_COLUMNS else range(len(names))
    yield _row("image", *columns)
    for one in _predictions(answers):
        yield _row(one.name, *(f"{one.probabilities[c]:.6f}" for c in order))


def _predictions(answers: Answers) -> Iterator[Prediction]:
    return (one for one in answers if isinstance(one, Prediction))


def _row(*values: object) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
