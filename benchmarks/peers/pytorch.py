"""The loaders that are built on PyTorch's DataLoader: torchvision's ImageFolder, webdataset, MosaicML and LitData."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# The peers live in an environment of their own (benchmarks/install_peers.sh); webdataset's names are made at run time.

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.datasets import ORIGINALS, PACKED, Format, Job, packed_files
from benchmarks.peers.system import RATIO, SCALE, Batch, Epoch, System

# ------------------------------------------------------------------ what they read


def _write_tars(job: Job, folder: Path) -> None:
    """Tars with one batch of the packed JPEG files each, by webdataset's ShardWriter: any number of workers gets
    the same number of batches, so it gets the same number of tars."""
    from webdataset.writer import ShardWriter

    with ShardWriter(f"file:{folder}/%05d.tar", maxcount=job.batch_size, verbose=0) as sink:
        for path, label in packed_files(job):
            sink.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": str(label)})


def mds(name: str, images: Format) -> Format:
    """MosaicML's MDS with JPEG files as they are, by its MDSWriter, in shards of 64 MiB, its default."""

    def write(job: Job, folder: Path) -> None:
        from PIL import Image
        from streaming import MDSWriter

        with MDSWriter(out=str(folder / "set"), columns={"image": "jpeg", "label": "int"}) as out:
            for path, label in packed_files(job, images):
                with Image.open(path) as image:
                    out.write({"image": image, "label": label})

    return Format(name, write)


def _litdata_sample(item: tuple[str, int]) -> dict:
    """One sample for LitData; its JPEG serializer keeps an opened file's bytes as they are."""
    from PIL import Image

    return {"image": Image.open(item[0]), "label": item[1]}


def litdata_chunks(name: str, images: Format, even: bool = False) -> Format:
    """LitData's chunks of 64 MB with JPEG files as they are, by its `optimize`.

    even: smaller chunks of one number of images, so that each worker has as many, and none is of two workers. From a
    store, LitData 0.2.76 reads such a chunk from its cache anew for each image, and may fetch it twice.
    """

    def write(job: Job, folder: Path) -> None:
        import multiprocessing

        import litdata

        inputs = [(str(path), label) for path, label in packed_files(job, images)]
        size: dict[str, Any] = {"chunk_bytes": "64MB"}
        if even:
            total = sum(Path(path).stat().st_size for path, _ in inputs)
            size = {"chunk_size": len(inputs) // (job.workers * math.ceil(total / 64e6 / job.workers))}
        start_method = multiprocessing.get_start_method()
        litdata.optimize(
            fn=_litdata_sample,
            inputs=inputs,
            output_dir=str(folder / "set"),
            num_workers=1,
            verbose=False,
            **size,
        )
        multiprocessing.set_start_method(start_method, force=True)  # `optimize` changes it for the whole process

    return Format(name, write, depends_on=("packed_px", "workers") if even else ("packed_px",))


TARS = Format("tars", _write_tars, depends_on=("packed_px", "batch_size"))

# ------------------------------------------------------------------ how they load


def _transform(job: Job) -> Any:
    """PIL image → (3, S, S) uint8, as torchvision's reference recipe crops and flips."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(job.resolution_px, scale=SCALE, ratio=RATIO),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


def _epochs(loader: Any) -> Epoch:
    def epoch() -> Iterator[Batch]:
        for batch in loader:
            yield (batch["image"], batch["label"]) if isinstance(batch, dict) else (batch[0], batch[1])

    return epoch


def _loading(job: Job) -> dict[str, Any]:
    """What every DataLoader of a map-style data set is told."""
    sizes = {"batch_size": job.batch_size, "num_workers": job.workers}
    return sizes | {"drop_last": True, "persistent_workers": True}


def image_folder(job: Job, folder: Path, pin: bool = False) -> Epoch:
    """torchvision's ImageFolder and PyTorch's DataLoader: what most people start with.

    pin: batches come in page-locked memory, from which a GPU copies while the CPU goes on.
    """
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    data = ImageFolder(str(folder), _transform(job))
    return _epochs(DataLoader(data, shuffle=True, pin_memory=pin, **_loading(job)))


def _webdataset(job: Job, folder: Path) -> Epoch:
    import webdataset as wds

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    transform = _transform(job)
    data = (
        wds.WebDataset(tars, shardshuffle=len(tars), nodesplitter=wds.split_by_node, workersplitter=wds.split_by_worker)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(job.batch_size, partial=False)
    )
    return _epochs(wds.WebLoader(data, batch_size=None, num_workers=job.workers, persistent_workers=True))


def streaming(job: Job, **place: str) -> Epoch:
    """MosaicML's StreamingDataset in PyTorch's DataLoader. place: its `local`, and its `remote` if it is in a store."""
    import atexit
    from multiprocessing.util import Finalize

    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    # It frees its shared memory in exit handlers, which a process of multiprocessing does not run.
    Finalize(None, atexit._run_exitfuncs, exitpriority=0)
    transform = _transform(job)

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return transform(sample["image"]), sample["label"]

    data = Images(shuffle=True, batch_size=job.batch_size, **place)
    return _epochs(DataLoader(data, **_loading(job)))


def litdata(job: Job, **place: Any) -> Epoch:
    """LitData's StreamingDataset and StreamingDataLoader. place: its `input_dir`, and what else says where that is."""
    from litdata import StreamingDataLoader, StreamingDataset
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(job.resolution_px, scale=SCALE, ratio=RATIO, antialias=True)
    flip = v2.RandomHorizontalFlip()

    def transform(sample: Any) -> Any:
        return flip(crop(sample["image"])), sample["label"]

    data = StreamingDataset(shuffle=True, drop_last=True, transform=transform, **place)
    return _epochs(StreamingDataLoader(data, **_loading(job)))


_PIL_NOTE = "decodes whole images with Pillow and resizes with its antialiased bilinear filter, in worker processes"

PYTORCH = (
    System(
        "webdataset",
        TARS,
        _webdataset,
        ("webdataset",),
        f"{_PIL_NOTE}; shuffles within a buffer of 1,000; each worker reads its own tars and drops its own last batch",
    ),
    System(
        "torchvision ImageFolder",
        ORIGINALS,
        image_folder,
        ("torchvision",),
        f"reads the originals (600×450, quality 100), not packed ones, as its users do; {_PIL_NOTE}",
        encoding="originals",
    ),
    System(
        "MosaicML streaming",
        mds("mds", PACKED),
        lambda job, folder: streaming(job, local=str(folder / "set")),
        ("mosaicml-streaming",),
        _PIL_NOTE,
    ),
    System(
        "LitData",
        litdata_chunks("litdata", PACKED),
        lambda job, folder: litdata(job, input_dir=str(folder / "set")),
        ("litdata",),
        "decodes whole images with torchvision's decode_jpeg and crops and resizes tensors, in worker processes",
    ),
)
