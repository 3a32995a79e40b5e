"""Replaces `train.study.worker.work` in tests of the pool: the seed of a cell decides what happens to it."""

import json
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from train.study.worker import Ended, Job, Status

KILLED, FAILED, CRASHED, SLOW, SILENT = 101, 102, 103, 104, 105


def work(pipe: Connection, gpu: str | None, log: Path, started: float) -> None:
    """Answer jobs without training. Each finished cell leaves its process, device and job in trained.json."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    while True:
        try:
            job: Job | None = pipe.recv()
        except EOFError:
            return
        if job is None:
            return
        seed = job.config.seed
        if seed == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed == CRASHED:
            os._exit(3)
        if seed == FAILED:
            pipe.send(Ended("failed", error="the loss is nan at step 3"))
            continue
        while seed in (SLOW, SILENT):
            pipe.send(Status("epoch 1/2", 1, 2))
            time.sleep(0.05)
            if stopping and seed == SLOW:
                pipe.send(Ended("stopped", error="stopped at step 1"))
                return
        job.out.mkdir(parents=True)
        record = {"pid": os.getpid(), "gpu": gpu, "model": job.config.model, "ahead": job.images_ahead}
        record |= {"unwanted": job.unwanted, "per_device": job.per_device}
        (job.out / "trained.json").write_text(json.dumps(record))
        time.sleep(0.02)
        score = {"value": 0.5, "low": 0.4, "high": 0.6}
        pipe.send(Ended("finished", {"seconds": {"train": 0.01}, "test": {"balanced_accuracy": score}}))
