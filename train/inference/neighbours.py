"""The training lesions that are most similar to an image, by the features on which the model's classifier works.

Similarity is the cosine of the angle between two images' features. A lesion counts once, by its nearest image.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import save

from shards import Loader, Selection, ShardSet
from shards.common.errors import DataError
from shards.common.files import write_durably
from shards.encode import shrink
from train.config import read_config
from train.inference.output import Neighbour
from train.inference.predictor import Predictor
from train.record import CONFIG, WEIGHTS, read_result
from train.weights import safetensors_file

if TYPE_CHECKING:
    from sklearn.neighbors import NearestNeighbors

FILE = "features.safetensors"
"""In the run folder: the features of its training images, so that they are computed once."""

_BATCH = 16
"""Images at a time. A prediction that arrives in between waits for one batch."""


_PICTURE_PX = 180
"""The longer side of a similar lesion's picture."""


def training_selection(run: Path, data: str | Path | None = None) -> Selection:
    """The images that a run was trained on. data: where the shard set is, if not where the run found it.

    Raises DataError where the run's record or its shard set is missing, or the set is a different one.
    """
    config = read_config(run / CONFIG)
    folder = data or config.data
    result = read_result(run)
    if result is None:
        raise DataError(f"{run}: this run is not finished")
    shards = ShardSet(folder)
    if shards.manifest.index_sha256 != result["shard_set_sha256"]:
        raise DataError(f"{folder}: not the shard set that {run} was trained on; name that one with --data")
    return shards.select("train", config.fraction, config.subset_seed, config.where)


class Neighbours:
    """The training images of a run, and the nearest of them once `compute` has found their features."""

    _index: "NearestNeighbors | None" = None

    def __init__(self, predictor: Predictor, run: Path, selection: Selection) -> None:
        """Nothing is loaded or computed yet."""
        self.selection = selection
        self._predictor, self._path = predictor, run / FILE
        self._identity = {
            "weights": xxhash.xxh3_64_hexdigest((run / WEIGHTS).read_bytes()),
            "shard_set": selection.data.manifest.index_sha256,
            "samples": xxhash.xxh3_64_hexdigest(selection.samples.tobytes()),
        }

    @property
    def ready(self) -> bool:
        """Whether `nearest` can answer."""
        return self._index is not None

    def compute(self, lock: threading.Lock, at: Callable[[int], None], stop: Callable[[], bool]) -> None:
        """Load the features from the run folder, or compute those of the images as evaluation sees them and save them.

        lock: held while the network works, batch by batch, so that others can use it in between. at: called with the
        number of images done. stop: called after every batch; if true, nothing is kept. A run folder that cannot be
        written to is left as it is. Raises ValueError if a feature is not a finite number.
        """
        from sklearn.neighbors import NearestNeighbors  # takes more than a second

        features = self._load()
        if features is None:
            features = self._computed(lock, at, stop)
        if features is not None:
            self._index = NearestNeighbors(metric="cosine", algorithm="brute").fit(features)

    def _computed(self, lock: threading.Lock, at: Callable[[int], None], stop: Callable[[], bool]) -> np.ndarray | None:
        """The features, (n, F) float32, which are saved; None if `stop` said so."""
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
                    return None
        finally:
            loader.close()
        features = np.concatenate(rows)
        with suppress(OSError):  # the folder of another user, or a full disk: they are computed again next time
            write_durably(self._path, save({"features": features}, metadata=self._identity))
        return features

    def nearest(self, features: np.ndarray, count: int) -> list[Neighbour]:
        """The `count` nearest lesions to (F,) features, nearest first.

        Raises ValueError before `ready`, DataError if the picture of one is damaged.
        """
        if self._index is None:
            raise ValueError("the features of the training images are not computed yet")
        (distances,), (order,) = self._index.kneighbors(features[None], len(self.selection))
        data, samples, lesions = self.selection.data, self.selection.samples, self.selection.lesion_ids.astype(str)
        first = np.sort(np.unique(lesions[order], return_index=True)[1])  # the nearest image of each lesion
        found = []
        for place in first[:count].tolist():
            row, cosine = order[place], 1 - float(distances[place])
            sample = int(samples[row])
            image_id, dx = (str(data.column(name)[sample]) for name in ("image_id", "dx"))
            picture = cv2.imencode(".jpg", shrink(data.pixels(sample), _PICTURE_PX)[:, :, ::-1])[1].tobytes()
            found.append(Neighbour(sample, image_id, str(lesions[row]), dx, cosine, picture))
        return found

    def _load(self) -> np.ndarray | None:
        """The features of the run folder; None where there are none, or they are of other weights or images."""
        try:
            with safetensors_file(self._path, "numpy") as file:
                return file.get_tensor("features") if file.metadata() == self._identity else None
        except (SafetensorError, OSError):
            return None
