"""Stands in for `train.study.worker.work` where scheduling is tested: a cell's seed says what becomes of it."""

import json
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from train.study.worker import At, Ended, Order

KILLED, FAILED, CRASHED, SLOW, SILENT = 101, 102, 103, 104, 105


def work(pipe: Connection, gpu: str | None, log: Path, started: float) -> None:
    """Answer orders without training; every finished cell leaves its process, device and order in trained.json."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    while True:
        try:
            order: Order | None = pipe.recv()
        except EOFError:
            return
        if order is None:
            return
        seed = order.config.seed
        if seed == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed == CRASHED:
            os._exit(3)
        if seed == FAILED:
            pipe.send(Ended("failed", error="the loss is nan at step 3"))
            continue
        while seed in (SLOW, SILENT):
            pipe.send(At("epoch 1/2", 1, 2))
            time.sleep(0.05)
            if stopping and seed == SLOW:
                pipe.send(Ended("stopped", error="stopped at step 1"))
                return
        order.out.mkdir(parents=True)
        told = {"pid": os.getpid(), "gpu": gpu, "model": order.config.model, "ahead": order.images_ahead}
        told["unwanted"] = order.unwanted
        (order.out / "trained.json").write_text(json.dumps(told))
        time.sleep(0.02)
        score = {"value": 0.5, "low": 0.4, "high": 0.6}
        pipe.send(Ended("finished", {"seconds": {"train": 0.01}, "test": {"balanced_accuracy": score}}))
