"""The model process of the web page: it loads a run and answers what the page asks about one image.

The page's process never imports torch and this one never imports Gradio, so both start in parallel. The functions are
called by a `ProcessPoolExecutor` of one worker: first `start`, then `answer` once per image.
"""

import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from train.crowding import Crowding
    from train.inference.neighbours import Neighbours
    from train.inference.output import About, Neighbour
    from train.inference.predictor import Ensemble, Prepared

NEIGHBOURS = 6


@dataclass(frozen=True)
class Answer:
    """The results for one image. probabilities: class → 0 to 1. image, overlay: PNG files.

    overlay_note: why there is no overlay, which is then empty. similar_note: why there are no similar lesions.
    """

    probabilities: dict[str, float]
    image: bytes
    overlay: bytes
    overlay_note: str
    similar: "list[Neighbour]"
    similar_note: str


@dataclass
class _Session:
    """What this process keeps between two calls. done: training images whose features are computed.

    crowding: notices on a CPU that other programs use its cores; None on a GPU.
    """

    ensemble: "Ensemble"
    crowding: "Crowding | None" = None
    neighbours: "Neighbours | None" = None
    why_no_neighbours: str = ""
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)


_sessions: list[_Session] = []
"""Empty, or the one session: the pool calls plain functions, which can keep it nowhere else."""


def start(
    runs: "Sequence[Path]", data: str | Path | None, device: str, memory_format: str = "auto"
) -> "tuple[list[About], str]":
    """Load the runs, and compute the features of training images in a thread. Raises DataError or UsageError.

    Returns the runs' descriptions, and the source of the training images with their licence. Similar lesions are those
    of the first run. Without its shard set there are none, and the page says why.
    """
    import click

    from shards.common.cli import importing
    from shards.common.errors import DermscaleError

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the page's process handles Ctrl-C and ends this one
    with importing():
        import torch

        from train.crowding import Crowding
        from train.inference.predictor import Ensemble

        session = _Session(Ensemble(runs, device, memory_format))
    first = session.ensemble.members[0]
    if first.device.type == "cpu":
        session.crowding = Crowding(torch.get_num_threads())
    layout = first.memory_format
    if layout.value == "contiguous":
        click.echo(f"memory format: contiguous ({layout.reason})", err=True)
    credit = ""
    try:
        from train.inference.neighbours import Neighbours, training_selection

        session.neighbours = Neighbours(first, runs[0], training_selection(runs[0], data))
        manifest = session.neighbours.selection.data.manifest
        credit = f"{manifest.citation} Licence: {manifest.licence}."
        if len(runs) > 1:
            credit = f"Similar for the first network, {first.about.model}. {credit}"
    except DermscaleError as error:
        if data is not None:
            raise
        session.why_no_neighbours = str(error)
    _sessions.append(session)
    threading.Thread(target=_prepare, args=(session,), name="prepare", daemon=True).start()
    return session.ensemble.abouts, credit


def _prepare(session: _Session) -> None:
    """Do what would delay the start: import captum, and load or compute the features of the training images.

    If these cannot be read there are no similar lesions, and the page says why.
    """
    import captum.attr  # noqa: F401 (so that the first answer need not wait for it)

    from shards.common.errors import one_line

    if session.neighbours is None:
        return

    def at(done: int) -> None:
        session.done = done
        with session.lock:
            _say_if_crowded(session, "features")

    try:
        session.neighbours.compute(session.lock, at, session.stopping.is_set)
    except Exception as error:  # noqa: BLE001 (of any kind: the page shows it)
        session.why_no_neighbours = one_line(error, 200)  # first, because `answer` may run at the same time
        session.neighbours = None


def stop() -> None:
    """Stop the thread, so that the process can end."""
    for session in _sessions:
        session.stopping.set()


def answer(data: bytes) -> Answer:
    """The results for the bytes of one image file. Raises BadImageError with the reason if it is refused."""
    from train.inference.explain import png
    from train.inference.images import open_image

    session = _sessions[0]
    ensemble = session.ensemble
    prepared = ensemble.prepare(open_image(data), "upload")
    with session.lock:
        if session.crowding is not None:
            session.crowding.pause()
        probabilities = ensemble.probabilities([prepared])[0]
        shown, overlay_note = _overlay(session, prepared, int(probabilities.argmax()))
        similar, similar_note = _similar(session, prepared[0].square[None])
        _say_if_crowded(session, "answer")
    return Answer(
        probabilities={dx: float(p) for dx, p in zip(ensemble.classes.names, probabilities, strict=True)},
        image=png(prepared[0].packed),
        overlay=shown,
        overlay_note=overlay_note,
        similar=similar,
        similar_note=similar_note,
    )


def _say_if_crowded(session: _Session, kind: str) -> None:
    """Say once on standard error that other programs slow this one down, if they do."""
    import click

    if session.crowding is not None and (text := session.crowding.after_step(kind)):
        click.echo(f"warning: {text}", err=True)


def _overlay(session: _Session, prepared: "Sequence[Prepared]", of_class: int) -> tuple[bytes, str]:
    """A PNG of the image with the evidence for a class; empty with the reason if the network cannot be explained."""
    import numpy as np

    from shards.common.errors import one_line
    from train.inference.explain import explainers_of, mean_maps, overlay, png

    try:
        evidence = mean_maps(explainers_of(session.ensemble), [prepared], np.array([of_class]))[0]
        return png(overlay(prepared[0], evidence)), ""
    except Exception as error:  # noqa: BLE001 (the probabilities do not depend on the map)
        return b"", f"There is no map of the evidence ({type(error).__name__}: {one_line(error, 200)})."


def _similar(session: _Session, squares: "np.ndarray") -> "tuple[list[Neighbour], str]":
    """The training lesions most similar to one image; an empty list with the reason if they cannot be shown."""
    from shards.common.errors import one_line

    neighbours = session.neighbours
    if neighbours is None:
        return [], f"Similar training lesions cannot be shown: {session.why_no_neighbours}"
    if not neighbours.ready:
        total = len(neighbours.selection)
        return [], f"The training images are still being processed ({session.done} of {total}). Try again later."
    try:
        return neighbours.nearest(session.ensemble.members[0].features(squares)[0], NEIGHBOURS), ""
    except Exception as error:  # noqa: BLE001 (the probabilities do not depend on them)
        return [], f"Similar training lesions cannot be shown: {one_line(error, 200)}"
