"""Labels of a source that become the classes of another set while it is packed."""

from collections import Counter
from dataclasses import replace

from preprocess.records import Records, Source
from shards.common.errors import DataError, UsageError
from shards.format import Classes
from shards.labelmap import LabelMap


def map_labels(source: Source, labels: LabelMap, classes: Classes | None) -> None:
    """Give the records of a source the classes of a map. Images whose label has no counterpart are left out and named.

    classes: those of the new set; None: those of the map. Raises UsageError for a label that the map does not name, and
    for a counterpart that is none of the classes; DataError if no image is left.
    """
    counts = Counter(dx for dx in source.records.column("dx") if dx is not None)
    if not counts:
        raise UsageError(f"--map {labels.name}: the images have no labels; leave --map out")
    mapped, without = labels.split(sorted(counts))
    source.classes = classes or labels.classes
    if unknown := sorted(set(mapped.values()) - set(source.classes.names)):
        raise UsageError(
            f"--map {labels.name}: maps to '{unknown[0]}', which is none of {', '.join(source.classes.names)}"
        )
    found = (replace(record, dx=mapped[record.dx]) for record in source.records if record.dx in mapped)
    source.records = Records(found)
    if not source.records:
        raise DataError(f"{source.folder}: --map {labels.name} leaves no image: no label has a counterpart")
    if without:
        named = ", ".join(f"{label} ({counts[label]:,} images)" for label in without)
        source.warnings.append(f"left out, without a counterpart in the map {labels.name}: {named}")
    if absent := sorted(set(source.classes.names) - set(mapped.values())):
        source.warnings.append(f"no image is mapped to {', '.join(absent[:20])}")
    source.about["map"] = {"name": labels.name, "labels": mapped, "left_out": {one: counts[one] for one in without}}
