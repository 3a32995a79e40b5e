"""The training lesions that are most similar to an image, by the features on which the model's classifier works.

Similarity is the cosine of the angle between two images' features. A lesion counts once, by its nearest image.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

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

FILE = "features.safetensors"
"""In the run folder: the features of its training images, so that they are computed once."""

_BATCH = 16
"""Images at a time. A prediction that arrives in between waits for one batch."""


_PICTURE_PX = 180
"""The longer side of a similar lesion's picture."""


def training_selection(run: Path, data: Path | None = None) -> Selection:
    """The images that a run was trained on. data: the shard set's folder, if it is not where the run found it.

    Raises DataError where the run's record or its shard set is missing, or the set is a different one.
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
    """The features of a run's training images, loaded or computed by `compute`, and the nearest of them."""

    def __init__(self, predictor: Predictor, run: Path, selection: Selection) -> None:
        """Load the features from the run folder if it has them. Nothing is computed yet."""
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
        """Compute the features of the images as evaluation sees them, and save them in the run folder.

        lock: held while the network works, batch by batch, so that others can use it in between. at: called with the
        number of images done. stop: called after every batch; if true, nothing is kept. A run folder that cannot be
        written to is left as it is.
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
        with suppress(OSError):  # the folder of another user, or a full disk: they are computed again next time
            write_durably(self._path, save({"features": self._features}, metadata=self._identity))

    def nearest(self, features: np.ndarray, count: int) -> list[Neighbour]:
        """The `count` nearest lesions to (F,) features, nearest first.

        Raises ValueError before `ready`, DataError if the picture of one is damaged.
        """
        if self._features is None:
            raise ValueError("the features of the training images are not computed yet")
        cosines = self._features @ (features / max(float(np.linalg.norm(features)), 1e-12))
        order = np.argsort(-cosines, kind="stable")
        data, samples, lesions = self.selection.data, self.selection.samples, self.selection.lesion_ids.astype(str)
        first = np.sort(np.unique(lesions[order], return_index=True)[1])  # the nearest image of each lesion
        found = []
        for row in order[first[:count]].tolist():
            sample = int(samples[row])
            image_id, dx = (str(data.column(name)[sample]) for name in ("image_id", "dx"))
            picture = cv2.imencode(".jpg", shrink(data.pixels(sample), _PICTURE_PX)[:, :, ::-1])[1].tobytes()
            found.append(Neighbour(sample, image_id, str(lesions[row]), dx, float(cosines[row]), picture))
        return found

    def _load(self) -> np.ndarray | None:
        """The features of the run folder; None where there are none, or they are of other weights or images."""
        try:
            with safetensors_file(self._path, "numpy") as file:
                return file.get_tensor("features") if file.metadata() == self._identity else None
        except (SafetensorError, OSError):
            return None
