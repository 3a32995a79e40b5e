"""Trained runs on another packed set: their mean probabilities, the classes that both have, metrics and subgroups."""

import io
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from shards import Loader, Selection, ShardSet
from shards.common.errors import DataError, DermscaleError, UsageError, one_line
from shards.common.files import sync_folder, write_durably
from shards.labelmap import LabelMap
from shards.place import beside
from shards.store import name_of
from train.distributed import World
from train.evaluation import logits_of
from train.inference.predictor import Ensemble
from train.metrics.bootstrap import Floats, Ints
from train.metrics.counterparts import Counterparts, as_logits, find_counterparts, labels_of
from train.metrics.run_metrics import evaluate
from train.metrics.subgroups import compared, find_column, groups_of, holm, measure_groups
from train.prepare import reduction_warning
from train.record import PREDICTIONS, RESULT, to_json
from train.study.elsewhere import KIND, summary
from train.study.runs import read_run

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 64
_THUMB_PX = 16
_SAME = 0.9
"""The correlation of two grey images of 16 × 16 px from which on they count as the same picture."""


class Elsewhere:
    """Runs and another set: which of its images are tested, and what is measured on them."""

    def __init__(
        self,
        ensemble: Ensemble,
        folders: Sequence[Path],
        data: ShardSet,
        split: str | None,
        set_map: LabelMap | None,
        run_map: LabelMap | None,
        *,
        warn: Callable[[str], None],
    ) -> None:
        """Choose the images: those of the split that have a counterpart among the runs' classes, and are new to them.

        split: one of SPLITS, `all`, or None for the default. warn: told what may be a mistake. Raises UsageError for a
        split that the runs were trained on and for a set without labels, DataError if no image or fewer than two
        classes are left.
        """
        self.ensemble, self.data, self.warn, self.maps = ensemble, data, warn, (set_map, run_map)
        data.require_labels()
        self.runs = [read_run(folder) for folder in folders]
        own = data.manifest.index_sha256 in {run.result["shard_set_sha256"] for run in self.runs}
        self.split = split or ("test" if own else "all")
        if own and self.split in ("all", "train"):
            raise UsageError(f"--split {self.split}: a run was trained on images of {data.address}; use --split test")
        chosen = np.arange(len(data)) if self.split == "all" else np.flatnonzero(data.column("split") == self.split)
        seen = np.zeros(chosen.size, dtype=bool)
        for folder in () if own else folders:
            seen |= self._seen_by(folder, chosen)
        self.seen, chosen = int(seen.sum()), chosen[~seen]
        labels = data.column("label")[chosen].astype(np.int64)
        if not chosen.size:
            raise DataError(f"{data.address}: split {self.split} has no image that is new to the runs")
        self.images = dict(enumerate(np.bincount(labels, minlength=len(data.manifest.classes)).tolist()))
        self.both: Counterparts = find_counterparts(
            ensemble.classes, data.manifest.classes, self.images, set_map, run_map
        )
        common = labels_of(self.both, labels)
        self.labels: Ints = common[common >= 0]
        self.selection = Selection(data, chosen[common >= 0], self.split)
        self.counts = np.sum([about.class_counts for about in ensemble.abouts], axis=0)

    def _seen_by(self, folder: Path, samples: Ints) -> np.ndarray:
        """Which of (N,) samples a run was trained or tuned on, (N,) bool; all images of a lesion count with one.

        Such an image has the name of one in the run's training or validation split, and looks the same. Warns where
        the run's shard set is not there any more.
        """
        run, none = next(one for one in self.runs if one.folder == folder), np.zeros(samples.size, dtype=bool)
        try:
            with ShardSet(run.config["data"]) as own:
                if own.manifest.index_sha256 != run.result["shard_set_sha256"]:
                    raise DataError(f"{own.path}: is another set now")
                rows = np.flatnonzero(own.column("split") != "test")
                place = dict(zip(own.column("image_id")[rows].tolist(), rows.tolist(), strict=True))
                names, lesions = (of[samples] for of in (self.data.column("image_id"), self.data.lesion_names))
                twins = [
                    n
                    for n, name in enumerate(names.tolist())
                    if name in place and _alike(own.pixels(place[name]), self.data.pixels(int(samples[n])))
                ]
                return np.isin(lesions.astype(str), lesions[twins].astype(str)) if twins else none
        except DermscaleError as error:
            self.warn(f"whether {folder} was trained on images of this set cannot be checked ({one_line(error, 160)})")
            return none

    def measure(
        self, by: Sequence[tuple[str, Sequence[float]]], resamples: int, at: Callable[[str, int, int], None]
    ) -> "tuple[dict[str, Any], pa.Table]":
        """The content of result.json and the table of predictions.

        by: columns and the ends of their bins. at: called with a phase, the steps done and their number. Raises
        UsageError for a column that the set does not have, and for bins of a column without numbers.
        """
        groups = [self._groups(word, edges) for word, edges in by]
        of_run = self._probabilities(at)
        steps = 2 + len(groups)
        at("metrics", 0, steps)
        there = self._metrics(of_run, self.labels, self._lesions(), resamples)
        at("metrics", 1, steps)
        home, no_home = self._home(resamples)
        subgroups = []
        for number, group in enumerate(groups):
            at("subgroups", 2 + number, steps)
            logits = as_logits(self.both.probabilities(of_run))
            options = {"classes": self.both.classes, "resamples": resamples, **self._priors()}
            subgroups.append(measure_groups(logits, self.labels, self._lesions(), group, **options))
        holm(subgroups, compared(self.both.classes))
        manifest, set_names = self.data.manifest, self.data.manifest.classes.names
        counted = {name: self.images[set_names.index(name)] for name in self.both.set_only}
        result: dict[str, Any] = {
            "kind": KIND,
            "runs": [
                {key: run.row[key] for key in ("cell", "model", "fraction", "seed", "subset_seed")}
                | {"shard_set_sha256": run.result["shard_set_sha256"]}
                for run in self.runs
            ],
            "data": {
                "name": name_of(self.data.address),
                "dataset": manifest.source.get("dataset"),
                "shard_set_sha256": manifest.index_sha256,
                "split": self.split,
                "group": list(manifest.group),
                "citation": manifest.citation,
                "licence": manifest.licence,
            },
            "map": None if self.maps[0] is None else self.maps[0].name,
            "map_run": None if self.maps[1] is None else self.maps[1].name,
            "classes": asdict(self.both.classes),
            "labels": {set_names[label]: self.both.classes.names[c] for label, c in self.both.of_set.items()},
            "left_out": {"of_the_set": counted, "of_the_run": list(self.both.run_only), "seen_in_training": self.seen},
            "called_left_out": self.both.called_outside(of_run),
            "there": there,
            "home": home,
            "no_home": no_home,
            "subgroups": subgroups,
        }
        result |= dict(zip(("summary", "notes"), summary(result), strict=True))
        return result, self._table(of_run)

    def _groups(self, word: str, edges: Sequence[float]) -> Any:
        table = self.data.table
        column = find_column(word, table.column_names)
        if column is None:
            raise UsageError(f"--by {word}: the set has no such column (it has {', '.join(table.column_names)})")
        groups = groups_of(column, table[column].take(self.selection.samples).to_pylist(), edges)
        if edges and not groups.names:
            raise UsageError(f"--by {word}: no value of {column} is a number; leave the ends of bins out")
        return groups

    def _lesions(self) -> np.ndarray | None:
        """(N,) groups of the images, lesions or patients; None if the set names none."""
        lesions = self.data.column("group")[self.selection.samples]
        return None if all(lesion is None for lesion in lesions) else lesions

    def _priors(self) -> dict[str, Any]:
        prior = self.ensemble.prior
        return {"prior": prior, "logits_prior": prior, "training_prior": self.both.restricted(self.counts)}

    def _metrics(self, of_run: Floats, labels: Ints, lesions: Any, resamples: int) -> dict[str, Any]:
        logits = as_logits(self.both.probabilities(of_run))
        found = evaluate(
            logits,
            labels,
            lesions,
            classes=self.both.classes,
            split=["test"] * labels.size,  # as images that the runs have not seen
            resamples=resamples,
            **self._priors(),
        )
        return found | {"split": self.split}

    def _home(self, resamples: int) -> tuple[dict[str, Any] | None, str]:
        """The same metrics on the runs' own test images, from their stored predictions; or None and why."""
        if len({run.result["shard_set_sha256"] for run in self.runs}) > 1:
            return None, "the runs were tested on different sets"
        tables = [run.predictions() for run in self.runs]
        tables = [table.loc[table["split"] == "test"].sort_values(by="image_id") for table in tables]
        columns = [f"prob_{name}" for name in self.ensemble.classes.names]
        of_run = np.mean([table[columns].to_numpy(dtype=np.float64) for table in tables], axis=0)
        targets = np.array(self.both.of_run)[tables[0]["label"].to_numpy(dtype=np.int64)]
        names = [self.both.targets[target] if target >= 0 else "" for target in targets.tolist()]
        common = np.isin(names, self.both.classes.names)
        if not common.any():
            return None, "the runs have no test image of these classes"
        labels = np.array([self.both.classes.names.index(name) for name in np.array(names)[common]], dtype=np.int64)
        lesions = tables[0]["lesion_id"].to_numpy(dtype=object)[common]
        known = any(lesion is not None and lesion == lesion for lesion in lesions)
        return self._metrics(of_run[common], labels, lesions if known else None, resamples) | {"split": "test"}, ""

    def _probabilities(self, at: Callable[[str, int, int], None]) -> Floats:
        """(N, classes of the runs) mean probabilities of the images as they are packed, cropped as in evaluation."""
        found, members = [], self.ensemble.members
        batches = -(-len(self.selection) // _BATCH)
        for number, member in enumerate(members):
            loader = Loader(
                self.selection,
                batch_size=_BATCH,
                resolution=member.about.resolution,
                train=False,
                engine="native",
                device=member.device,
                augment=member.augment,
            )
            if (text := reduction_warning(loader)) is not None:
                self.warn(text)
            shown = partial(_shown, at, number * batches, batches * len(members))
            try:
                world = World(device=member.device)
                logits = logits_of(member.net, loader, "fp32", world, shown, tta=member.about.tta)
            finally:
                loader.close()
            if logits is None:
                raise ValueError("an evaluation in one process gave no logits")
            found.append(member.probabilities(logits.astype(np.float64), self.ensemble.prior))
        return np.mean(found, axis=0)

    def _table(self, of_run: Floats) -> "pa.Table":
        """A row for each image: what it is, its label in the set and among the common classes, and probabilities.

        lesion_id: the set's `group`. `prob_<class>`: of all classes of the runs, not divided by the sum over the common
        ones.
        """
        import pyarrow as pa

        names = {"image_id": "image_id", "lesion_id": "group", "split": "split", "dx": "dx"}
        columns = {name: self.data.column(column)[self.selection.samples] for name, column in names.items()}
        columns["class"] = np.array(self.both.classes.names, dtype=object)[self.labels]
        columns |= {
            f"prob_{name}": of_run[:, c].astype(np.float32) for c, name in enumerate(self.ensemble.classes.names)
        }
        return pa.table(columns).replace_schema_metadata({"prior": self.ensemble.prior})


def _shown(at: Callable[[str, int, int], None], before: int, total: int, done: int) -> None:
    at("predicting", before + done, total)


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two (h, w, 3) uint8 images are the same picture, in any size."""
    small = []
    for pixels in (one, other):
        grey = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)
        small.append(cv2.resize(grey, (_THUMB_PX, _THUMB_PX), interpolation=cv2.INTER_AREA).astype(np.float64).ravel())
    if min(part.std() for part in small) < 1:  # an image of one colour has no correlation
        return bool(abs(small[0].mean() - small[1].mean()) < 3)
    return bool(np.corrcoef(*small)[0, 1] > _SAME)


def write(out: Path, result: dict[str, Any], table: "pa.Table") -> None:
    """Write the folder `out`, which is new or empty: it is there whole or not at all."""
    import pyarrow.parquet as pq

    new = beside(out, "partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        shutil.rmtree(new)  # what a killed command left
    new.mkdir()
    try:
        content = io.BytesIO()
        pq.write_table(table, content)
        write_durably(new / PREDICTIONS, content.getvalue())
        write_durably(new / RESULT, to_json(result))
        new.rename(out)  # onto an empty folder too
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    sync_folder(out.parent)
