"""DALI's own webdataset reader on the CPU, with its own random crops, as its documentation shows."""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportPrivateImportUsage=false
# pyright: reportGeneralTypeIssues=false
# DALI makes its operators at run time.

from collections.abc import Iterator
from pathlib import Path

from benchmarks.datasets import Job
from benchmarks.peers.pytorch import TARS
from benchmarks.peers.system import RATIO, SCALE, Batch, Epoch, System


def _open(job: Job, folder: Path) -> Epoch:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    tars = sorted(str(path) for path in folder.glob("*.tar"))

    @pipeline_def(batch_size=job.batch_size, num_threads=job.workers, device_id=None, exec_dynamic=True)
    def graph():
        encoded, label = fn.readers.webdataset(
            paths=tars, ext=["jpg", "cls"], random_shuffle=True, initial_fill=1000, name="reader"
        )
        images = fn.decoders.image_random_crop(encoded, random_area=list(SCALE), random_aspect_ratio=list(RATIO))
        images = fn.resize(images, size=[job.resolution_px] * 2, interp_type=types.INTERP_LINEAR, antialias=False)
        images = fn.flip(images, horizontal=fn.random.coin_flip())  # pyright: ignore[reportArgumentType]
        return images, label - 48  # the label is one ASCII digit

    loader = DALIGenericIterator(
        [graph()],  # pyright: ignore[reportArgumentType] - the decorator makes it a Pipeline
        ["images", "labels"],
        reader_name="reader",
        auto_reset=True,
        last_batch_policy=LastBatchPolicy.DROP,
    )

    def epoch() -> Iterator[Batch]:
        for (batch,) in loader:
            yield batch["images"], batch["labels"]

    return epoch


DALI = (
    System(
        "DALI webdataset reader",
        TARS,
        _open,
        ("nvidia-dali-cuda120",),
        "decodes only the crop (`decoders.image_random_crop`), bilinear without antialias; mirrors left-right only; "
        "shuffles within a buffer of 1,000; uint8 (N, S, S, 3)",
    ),
)
