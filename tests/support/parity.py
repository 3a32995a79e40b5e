"""Comparing engines: requests for them, damaged sets, and the differences between the batches of two loaders."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from shards import Augment, Loader, ShardSet
from shards.engines import Request
from shards.format import INDEX, MANIFEST, content_sha256
from shards.loader import Batch
from shards.plan import training_plan


def batches(loader: Loader) -> list[Batch]:
    """An epoch, with copies of the images."""
    return [batch._replace(images=batch.images.clone()) for batch in loader]


def equal(some: list[Batch], others: list[Batch]) -> bool:
    """Whether all batches are the same to the bit."""
    return len(some) == len(others) and all(all(map(torch.equal, a, b)) for a, b in zip(some, others, strict=True))


def distances(expected: list[Batch], found: list[Batch]) -> np.ndarray:
    """Absolute differences of all values, flat, after labels, order, colour, mask and layout were found equal."""
    assert len(expected) == len(found) > 0
    parts = []
    for a, b in zip(expected, found, strict=True):
        for name in ("labels", "samples", "colour", "mask"):
            assert torch.equal(getattr(a, name), getattr(b, name).cpu()), name
        assert b.images.dtype == torch.uint8 and a.images.shape == b.images.shape
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        parts.append((a.images.int() - b.images.cpu().int()).abs().numpy().ravel())
    return np.concatenate(parts)


def assert_parity(expected: list[Batch], found: list[Batch], mean: float = 0.25) -> None:
    """Images at most 1 of 255 apart and less than `mean` on average; everything else equal."""
    apart = distances(expected, found)
    assert apart.max() <= 1
    assert apart.mean() < mean


def requests_of(data: ShardSet, sizes: list[int]) -> list[Request]:
    """Consecutive training crops in batches of these sizes."""
    samples = data.select("train").samples
    plan = training_plan(5, 1, samples, data.column("height")[samples], data.column("width")[samples], Augment())
    ends = np.cumsum(sizes)
    assert ends[-1] <= len(samples)
    return [
        Request(samples[a:b], plan.boxes[a:b], plan.symmetry[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)
    ]


def flip_a_bit(folder: Path, position: int) -> str:
    """Damage the training sample at this position; returns its name."""
    data = ShardSet(folder)
    victim = int(data.select("train").samples[position])
    file = folder / data.manifest.shards[int(data.column("shard")[victim])].file
    content = bytearray(file.read_bytes())
    content[int(data.column("offset")[victim]) + int(data.column("length")[victim]) - 9] ^= 0x10
    file.write_bytes(content)
    return str(data.column("image_id")[victim])


def write_index(folder: Path, index: pa.Table | bytes) -> None:
    """Give a set another index, and its manifest the right checksums."""
    if isinstance(index, bytes):
        (folder / INDEX).write_bytes(index)
    else:
        pq.write_table(index, folder / INDEX)
    digest = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
    change_manifest(folder, lambda manifest: manifest.update(index_sha256=digest))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a set's manifest, which keeps a right checksum (if it has one after the change)."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    if "manifest_sha256" in manifest:
        manifest["manifest_sha256"] = content_sha256(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def with_cells(table: pa.Table, name: str, value: object, rows: slice = slice(3, 4)) -> pa.Table:
    """The index with the cells of some rows of a column changed."""
    cells = table[name].to_pylist()
    cells[rows] = [value] * len(cells[rows])
    return table.set_column(table.column_names.index(name), name, pa.array(cells, table[name].type))
