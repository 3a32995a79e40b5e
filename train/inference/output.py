"""What is said about an image, and predictions as text: lines for people, CSV, JSON, ISIC 2018 Task 3's submission.

This file needs neither torch nor scipy, because the process of the web page imports it too.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.common.errors import UsageError
from shards.format import EncodeSpec

NOTICE = "Research software, not a medical device. Do not use it to diagnose or treat anyone."
"""Shown with every prediction."""

ISIC_COLUMNS = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
"""The classes in the order that the challenge's scorer, isic-challenge-scoring, demands."""

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
    images of each class.
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
    """One image. probabilities: (classes,) float64. explanation: the PNG file of `--explain`, or None."""

    file: Path
    probabilities: np.ndarray
    explanation: Path | None = None

    @property
    def name(self) -> str:
        """The name of the file without its ending."""
        return self.file.stem


@dataclass(frozen=True, slots=True)
class Refused:
    """One file that cannot be used. reason: goes on after the name of the file, e.g. `is empty`."""

    file: Path
    reason: str


@dataclass(frozen=True)
class Results:
    """The results of one command. prior: that of the probabilities. flips: whether mirror images were averaged."""

    about: About
    run: Path
    prior: str
    flips: bool
    predictions: Sequence[Prediction]
    refused: Sequence[Refused]


def as_lines(results: Results) -> str:
    """The three most likely classes of each image, for people."""
    about = results.about
    width = max((len(str(one.file)) for one in results.predictions), default=0)
    lines = []
    for one in results.predictions:
        best = np.argsort(-one.probabilities, kind="stable")[:3]
        shown = "  ".join(f"{about.classes[c]:5s} {100 * one.probabilities[c]:5.1f} %" for c in best)
        lines.append(f"{one.file!s:{width}s}  {shown}")
    scaled = f"The logits were divided by a temperature of {about.temperature:.3g}."
    if about.temperature == 1:
        scaled = "There is no temperature scaling: the run's validation images did not determine a temperature."
    lines.append(f"The probabilities assume that {PRIORS[results.prior]} ({results.prior} prior). {scaled}")
    return "\n".join(lines) + "\n"


def as_csv(results: Results) -> str:
    """One row per image: image, file, prediction, prior, temperature, and `prob_<dx>` for each class."""
    about = results.about
    head = ["image", "file", "prediction", "prior", "temperature", *(f"prob_{dx}" for dx in about.classes)]
    rows = []
    for one in results.predictions:
        likeliest = about.classes[int(one.probabilities.argmax())]
        row = [one.name, one.file, likeliest, results.prior, f"{about.temperature:.6g}"]
        rows.append(row + [f"{p:.6f}" for p in one.probabilities])
    return _csv(head, rows)


def as_json(results: Results) -> str:
    """All predictions and settings, and the refused files."""
    about = results.about
    images = [
        {
            "image": one.name,
            "file": str(one.file),
            "prediction": about.classes[int(one.probabilities.argmax())],
            "probabilities": {dx: round(float(p), 6) for dx, p in zip(about.classes, one.probabilities, strict=True)},
            "explanation": str(one.explanation) if one.explanation else None,
        }
        for one in results.predictions
    ]
    content = {
        "notice": NOTICE,
        "run": str(results.run),
        "model": about.model,
        "resolution_px": about.resolution,
        "prior": results.prior,
        "temperature": about.temperature,
        "flips": results.flips,
        "images": images,
        "refused": [{"file": str(one.file), "reason": one.reason} for one in results.refused],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_names(files: Sequence[Path]) -> None:
    """Raise UsageError if two files have the same name, which the challenge's scorer refuses."""
    seen: dict[str, Path] = {}
    for file in files:
        if file.stem in seen:
            raise UsageError(f"--isic: {seen[file.stem]} and {file} are both named {file.stem}; remove or rename one")
        seen[file.stem] = file


def as_isic(results: Results) -> str:
    """The submission of ISIC 2018 Task 3: `image,MEL,NV,BCC,AKIEC,BKL,DF,VASC`, values from 0 to 1."""
    order = [results.about.classes.index(column.lower()) for column in ISIC_COLUMNS]
    rows = [[one.name, *(f"{one.probabilities[c]:.6f}" for c in order)] for one in results.predictions]
    return _csv(["image", *ISIC_COLUMNS], rows)


def _csv(head: list[str], rows: list[list[object]] | list[list[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
