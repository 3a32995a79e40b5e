"""Which classes of a trained network and of another image set are the same, and its probabilities over these."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shards.common.errors import DataError, one_line
from shards.format import Classes
from shards.labelmap import LabelMap
from train.metrics.bootstrap import Floats, Ints


@dataclass(frozen=True)
class Counterparts:
    """The classes that both have, in the order of the network's.

    of_run: of each class of the network (before a map of its own), its number among the targets; −1 without one.
    targets: what the network's classes become; all of them, also those that the set lacks. of_set: label in the set →
    label among `classes`, for those that have a counterpart. run_only, set_only: names of the others.
    """

    classes: Classes
    targets: tuple[str, ...]
    of_run: tuple[int, ...]
    of_set: dict[int, int]
    run_only: tuple[str, ...]
    set_only: tuple[str, ...]

    def targeted(self, values: Any) -> Floats:
        """(…, classes of the network) probabilities or counts → (…, targets): those of one target are added."""
        found = np.zeros((*np.shape(values)[:-1], len(self.targets)))
        for own, target in enumerate(self.of_run):
            if target >= 0:
                found[..., target] += np.asarray(values, np.float64)[..., own]
        return found

    def restricted(self, values: Any) -> Floats:
        """(…, classes of the network) → (…, common classes), not yet divided by their sum."""
        return self.targeted(values)[..., [self.targets.index(name) for name in self.classes.names]]

    def probabilities(self, of_run: Floats) -> Floats:
        """(N, common classes) probabilities given that an image is of one of them: divided by their sum.

        An image that the network gives no probability to any of them gets equal ones.
        """
        shares = self.restricted(of_run)
        sums = shares.sum(axis=-1, keepdims=True)
        return np.where(sums > 0, shares / np.where(sums > 0, sums, 1.0), 1 / shares.shape[-1])

    def called_outside(self, of_run: Floats) -> float:
        """The share of images whose likeliest class of all is one that the set does not have."""
        common = np.isin(self.targets, self.classes.names)
        return float((~common[self.targeted(of_run).argmax(axis=-1)]).mean())


def find_counterparts(
    run: Classes,
    other: Classes,
    images: Mapping[int, int],
    of_set: LabelMap | None = None,
    of_run: LabelMap | None = None,
) -> Counterparts:
    """Match the classes of a network with those of a set.

    images: label in the set → how many images are there; classes without any are not there. of_set, of_run: maps of the
    set's labels and of the network's classes. Without a map a name is its own counterpart, in any case. Raises
    DataError if fewer than two classes are left, UsageError for a label that a map does not name.
    """
    renamed = {name: name for name in run.names} if of_run is None else of_run.split(run.names)[0]
    base = run if of_run is None else of_run.classes
    targets = tuple(name for name in base.names if name in renamed.values())
    folded = {name.casefold(): name for name in targets} | {name: name for name in targets}
    there = {label: other.names[label] for label, count in sorted(images.items()) if count}
    named = {name: name for name in there.values()} if of_set is None else of_set.split(there.values())[0]
    met = {
        label: target
        for label, name in there.items()
        if name in named and (target := folded.get(named[name], folded.get(named[name].casefold(), "")))
    }
    common = tuple(name for name in targets if name in met.values())
    if len(common) < 2:
        raise DataError(
            f"the network's classes ({one_line(', '.join(targets), 100)}) and the set's "
            f"({one_line(', '.join(there.values()), 100)}) have {', '.join(common) or 'none'} in common, and two are "
            "needed; say with --map what the labels of the set are (and with --map-run what the network's classes are)"
        )
    sets = {name: tuple(one for one in members if one in common) for name, members in base.sets.items()}
    return Counterparts(
        classes=replace(
            base,
            names=common,
            long_names={name: words for name, words in base.long_names.items() if name in common},
            sets={name: some for name, some in sets.items() if 0 < len(some) < len(common)},
        ),
        targets=targets,
        of_run=tuple(targets.index(renamed[name]) if name in renamed else -1 for name in run.names),
        of_set={label: common.index(target) for label, target in met.items()},
        run_only=tuple(name for name in run.names if renamed.get(name) not in common),
        set_only=tuple(name for label, name in there.items() if label not in met),
    )


def as_logits(probabilities: Floats) -> Floats:
    """(N, C) finite logits of probabilities, for what takes logits: their logarithms."""
    return np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))


def labels_of(found: Counterparts, labels: Ints) -> Ints:
    """(N,) labels among the common classes of (N,) labels in the set, −1 without a counterpart."""
    table = np.full(max([int(labels.max(initial=-1)), *found.of_set]) + 1, -1, dtype=np.int64)
    for label, common in found.of_set.items():
        table[label] = common
    return table[labels]
