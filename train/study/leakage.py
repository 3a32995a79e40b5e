"""How much a split by image inflates the scores: two training sets of one size, and the difference between them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.common.errors import DataError
from train.study.numbers import between, p_value, points

if TYPE_CHECKING:
    import numpy as np

    from shards.shardset import ShardSet

ARMS = ("leaky", "apart")
RESULT = "leakage.json"


def arms(
    split: "np.ndarray", labels: "np.ndarray", lesions: "np.ndarray", images: "np.ndarray", classes: tuple[str, ...]
) -> "dict[str, np.ndarray]":
    """Training rows of both arms, each ascending int64, with the same number of images of every class.

    split, labels, lesions, images: (N,) of every image of a set that was split by image. `apart`: all training images
    whose lesion has no test image. `leaky`: as many of each class, first those whose lesion has a test image, then
    others, ordered by a hash of their name. Raises DataError for a class whose training lesions all have test images.
    """
    import numpy as np
    import xxhash

    training = np.flatnonzero(split == "train")
    tested = set(lesions[split == "test"].tolist())
    shared = np.array([lesion in tested for lesion in lesions[training].tolist()], dtype=bool)
    keys = np.array([xxhash.xxh3_64_intdigest(f"leakage/{name}".encode()) for name in images[training]], np.uint64)
    leaky = []
    for label in np.unique(labels[training]):
        mine = np.flatnonzero(labels[training] == label)
        wanted = int((~shared[mine]).sum())
        if wanted == 0:
            raise DataError(f"every training lesion of class {classes[int(label)]} has a test image: too few images")
        order = mine[np.lexsort((keys[mine], ~shared[mine]))]
        leaky.append(order[:wanted])
    return {"apart": training[~shared], "leaky": training[np.sort(np.concatenate(leaky))]}


def write_arm(data: "ShardSet", training: "np.ndarray", arm: str, out: Path) -> None:
    """Write the shard set of an arm: the given training rows, and the validation and test images as they are.

    A set that exists already and comes from the same source is kept.
    """
    import numpy as np
    import pyarrow as pa

    from shards.format import INDEX_TYPES, MANIFEST, Manifest
    from shards.writer import PackedSample, ShardSetWriter

    source = {**data.manifest.source, "derived_from": data.manifest.index_sha256, "arm": arm}
    if (out / MANIFEST).exists():
        there, here = Manifest.from_file(out / MANIFEST), data.manifest
        if there.source == source and there.identity | {"shard_set": ""} == here.identity | {"shard_set": ""}:
            return
    names = list(INDEX_TYPES)
    further = pa.schema([field for field in data.table.schema if field.name not in names])
    kept = [name for name in (*names[: names.index("split")], *further.names) if name != "label"]
    splits = data.column("split")
    rows = np.concatenate([training, np.flatnonzero(splits == "val"), np.flatnonzero(splits == "test")])
    encode, classes = data.manifest.encode, data.manifest.classes
    with ShardSetWriter(out, encode, 64 << 20, overwrite=True, classes=classes, columns=further) as writer:
        for row in rows.tolist():
            metadata: dict[str, Any] = {name: data.table[name][row].as_py() for name in kept}
            writer.add(
                PackedSample(
                    bytes(data.read(row)),
                    str(data.column("encoding")[row]),
                    int(data.column("height")[row]),
                    int(data.column("width")[row]),
                    str(splits[row]),
                    metadata,
                )
            )
        manifest = data.manifest
        writer.finish(
            mean=manifest.mean,
            std=manifest.std,
            split={**manifest.split, "arm": arm},
            source=source,
            citation=manifest.citation,
            licence=manifest.licence,
            versions=manifest.versions,
            group=manifest.group,
        )


def measure(data: "ShardSet", rows: "dict[str, np.ndarray]", cells: list[Any], folder: Any) -> dict[str, Any]:
    """The paired differences leaky − apart (`differences.model_difference`) of all test images, of those that have
    views among the leaky training images (`seen`), and of those that have none (`unseen`).

    None where a group has no image.
    """
    import numpy as np

    from train.metrics.differences import model_difference
    from train.study.runs import read_run

    in_test = data.column("split") == "test"
    trained = set(data.lesion_names[rows["leaky"]].tolist())
    seen = np.array([lesion in trained for lesion in data.lesion_names[in_test].tolist()], dtype=bool)
    names = data.column("image_id")[in_test]
    groups = {"all": names, "seen": names[seen], "unseen": names[~seen]}
    found: dict[str, Any] = {
        "model": cells[0].config.model,
        "seeds": sorted({cell.config.seed for cell in cells}),
        "training_images": len(rows["apart"]),
        "training_lesions": {arm: len(set(data.lesion_names[rows[arm]].tolist())) for arm in ARMS},
        "test_images": {name: len(group) for name, group in groups.items()},
        "epochs": cells[0].config.epochs,
        "resolution_px": cells[0].config.resolution,
    }
    runs = {arm: [read_run(folder.cell(c.name)) for c in cells if c.prefix == f"{arm}_"] for arm in ARMS}
    for name, group in groups.items():
        if not len(group):
            found[name] = None
            continue
        leaky, apart = ([run.tested(group.tolist()) for run in runs[arm]] for arm in ARMS)
        found[name] = model_difference(leaky, apart)
    return found


def sentences(result: dict[str, Any]) -> list[str]:
    """The result in sentences: the difference on all test images, what it shows, and the control. Empty if undefined.

    The control is the test images whose lesion has no view in training. Nothing can leak there, so a difference on
    them comes from the networks. The difference on the other test images is the upper limit of the leak.
    """
    metric = "balanced_accuracy"
    cell, unseen = result["all"][metric], _cell(result, "unseen", metric)
    if cell["difference"]["value"] is None:
        return []
    seeds, images = len(result["seeds"]), result["test_images"]
    lines = [
        f"Trained on as many images, but with views of the test lesions among them, {result['model']} scores "
        f"{_gap(cell, metric)} in balanced accuracy on the same {images['all']:,} test images "
        f"({seeds} seed{'' if seeds == 1 else 's'})."
    ]
    biased = unseen is not None and _side_of_0(unseen) != 0
    if _side_of_0(cell) == 0:
        lines.append("The interval contains 0, so this experiment cannot show a gain on all test images.")
    elif _side_of_0(cell) < 0:
        lines.append("It scores lower, so this experiment shows no gain.")
    elif not biased:
        lines.append("This is how much a split by image inflates the score.")
    if not cell["includes_seeds"]:
        lines.append("This compares two trained networks; other seeds may give another difference.")
    seen = _cell(result, "seen", metric)
    if seen is not None:
        lines.append(
            f"On the {images['seen']:,} test images with views in training the difference is {_gap(seen, metric)}."
        )
    if unseen is None:
        lines.append("Every test image has views in training, so there is no control.")
    else:
        line = f"On the {images['unseen']:,} without any, where nothing can leak, it is {_gap(unseen, metric)}"
        lines.append(
            line + (": part of the difference comes from the networks and not from the leak." if biased else ".")
        )
        if _side_of_0(cell) == 0 and seen is not None and _side_of_0(seen) > 0 and not biased:
            lines.append("So the leak raises the score of the images that have views in training.")
    return lines


def _cell(result: dict[str, Any], group: str, metric: str) -> dict[str, Any] | None:
    """A group's difference, None where the group has no image or the metric is undefined there."""
    cell = result[group] and result[group][metric]
    return cell if cell and cell["difference"]["value"] is not None else None


def _side_of_0(cell: dict[str, Any]) -> int:
    """1 or −1 where the whole interval of a difference lies above or below 0, and 0 where it does not or is unknown."""
    low, high = cell["difference"]["low"], cell["difference"]["high"]
    return 0 if low is None or high is None else int(low > 0) - int(high < 0)


def _gap(cell: dict[str, Any], metric: str) -> str:
    """`+1.5 points (-2.4 points to +5.4 points, p = 0.442)`."""
    return between(metric, cell["difference"], f"p {p_value(cell['p'])}", write=points)
