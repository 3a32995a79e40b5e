"""FFCV (Leclerc et al., CVPR 2023): its writer and its loader, used as its documentation shows."""

# pyright: reportMissingImports=false
# The peers live in an environment of their own (benchmarks/install_peers.sh).

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.peers.system import QUALITY, RATIO, SCALE, Epoch, System, Work
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
    from benchmarks.datasets import packed_size

    if max(height, width) <= packed_px:
        return float(packed_px)
    wanted = packed_size(height, width, packed_px)
    longer = max(height, width)
    ratio = max(wanted[0] / height, wanted[1] / width) * (1 + 1e-9)
    if (int(ratio * height), int(ratio * width)) != wanted:
        raise DataError(f"FFCV cannot pack {width}x{height} px as {wanted[1]}x{wanted[0]} px")
    return ratio * longer


@cache
def one_max_resolution(work: Work) -> float:
    """The `max_resolution` for all originals, found once a process: FFCV's users know it, so it is no part of packing.

    Raises DataError where images of several sizes need several.
    """
    from PIL import Image

    from benchmarks.datasets import originals

    sizes = set()
    for path, _, _ in originals(work):
        with Image.open(path) as image:
            sizes.add((image.height, image.width))
    limits = {max_resolution(height, width, work.packed_px) for height, width in sizes}
    if len(limits) > 1:
        raise DataError(f"FFCV packs with one max_resolution, and the sizes {sorted(sizes)} need several")
    return limits.pop()


def write_beton(work: Work, file: Path, write_mode: str) -> None:
    """Pack the originals with FFCV's DatasetWriter."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    from benchmarks.datasets import names

    limit = one_max_resolution(work)
    image = RGBImageField(write_mode=write_mode, max_resolution=limit, jpeg_quality=QUALITY)  # type: ignore[arg-type]
    writer = DatasetWriter(str(file), {"image": image, "label": IntField()}, num_workers=work.workers)
    writer.from_indexed_dataset(Originals([(path, label) for _, path, label in names(work)]))


def beton_payload_bytes(file: Path) -> int:
    """Bytes of all encoded images of a file, without the unused rest of its pages."""
    from ffcv.reader import Reader

    return int(Reader(str(file)).alloc_table["size"].sum())


def read_beton(file: Path) -> Iterator[np.ndarray]:
    """The packed images in their order, (H, W, 3) uint8 RGB, as FFCV's own decoder gives them."""
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    pipelines = {"image": [SimpleRGBImageDecoder()], "label": None}
    loader = Loader(
        str(file), batch_size=1, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipelines
    )
    for (images,) in loader:
        yield np.array(images[0])


def _open(work: Work, folder: Path) -> Epoch:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    side = (work.resolution_px, work.resolution_px)
    loader = Loader(
        str(folder / "set.beton"),
        batch_size=work.batch_size,
        num_workers=work.workers,
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
        form=f"beton-{write_mode}",
        open=_open,
        packages=("ffcv",),
        note=_NOTE if write_mode == "jpg" else "",
        encoding=write_mode,
    )


FFCV = tuple(_system(write_mode) for write_mode in ("jpg", "raw", "proportion"))
