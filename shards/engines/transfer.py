"""Host to device: one asynchronous uint8 copy per batch, from the pinned memory that threads decode into; and how far
the host may run ahead of the device."""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

_MOST_COPIES, _MOST_BYTES = 4, 256 << 20
"""Copies under way at once: at most so many, and bytes; at least one. Their buffers are page-locked memory, which no
other program can have, and so are prefetch + 2 more of an engine. 1,024 images of 224 px take 154 MB, for which PyTorch
locks 268 MB, a power of two: 1.3 GB in all."""

_MOST_AHEAD = 3
"""Batches with unfinished work on the device beside the one that is being queued: enough for the device to go on."""


class Ahead:
    """Keeps the host from queuing work with many batches, because each needs its memory until its work is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends: deque[torch.cuda.Event] = deque()

    def wait(self) -> None:
        """To be called when all work with a batch is queued: wait for the work with the one `_MOST_AHEAD` before it."""
        end = torch.cuda.Event(blocking=True)  # does not take a core while it waits
        end.record(torch.cuda.current_stream(self._device))
        self._ends.append(end)
        if len(self._ends) > _MOST_AHEAD:
            self._ends.popleft().synchronize()


def pinned_buffer(shape: tuple[int, ...]) -> np.ndarray:
    """Page-locked host memory as a uint8 array, from which CUDA copies without waiting."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()


def to_device(buffers: Iterable[np.ndarray], device: str) -> Iterator[torch.Tensor]:
    """Copy pinned (n, S, S, 3) uint8 buffers to `device` on a separate stream; yields (n, 3, S, S) channels-last.

    The copy of a batch starts one batch before it is yielded, so that it overlaps the step before. The consumer's
    stream waits for it on the device; the host waits only at the end, and for the oldest of too many copies. A buffer
    is kept until its copy is done.
    """
    copies = torch.cuda.Stream(device)
    busy: deque[tuple[np.ndarray, torch.cuda.Event]] = deque()
    waiting: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
    try:
        for buffer in buffers:
            most = min(_MOST_COPIES, max(1, _MOST_BYTES // max(buffer.nbytes, 1)))
            while busy and (len(busy) >= most or busy[0][1].query()):
                busy.popleft()[1].synchronize()
            with torch.cuda.stream(copies):
                images = torch.from_numpy(buffer).to(device, non_blocking=True)
                done = torch.cuda.Event()
                done.record(copies)
            busy.append((buffer, done))
            waiting.append((images, done))
            if len(waiting) > 1:
                yield hand_over(*waiting.popleft(), device)
        while waiting:
            yield hand_over(*waiting.popleft(), device)
    finally:  # at the end, or if the consumer stops early: the pool may refill these buffers right after
        for _, done in busy:
            done.synchronize()


def hand_over(images: torch.Tensor, done: torch.cuda.Event, device: str) -> torch.Tensor:
    """(n, S, S, 3) → (n, 3, S, S) channels-last. Makes the consumer's stream wait for the copy, and tells the allocator
    that this stream uses the memory."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(done)
    images.record_stream(stream)
    return images.permute(0, 3, 1, 2)
