"""The training lesions that look most alike to a model: nearest by the features that its classifier is given.

Alike is what the model itself takes for alike, measured by the cosine of the angle between two images' features. A
lesion counts once, by the image of it that is nearest.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from shards import Loader, Selection, ShardSet
from shards.common.errors import DataError
from shards.common.files import write_durably
from train.config import read_config
from train.inference.predictor import Predictor
from train.record import CONFIG, WEIGHTS, read_result

FILE = "features.safetensors"
"""In the run folder: the features of its training images, so that they are computed once."""

_BATCH = 16
"""Images at a time: as long as a prediction that comes in between has to wait."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One lesion of the training split. sample: number of its nearest image; cosine: −1 to 1."""

    sample: int
    image_id: str
    lesion_id: str
    dx: str
    cosine: float


def training_selection(run: Path, data: Path | None = None) -> Selection:
    """The images that a run was trained on. data: the shard set's folder, where it is not where the run found it.

    Raises DataError where the run's record or its shard set is missing, or the set is another one.
    """
    config = read_config(run / CONFIG)
    folder = data or Path(config.data)
    result = read_result(run)
    if result is None:
        raise DataError(f"{run}: this run is not finished")
    shards = ShardSet(folder)
    if shards.manifest.index_sha256 != result["shard_set_sha256"]:
        raise DataError(f"{folder}: not the shard set that {run} was trained on; name that one with --data")
    return shards.select("train", config.fraction, config.subset_seed)


class Neighbours:
    """The features of a run's training images: loaded, or computed by `compute`, after which `nearest` answers."""

    def __init__(self, predictor: Predictor, run: Path, selection: Selection) -> None:
        """Take the features from the run folder if it has them. Nothing is computed yet."""
        self.selection = selection
        self._predictor, self._path = predictor, run / FILE
        self._identity = {
            "weights": xxhash.xxh3_64_hexdigest((run / WEIGHTS).read_bytes()),
            "shard_set": selection.data.manifest.index_sha256,
            "samples": xxhash.xxh3_64_hexdigest(selection.samples.tobytes()),
        }
        self._features = self._load()

    @property
    def ready(self) -> bool:
        """Whether `nearest` can answer."""
        return self._features is not None

    def compute(self, lock: threading.Lock, at: Callable[[int], None], stop: Callable[[], bool]) -> None:
        """Compute and keep the features, exactly as evaluation would see the images.

        lock: held while the network works, batch by batch, so that others can use it in between. at: told the number of
        images done. stop: asked after every batch; when true, nothing is kept. A run folder that cannot be written to
        is left as it is.
        """
        predictor, rows = self._predictor, []
        loader = Loader(
            self.selection,
            batch_size=_BATCH,
            resolution=predictor.about.resolution,
            train=False,
            engine="native",
            augment=predictor.augment,
        )
        try:
            for batch in loader:
                squares = batch.images.permute(0, 2, 3, 1).numpy()
                with lock:
                    found = predictor.features(squares)
                rows.append(found[batch.mask.numpy()])
                at(sum(map(len, rows)))
                if stop():
                    return
        finally:
            loader.close()
        features = np.concatenate(rows)
        self._features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        self._save()

    def nearest(self, features: np.ndarray, count: int) -> list[Neighbour]:
        """The `count` nearest lesions to (F,) features, nearest first. Raises ValueError where nothing is ready yet."""
        if self._features is None:
            raise ValueError("the features of the training images are not computed yet")
        cosines = self._features @ (features / max(float(np.linalg.norm(features)), 1e-12))
        found: dict[str, Neighbour] = {}
        data, samples, lesions = self.selection.data, self.selection.samples, self.selection.lesion_ids
        for row in np.argsort(-cosines, kind="stable"):
            lesion = str(lesions[row])
            if lesion not in found:
                sample = int(samples[row])
                image_id, dx = str(data.column("image_id")[sample]), str(data.column("dx")[sample])
                found[lesion] = Neighbour(sample, image_id, lesion, dx, float(cosines[row]))
                if len(found) == count:
                    break
        return list(found.values())

    def _load(self) -> np.ndarray | None:
        """The features of the run folder, None where there are none or they are of other weights or images."""
        from safetensors import SafetensorError, safe_open

        if not self._path.is_file():
            return None
        try:
            with safe_open(self._path, framework="numpy") as file:
                if (file.metadata() or {}) != self._identity:
                    return None
                return file.get_tensor("features")
        except (SafetensorError, OSError):
            return None  # computed anew, and written over

    def _save(self) -> None:
        from safetensors.numpy import save

        assert self._features is not None
        try:
            write_durably(self._path, save({"features": self._features}, metadata=self._identity))
        except OSError:
            return  # a run folder of someone else's, or a full disk: they are computed again next time
