"""Predictions as people and programs read them: lines, CSV, JSON, and the submission of ISIC 2018 Task 3."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shards.common.errors import UsageError
from train.inference.notice import NOTICE

if TYPE_CHECKING:
    from train.inference.predictor import About

ISIC_COLUMNS = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
"""The classes in the order of the challenge's submissions and of its scorer, isic-challenge-scoring."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One image that could be judged. shares: (classes,) probabilities. explanation: the file with the map, or None."""

    file: Path
    shares: np.ndarray
    explanation: Path | None = None

    @property
    def name(self) -> str:
        """The image's name: its file's, without the ending."""
        return self.file.stem


@dataclass(frozen=True, slots=True)
class Refused:
    """One file that could not be judged, and why."""

    file: Path
    reason: str


@dataclass(frozen=True)
class Predictions:
    """All of one call. prior: the one that the probabilities are for. flips: whether mirrorings were averaged."""

    about: "About"
    run: Path
    prior: str
    flips: bool
    answers: Sequence[Answer]
    refused: Sequence[Refused]


def as_lines(found: Predictions) -> str:
    """The three likeliest classes of each image, for people."""
    classes = found.about.classes
    width = max((len(str(one.file)) for one in found.answers), default=0)
    lines = []
    for one in found.answers:
        best = np.argsort(-one.shares, kind="stable")[:3]
        shown = "  ".join(f"{classes[c]:5s} {100 * one.shares[c]:5.1f} %" for c in best)
        lines.append(f"{one.file!s:{width}s}  {shown}")
    prior = {"balanced": "as if all classes were equally frequent", "training": "as frequent as in training"}
    scaled = f"divided by a temperature of {found.about.temperature:.3g}"
    if found.about.temperature == 1:
        scaled = "not temperature-scaled, for the run's validation images could not tell a temperature"
    lines.append(f"probabilities for classes {prior[found.prior]} ({found.prior} prior); logits {scaled}")
    return "\n".join(lines) + "\n"


def as_csv(found: Predictions) -> str:
    """One row an image: image, file, prediction, prior, temperature, `prob_<dx>` for each class."""
    about = found.about
    head = ["image", "file", "prediction", "prior", "temperature", *(f"prob_{dx}" for dx in about.classes)]
    rows = []
    for one in found.answers:
        said = about.classes[int(one.shares.argmax())]
        row = [one.name, one.file, said, found.prior, f"{about.temperature:.6g}"]
        rows.append(row + [f"{share:.6f}" for share in one.shares])
    return _csv(head, rows)


def as_json(found: Predictions) -> str:
    """Everything, with what was refused."""
    about = found.about
    images = [
        {
            "image": one.name,
            "file": str(one.file),
            "prediction": about.classes[int(one.shares.argmax())],
            "probabilities": {dx: round(float(p), 6) for dx, p in zip(about.classes, one.shares, strict=True)},
            "explanation": str(one.explanation) if one.explanation else None,
        }
        for one in found.answers
    ]
    whole = {
        "notice": NOTICE,
        "run": str(found.run),
        "model": about.model,
        "resolution_px": about.resolution,
        "prior": found.prior,
        "temperature": about.temperature,
        "flips": found.flips,
        "images": images,
        "refused": [{"file": str(one.file), "reason": one.reason} for one in found.refused],
    }
    return json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_names(files: Sequence[Path]) -> None:
    """Raise UsageError where two files have one name, which the challenge's scorer refuses."""
    seen: dict[str, Path] = {}
    for file in files:
        if file.stem in seen:
            raise UsageError(f"--isic: {seen[file.stem]} and {file} are both named {file.stem}; leave one out")
        seen[file.stem] = file


def as_isic(found: Predictions) -> str:
    """The submission of ISIC 2018 Task 3: `image,MEL,NV,BCC,AKIEC,BKL,DF,VASC`, values of 0 to 1."""
    order = [found.about.classes.index(column.lower()) for column in ISIC_COLUMNS]
    rows = [[one.name, *(f"{one.shares[c]:.6f}" for c in order)] for one in found.answers]
    return _csv(["image", *ISIC_COLUMNS], rows)


def _csv(head: list[str], rows: list[list[object]] | list[list[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
