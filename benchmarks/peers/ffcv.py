"""FFCV (Leclerc et al., CVPR 2023): its writer and its loader, used as its documentation shows."""

# pyright: reportMissingImports=false
# The peers live in an environment of their own (benchmarks/install_peers.sh).

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.datasets import QUALITY, Format, Job, originals, packed_size, samples
from benchmarks.peers.system import RATIO, SCALE, Epoch, System
from shards.common.errors import DataError

_NOTE = (
    "decodes whole images with the system's libjpeg-turbo and the fast integer DCT, resizes by area interpolation "
    "(identical to bilinear where it enlarges), mirrors left-right only; batches are (N, 3, S, S) views of (N, S, S, 3)"
)


class Originals:
    """The samples as FFCV's writer takes them: an indexable of (image (H, W, 3) uint8 RGB, label)."""

    def __init__(self, files: list[tuple[Path, int]]) -> None:
        self.files = files

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """One sample, decoded by OpenCV."""
        import cv2

        path, label = self.files[index]
        image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise DataError(f"{path}: cannot be decoded")
        return image, label


def max_resolution(height: int, width: int, packed_px: int) -> float:
    """The `max_resolution` with which FFCV's writer gives the size that everyone else packs.

    It cuts both sides to whole pixels where the others round (600×450 at 341: 341×255 instead of 341×256), so a
    fraction of a pixel more is asked for. Raises DataError where no value gives that size.
    """
    if max(height, width) <= packed_px:
        return float(packed_px)
    wanted = packed_size(height, width, packed_px)
    longer = max(height, width)
    ratio = max(wanted[0] / height, wanted[1] / width) * (1 + 1e-9)
    if (int(ratio * height), int(ratio * width)) != wanted:
        raise DataError(f"FFCV cannot pack {width}x{height} px as {wanted[1]}x{wanted[0]} px")
    return ratio * longer


def write_beton(job: Job, folder: Path, write_mode: str) -> None:
    """Pack the originals as `set.beton` in a folder, with FFCV's DatasetWriter."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from PIL import Image

    with Image.open(originals(job)[0][0]) as first:  # all of HAM10000's have one size
        limit = max_resolution(first.height, first.width, job.packed_px)
    image = RGBImageField(write_mode=write_mode, max_resolution=limit, jpeg_quality=QUALITY)  # type: ignore[arg-type]
    writer = DatasetWriter(str(folder / "set.beton"), {"image": image, "label": IntField()}, num_workers=job.workers)
    writer.from_indexed_dataset(Originals([(path, label) for _, path, label in samples(job)]))


def beton_payload_bytes(folder: Path) -> int:
    """Bytes of all encoded images, without the unused rest of the pages."""
    from ffcv.reader import Reader

    return int(Reader(str(folder / "set.beton")).alloc_table["size"].sum())


def read_beton(folder: Path) -> Iterator[np.ndarray]:
    """The packed images in their order, (H, W, 3) uint8 RGB, as FFCV's own decoder gives them."""
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    pipelines = {"image": [SimpleRGBImageDecoder()], "label": None}
    loader = Loader(
        str(folder / "set.beton"),
        batch_size=1,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines=pipelines,
    )
    for (images,) in loader:
        yield np.array(images[0])


def _open(job: Job, folder: Path) -> Epoch:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    side = (job.resolution_px, job.resolution_px)
    loader = Loader(
        str(folder / "set.beton"),
        batch_size=job.batch_size,
        num_workers=job.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        seed=0,
        pipelines={
            "image": [
                RandomResizedCropRGBImageDecoder(side, scale=SCALE, ratio=RATIO),
                RandomHorizontalFlip(),
                ToTensor(),
                ToTorchImage(),
            ],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )
    return lambda: iter(loader)


def _system(write_mode: str) -> System:
    return System(
        name=f"FFCV {write_mode}",
        format=Format(f"beton-{write_mode}", lambda job, folder: write_beton(job, folder, write_mode)),
        open=_open,
        packages=("ffcv",),
        note=_NOTE if write_mode == "jpg" else "",
        encoding=write_mode,
    )


FFCV = tuple(_system(write_mode) for write_mode in ("jpg", "raw", "proportion"))
