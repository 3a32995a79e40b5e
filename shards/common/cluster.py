"""A Ray cluster: the options that name it, the connection to it, and how its errors become one line.

Ray (https://docs.ray.io) finds the nodes, starts tasks and actors where there is room, and notices lost ones.
"""

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from shards.common.errors import DermscaleError, UsageError, one_line
from shards.common.machine import available_cores

RETRIES = 4
"""How often work that a node or a process was lost with is started again."""
_ANSWER_S = 5.0
_OBJECTS_BYTES = 256 << 20
"""Memory for objects of a cluster that this command starts itself. What does not fit goes to the disk."""


def runner_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options `--runner` and `--address` to a command."""
    command = click.option(
        "--address",
        metavar="auto|HOST:PORT",
        help="With --runner ray: a running cluster. auto: the one that this machine is a node of. Without it, a "
        "cluster of this machine alone is started.",
    )(command)
    return click.option(
        "--runner",
        type=click.Choice(("local", "ray")),
        default="local",
        help="local: this machine. ray: the nodes of a Ray cluster.",
    )(command)


@contextmanager
def runner(name: str, address: str | None) -> Iterator[None]:
    """Connect to the cluster that the options name, and start it if need be; do nothing for `local`.

    Raises UsageError if Ray is missing, or no cluster answers.
    """
    if name == "local":
        if address is not None:
            raise UsageError(f"--address {address} names a Ray cluster: add --runner ray")
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise UsageError("--runner ray needs Ray, which is not installed: pip install 'dermscale[ray]'") from None
    if address is not None and address != "auto":
        _reach(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    place: dict[str, Any] = (
        {"address": address}
        if address
        else {
            "address": "local",
            "num_cpus": available_cores(),
            "include_dashboard": False,
            "object_store_memory": _OBJECTS_BYTES,
        }
    )
    # The processes of a cluster that starts here stay when a terminal closes: they end with this command, which first
    # lets its work write checkpoints. A signal that is ignored here is ignored by them too.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ray.init(**quiet, **place)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address is None:
            raise DermscaleError(f"Ray does not start on this machine: {one_line(error, 300)}") from None
        raise _unanswered(address, error) from None
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        if address is None:
            click.echo(f"started a Ray cluster on this machine, {available_cores()} cores; --address names another one")
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise UsageError if nobody listens at HOST:PORT. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not (port.isascii() and port.isdigit()):
        raise UsageError(f"--address {address} is neither auto nor HOST:PORT")
    try:
        socket.create_connection((host, int(port)), _ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise _unanswered(address, error) from None


def _unanswered(address: str, error: Exception) -> UsageError:
    reason = one_line(error, 160)
    return UsageError(
        f"--address {address}: no Ray cluster answers ({reason}); start one with `ray start --head`, or leave it out"
    )


def nodes() -> list[dict[str, float]]:
    """The resources of each node that is alive, by their names in Ray: CPU, GPU."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def result(reference: Any) -> Any:
    """Wait for a task. Raises the task's own error, and DermscaleError if Ray has given it up."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise DermscaleError(
            f"the cluster lost this work {RETRIES + 1} times ({one_line(error, 200)}); see that its nodes have enough "
            "memory and stay, and start again"
        ) from None
