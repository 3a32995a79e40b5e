"""SPDL: a pipeline of threads that decodes, crops and resizes with FFmpeg, as its image example does."""

# pyright: reportMissingImports=false
# The peers live in an environment of their own (benchmarks/install_peers.sh).

from collections.abc import Iterator
from pathlib import Path

from benchmarks.datasets import PACKED, Job, packed_files
from benchmarks.peers.system import RATIO, SCALE, Batch, Epoch, System


def _open(job: Job, folder: Path) -> Epoch:
    import random

    import spdl.io
    import torch
    from spdl.pipeline import PipelineBuilder
    from torchvision.transforms import RandomResizedCrop

    files = packed_files(job)
    side = job.resolution_px
    # SPDL loads its library at the first call; two threads that make it at once abort ("InitGoogleLogging() twice").
    spdl.io.demux_image(str(files[0][0]))

    def load(item: tuple[Path, int, tuple[int, int]]) -> tuple[object, int]:
        path, label, (height, width) = item
        top, left, h, w = RandomResizedCrop.get_params(torch.empty(1, height, width), list(SCALE), list(RATIO))
        mirror = "hflip," if random.random() < 0.5 else ""
        filters = f"crop={w}:{h}:{left}:{top},scale={side}:{side}:flags=bilinear,{mirror}format=pix_fmts=rgb24"
        return spdl.io.decode_packets(spdl.io.demux_image(str(path)), filter_desc=filters), label

    def collate(items: list[tuple[object, int]]) -> Batch:
        frames = spdl.io.convert_frames([frame for frame, _ in items])  # type: ignore[arg-type]
        return spdl.io.to_torch(frames), torch.tensor([label for _, label in items])

    from PIL import Image

    sized = []
    for path, label in files:
        with Image.open(path) as image:
            sized.append((path, label, image.size[::-1]))

    def epoch() -> Iterator[Batch]:
        random.shuffle(sized)
        pipeline = (
            PipelineBuilder()
            .add_source(sized)
            .pipe(load, concurrency=job.workers)
            .aggregate(job.batch_size, drop_last=True)
            .pipe(collate)
            .add_sink(3)
            .build(num_threads=job.workers, max_failures=0)
        )
        with pipeline.auto_stop():
            yield from pipeline

    return epoch


SPDL = (
    System(
        "SPDL",
        PACKED,
        _open,
        ("spdl",),
        "has no format of its own: reads the packed JPEG files; decodes whole images with FFmpeg, whose crop filter "
        "snaps boxes to even pixels; mirrors left-right only; a new pipeline per epoch; uint8 (N, S, S, 3)",
    ),
)
