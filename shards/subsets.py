"""Which lesions go to which split, and in which order fractions take them: pure functions of names and a seed.

A lesion is never divided. Every choice depends on a keyed hash of the lesion's name and not on the order of the rows:
any order of the metadata gives the same lesions.
"""

from collections.abc import Iterable

import numpy as np
import xxhash

from shards.common.errors import UsageError
from shards.format import SPLITS


def group_labels(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(G,) the class of each group, or of its images' classes the one that has the fewest images in all.

    labels: (N,) class of each image; groups: (N,) number of its group, 0 to G − 1. A lesion has one class; a patient
    may have several.
    """
    order = np.argsort(np.bincount(labels), kind="stable")  # the classes
    rank = np.argsort(order)
    least = np.full(groups.max(initial=-1) + 1, len(order))
    np.minimum.at(least, groups, rank[labels])
    return order[least]


class _Lesions:
    """The lesions of a set of images: their sizes (images) and classes, in the order of their keys.

    A key is XXH3 of the name with seed and use, 64 bits. Two of a million lesions have the same one, and are taken for
    one lesion, with a probability of 3e-8.
    """

    def __init__(self, labels: np.ndarray, lesions: Iterable[str], seed: int, use: str) -> None:
        digests = (xxhash.xxh3_64_intdigest(f"{use}/{seed}/{name}".encode()) for name in lesions)
        keys = np.fromiter(digests, np.uint64, len(labels))
        _, self.of_image, self.sizes = np.unique(keys, return_inverse=True, return_counts=True)
        self.labels = group_labels(np.asarray(labels), self.of_image)


def split_lesions(
    labels: np.ndarray,
    lesions: Iterable[str],
    ratio: tuple[int, int, int] = (70, 10, 20),
    seed: int = 0,
) -> np.ndarray:
    """Assign each image to a split, by lesion and stratified by class.

    labels: (N,) class of each image. lesions: (N,) lesion name of each image; an image without one has a name of its
    own. ratio: of images in train, val and test, in any unit. Returns (N,) split names. In every class the lesions go,
    in hashed order, to the split that is furthest below its share; a class with at least as many lesions as splits has
    one in each. Raises UsageError for a ratio without training images or with a negative part.
    """
    if len(ratio) != 3 or ratio[0] <= 0 or min(ratio) < 0:
        raise UsageError(f"split {'/'.join(map(str, ratio))}: give train/val/test as three numbers, train above 0")
    groups = _Lesions(labels, lesions, seed, "split")
    return np.array(SPLITS, dtype=object)[_dealt(groups, np.array(ratio))][groups.of_image]


def fold_of(labels: np.ndarray, lesions: Iterable[str], folds: int, seed: int = 0) -> np.ndarray:
    """(N,) int64, the fold of each image, 0 to folds − 1: dealt as `split_lesions` does, in equal shares."""
    groups = _Lesions(labels, lesions, seed, "fold")
    return _dealt(groups, np.ones(folds, np.int64))[groups.of_image]


def _dealt(groups: _Lesions, ratio: np.ndarray) -> np.ndarray:
    """The part of each lesion, 0 to len(ratio) − 1; parts with ratio 0 get none."""
    shares = ratio.astype(np.float64) / ratio.sum()
    wanted = [s for s in range(len(ratio)) if ratio[s] > 0]
    choice = np.zeros(len(groups.sizes), np.int64)
    for label in np.unique(groups.labels):
        members = np.flatnonzero(groups.labels == label)
        target = shares * groups.sizes[members].sum()
        given = np.zeros(len(ratio))
        for i, lesion in enumerate(members):
            if i < len(wanted) <= len(members):
                split = wanted[i]
            else:
                split = max(wanted, key=lambda s: target[s] - given[s])
            choice[lesion] = split
            given[split] += groups.sizes[lesion]
    return choice


def nested_subset(labels: np.ndarray, lesions: Iterable[str], fraction: float, seed: int = 0) -> np.ndarray:
    """The images of the first `fraction` of an order of the lesions; a larger fraction contains every smaller one.

    labels, lesions: (N,) of the training images. Returns sorted positions, int64. The order begins with one lesion of
    each class. Every other lesion follows at the position of its middle within its class (0 to 1), so that each prefix
    is close to class-proportional. The prefix ends with the lesion that brings it to `fraction` of the images. Another
    seed gives each class another order. Raises UsageError for a fraction outside (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise UsageError(f"fraction {fraction} is outside (0, 1]")
    groups = _Lesions(labels, lesions, seed, "fraction")
    place = np.zeros(len(groups.sizes))
    for label in np.unique(groups.labels):
        members = np.flatnonzero(groups.labels == label)
        ends = np.cumsum(groups.sizes[members])
        place[members] = (ends - groups.sizes[members] / 2) / ends[-1]
        place[members[0]] = -1.0
    order = np.argsort(place, kind="stable")
    images = np.cumsum(groups.sizes[order])
    count = int(np.searchsorted(images, fraction * images[-1] - 1e-9)) + 1
    count = max(count, len(np.unique(groups.labels)))
    taken = np.zeros(len(groups.sizes), bool)
    taken[order[:count]] = True
    return np.flatnonzero(taken[groups.of_image])
