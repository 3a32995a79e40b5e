"""What the web page asks about one image, answered in a process of its own.

The page's process never imports torch and this one never imports Gradio, so both start at once, on two cores. Its
functions are called by a `ProcessPoolExecutor` of one worker: `start` first, then `answer` as often as wanted.
"""

import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from train.inference.explain import Explainer
    from train.inference.neighbours import Neighbours
    from train.inference.predictor import Predictor, Prepared

NEIGHBOURS = 6
_SHOWN_PX = 180
"""The longer side of a neighbour's picture."""


@dataclass(frozen=True)
class Alike:
    """A training lesion that looks alike: its diagnosis, names, cosine (−1 to 1) and picture (JPEG)."""

    dx: str
    image_id: str
    lesion_id: str
    cosine: float
    picture: bytes


@dataclass(frozen=True)
class Opinion:
    """What the model makes of one image. probabilities: class → 0 to 1. image, overlay: PNG files.

    overlay_note, alike_note: why there is no overlay (it is then empty), and why no lesion that looks alike.
    """

    probabilities: dict[str, float]
    image: bytes
    overlay: bytes
    overlay_note: str
    alike: list[Alike]
    alike_note: str


@dataclass(frozen=True)
class Started:
    """What the page needs to know of the run; credit: whose the training images are."""

    model: str
    prior: str
    temperature: float
    resolution_px: int
    credit: str


@dataclass
class _Session:
    """What this process keeps between two calls."""

    predictor: "Predictor"
    explainer: "Explainer | None" = None
    neighbours: "Neighbours | None" = None
    why_none: str = ""
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)


_sessions: list[_Session] = []  # one, once started: a worker's functions have no other place to keep it


def start(run: Path, data: Path | None, device: str) -> Started:
    """Load the run, and let a thread compute what the neighbours need. Raises DataError or UsageError.

    Without the run's shard set there are no neighbours, and the page says why.
    """
    from shards.common.cli import importing
    from shards.common.errors import DermscaleError

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the page's to handle, which then ends this process
    with importing():
        from train.inference.predictor import Predictor

        session = _Session(Predictor(run, device))
    credit = ""
    try:
        from train.inference.neighbours import Neighbours, training_selection

        session.neighbours = Neighbours(session.predictor, run, training_selection(run, data))
        manifest = session.neighbours.selection.data.manifest
        credit = f"{manifest.citation} Licence: {manifest.licence}."
    except DermscaleError as error:
        if data is not None:
            raise
        session.why_none = str(error)
    _sessions.append(session)
    threading.Thread(target=_prepare, args=(session,), name="consult", daemon=True).start()
    about = session.predictor.about
    return Started(about.model, about.prior, about.temperature, about.resolution, credit)


def _prepare(session: _Session) -> None:
    """What takes too long for the start: captum's import, and the features of the training images.

    Where these cannot be read there are no neighbours, and the page says why.
    """
    import captum.attr  # noqa: F401 (imported so that the first answer need not)

    from shards.common.errors import DermscaleError

    if session.neighbours is None or session.neighbours.ready:
        return

    def at(done: int) -> None:
        session.done = done

    try:
        session.neighbours.compute(session.lock, at, session.stopping.is_set)
    except DermscaleError as error:
        session.why_none = str(error)  # first, because an answer may be on its way
        session.neighbours = None


def stop() -> None:
    """End the thread, so that the process can end."""
    for session in _sessions:
        session.stopping.set()


def answer(data: bytes) -> Opinion:
    """The opinion on one image file. Raises BadImageError with the reason where it is none."""
    from train.inference.explain import png
    from train.inference.images import open_image

    session = _sessions[0]
    predictor = session.predictor
    prepared = predictor.prepare(open_image(data), "upload")
    squares = prepared.square[None]
    with session.lock:
        shares = predictor.probabilities(predictor.logits(squares))[0]
        features = predictor.features(squares)[0]
        shown, overlay_note = _overlay(session, prepared, int(shares.argmax()))
    alike, note = _alike(session, features)
    return Opinion(
        probabilities={dx: float(p) for dx, p in zip(predictor.about.classes, shares, strict=True)},
        image=png(prepared.packed),
        overlay=shown,
        overlay_note=overlay_note,
        alike=alike,
        alike_note=note,
    )


def _overlay(session: _Session, prepared: "Prepared", of_class: int) -> tuple[bytes, str]:
    """A PNG of the image with the evidence for a class and, where the network knows no places, why there is none."""
    import numpy as np

    from shards.common.errors import UsageError
    from train.inference.explain import Explainer, overlay, png

    if session.explainer is None:
        try:
            session.explainer = Explainer(session.predictor)
        except UsageError:
            model = session.predictor.about.model
            return b"", f"Where the evidence lies cannot be shown: {model} has no layer that is known to keep places."
    evidence = session.explainer.maps(prepared.square[None], np.array([of_class]))[0]
    return png(overlay(prepared, evidence)), ""


def _alike(session: _Session, features: "np.ndarray") -> tuple[list[Alike], str]:
    """The neighbours and, where there are none, why."""
    import cv2

    from shards.common.errors import DermscaleError
    from shards.encode import shrink

    neighbours = session.neighbours
    if neighbours is None:
        return [], f"The training lesions cannot be shown: {session.why_none}"
    if not neighbours.ready:
        whole = len(neighbours.selection)
        return [], f"The training lesions are still being read ({session.done} of {whole}); drop the image again later."
    found = []
    for one in neighbours.nearest(features, NEIGHBOURS):
        try:
            small = shrink(neighbours.selection.data.pixels(one.sample), _SHOWN_PX)
        except DermscaleError as error:
            return [], f"The training lesions cannot be shown: {error}"
        picture = cv2.imencode(".jpg", small[:, :, ::-1])[1].tobytes()
        found.append(Alike(one.dx, one.image_id, one.lesion_id, one.cosine, picture))
    return found, ""
