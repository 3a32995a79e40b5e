"""Every loader of the comparison, and how one is set up in its process."""

from benchmarks.datasets import Job, prepared, stats
from benchmarks.peers.dali import DALI
from benchmarks.peers.ffcv import FFCV
from benchmarks.peers.ours import CEILINGS, OURS, OURS_ON_GPU
from benchmarks.peers.pytorch import PYTORCH
from benchmarks.peers.spdl import SPDL
from benchmarks.peers.system import System, WrongBatchError, check_batch, need
from benchmarks.worker import Running

SYSTEMS: dict[str, System] = {s.name: s for s in (*OURS, *OURS_ON_GPU, *FFCV, *DALI, *PYTORCH, *SPDL, *CEILINGS)}
"""Every system by its name, in the order of the tables."""


def set_up(name: str, job: Job) -> Running:
    """Make a system's data if it is not there yet, open it, run one epoch, and check its first batch.

    Raises MissingPeerError naming what is not installed, WrongBatchError where the output is not what was asked for.
    """
    system = SYSTEMS[name]
    need(system.packages)
    mean, _ = stats(job)
    epoch = system.open(job, prepared(system.format, job))

    def once() -> int:
        return sum(len(images) for images, _ in epoch())

    count = 0
    for batch in epoch():
        if not count and not system.ceiling:
            check_batch(batch, job, mean)
        count += len(batch[0])
    if not count:
        raise WrongBatchError("no batch came")
    return Running(once, system.before(epoch) if system.before else lambda: None)
