"""The loaders that people use, each behind the same small protocol, set up as its own documentation shows.

All get the same job (`work.Work`): random-resized crops of a quarter to the whole of the image, a mirror image with
probability one half, uint8 batches, shuffled, the last incomplete batch dropped, `work.workers` threads or processes.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# The peers live in an environment of their own (benchmarks/install_peers.sh); webdataset's names are made
# at run time.

import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.datasets import prepared, stats
from benchmarks.peers.dali import DALI
from benchmarks.peers.ffcv import FFCV
from benchmarks.peers.ours import CEILINGS, OURS, OURS_ON_GPU
from benchmarks.peers.spdl import SPDL
from benchmarks.peers.system import (
    RATIO,
    SCALE,
    Batch,
    Epoch,
    MissingPeerError,
    System,
    Work,
    WrongBatchError,
    check_batch,
)
from benchmarks.worker import Running


def _transform(work: Work) -> Any:
    """PIL image → (3, S, S) uint8, as torchvision's reference recipe crops and flips."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(work.resolution_px, scale=SCALE, ratio=RATIO),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


def _pairs(loader: Any) -> Iterator[Batch]:
    for batch in loader:
        yield (batch["image"], batch["label"]) if isinstance(batch, dict) else (batch[0], batch[1])


def image_folder(work: Work, folder: Path, pin: bool = False) -> Epoch:
    """torchvision's ImageFolder and PyTorch's DataLoader: what most people start with.

    pin: batches come in page-locked memory, from which a GPU copies while the CPU goes on.
    """
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    loader = DataLoader(
        ImageFolder(str(folder), _transform(work)),
        batch_size=work.batch_size,
        shuffle=True,
        num_workers=work.workers,
        drop_last=True,
        persistent_workers=True,
        pin_memory=pin,
    )
    return lambda: _pairs(loader)


def _webdataset(work: Work, folder: Path) -> Epoch:
    import webdataset as wds

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    transform = _transform(work)
    data = (
        wds.WebDataset(tars, shardshuffle=len(tars), nodesplitter=wds.split_by_node, workersplitter=wds.split_by_worker)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(work.batch_size, partial=False)
    )
    loader = wds.WebLoader(data, batch_size=None, num_workers=work.workers, persistent_workers=True)
    return lambda: _pairs(loader)


def _streaming(work: Work, folder: Path) -> Epoch:
    import atexit
    from multiprocessing.util import Finalize

    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    # It gives its shared memory back in exit handlers, which a process of multiprocessing ends without.
    Finalize(None, atexit._run_exitfuncs, exitpriority=0)
    transform = _transform(work)

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return transform(sample["image"]), sample["label"]

    data = Images(local=str(folder / "set"), shuffle=True, batch_size=work.batch_size)
    loader = DataLoader(
        data, batch_size=work.batch_size, num_workers=work.workers, drop_last=True, persistent_workers=True
    )
    return lambda: _pairs(loader)


def _litdata(work: Work, folder: Path) -> Epoch:
    from litdata import StreamingDataLoader, StreamingDataset
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(work.resolution_px, scale=SCALE, ratio=RATIO, antialias=True)
    flip = v2.RandomHorizontalFlip()

    def transform(sample: Any) -> Any:
        return flip(crop(sample["image"])), sample["label"]

    data = StreamingDataset(str(folder / "set"), shuffle=True, drop_last=True, transform=transform)
    loader = StreamingDataLoader(
        data, batch_size=work.batch_size, num_workers=work.workers, drop_last=True, persistent_workers=True
    )
    return lambda: _pairs(loader)


_PIL_NOTE = "decodes whole images with Pillow and resizes with its antialiased bilinear filter, in worker processes"

TORCH = (
    System(
        "webdataset",
        "tars",
        _webdataset,
        ("webdataset",),
        f"{_PIL_NOTE}; shuffles within a buffer of 1,000; each worker reads its own tars and drops its own last batch",
    ),
    System(
        "torchvision ImageFolder",
        "originals",
        image_folder,
        ("torchvision",),
        f"reads the originals (600×450, quality 100), not packed ones, as its users do; {_PIL_NOTE}",
        encoding="originals",
    ),
    System("MosaicML streaming", "mds", _streaming, ("mosaicml-streaming",), _PIL_NOTE),
    System(
        "LitData",
        "litdata",
        _litdata,
        ("litdata",),
        "decodes whole images with torchvision's decode_jpeg and crops and resizes tensors, in worker processes",
    ),
)

SYSTEMS: dict[str, System] = {s.name: s for s in (*OURS, *OURS_ON_GPU, *FFCV, *DALI, *TORCH, *SPDL, *CEILINGS)}
"""Every system by its name, in the order of the tables."""

NOT_IN_QUICK = (
    "dermscale native jpg, 1 thread",
    "dermscale native raw, 1 thread",
    "dermscale native proportion",
    "dermscale dali jpg (on the CPU)",
    "dermscale resident (on the CPU)",
    "FFCV proportion",
)
"""Left out of the short version: sets that are half raw, engines on one thread, and engines for a GPU on a CPU."""


def set_up(name: str, work: Work) -> Running:
    """Make a system's data where it is not there yet, open it, run one epoch, and check the first batch of it.

    Raises MissingPeerError naming what is not installed, WrongBatchError where the output is not what was asked for.
    """
    system = SYSTEMS[name]
    need(system.packages)
    mean, _ = stats(work)
    epoch = system.open(work, prepared(system.form, work))

    def once() -> int:
        return sum(len(images) for images, _ in epoch())

    checked = 0
    for batch in epoch():
        if not checked and not system.ceiling:
            check_batch(batch, work, mean)
        checked += len(batch[0])
    if not checked:
        raise WrongBatchError("no batch came")
    return Running(once, system.before(epoch) if system.before else lambda: None)


def need(packages: Sequence[str]) -> None:
    """Raise MissingPeerError where one of these distributions is not installed, saying how to get it."""
    absent = []
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            absent.append(package)
    if absent:
        raise MissingPeerError(f"{', '.join(absent)} not installed: run `make peers`, use .venv-peers/bin/python")
