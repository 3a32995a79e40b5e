"""Work on threads, with results in order and a limited number of items ahead of the consumer."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from shards.common.errors import DermscaleError

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Pending(Protocol[R_co]):
    """Work under way: a `concurrent.futures.Future`, or another object with these methods of one."""

    def result(self) -> R_co:
        """Wait for the work; return its result or raise its error."""
        ...

    def cancel(self) -> Any:
        """Stop what has not begun."""
        ...

    def cancelled(self) -> bool:
        """Whether nothing of it has begun or will."""
        ...

    def exception(self) -> Any:
        """Wait for the work; return its error."""
        ...


def read_ahead(
    submit: Callable[[T], Sequence[Pending[R]]], items: Iterable[T], window: int
) -> Generator[tuple[T, list[R]], None, None]:
    """Each item with the results of its futures, in order.

    submit: hands an item to a pool of threads. window: the most items in progress at once. An item is taken from
    `items` when there is room for it. Raises what a future raises. Closing the generator (`contextlib.closing`)
    cancels what has not started and waits for the rest, so that nothing writes any more. A forked child has none of the
    threads, so it waits for nothing: it raises DermscaleError.
    """
    process = os.getpid()
    pending: deque[tuple[T, Sequence[Pending[R]]]] = deque()
    source = iter(items)
    try:
        while True:
            while len(pending) < window:
                try:
                    item = next(source)
                except StopIteration:
                    break
                pending.append((item, submit(item)))
                del item  # the caller may count its references
            if not pending:
                return
            if process != os.getpid():
                raise DermscaleError(
                    "this process was forked while a loader was being iterated: start its iteration again in the child"
                )
            item, futures = pending.popleft()
            results = [future.result() for future in futures]
            del futures
            yield item, results
            del item, results
    finally:
        under_way = [future for _, futures in pending for future in futures] if process == os.getpid() else []
        for future in under_way:
            future.cancel()
        for future in under_way:
            if not future.cancelled():
                future.exception()  # waits for it
