"""A local web page: drop an image to see its probabilities, a map of the evidence, and similar training lesions.

python -m train.serve --run runs/resnet18_f1_s0_u0        # then open http://127.0.0.1:7860

Only this machine can open the page, and no other page in its browser can use it. An uploaded file is deleted as soon as
its results are shown. Research software, not a medical device.
"""

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shards.common import cli
from shards.common.errors import DermscaleError, UsageError, one_line
from shards.common.machine import available_cores
from shards.store import Place
from train.inference.options import network_options

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from train.inference.worker import Answer

HOST = "127.0.0.1"
_STARTED = time.perf_counter()


@click.command(cls=cli.Command, context_settings={"show_default": True, "max_content_width": 120})
@network_options
@click.option(
    "--data",
    type=Place(),
    show_default="the run's own",
    help="Shard set of the training lesions, which are shown if they are similar.",
)
@click.option("--port", default=7860, type=click.IntRange(1, 65_535), help=f"Port on {HOST}. Two pages need two ports.")
@click.option(
    "--max-upload-mb",
    default=20,
    type=click.IntRange(1, 300),
    help="Larger files are refused. A larger limit lets one upload take more memory and disk.",
)
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="Also answer requests that name this host, for a proxy before the page. Can be repeated.",
)
def main(
    folders: tuple[Path, ...],
    data: str | Path | None,
    port: int,
    max_upload_mb: int,
    hosts: tuple[str, ...],
    device: str,
    memory_format: str,
    threads: int | None,
) -> int:
    """Serve a web page on this machine that predicts images. Research software, not a medical device.

    The first start computes the features of the training lesions in the background and saves them in the run folder.
    Browsers that have opened the page come before programs, which wait one at a time; others are told to try again.
    """
    from train.inference.guard import host_name

    if unclear := [host for host in hosts if not host_name(host)]:
        raise UsageError(f"--allow-host {unclear[0]}: is not the name of a host; give one such as derma.example.org")
    signal.signal(signal.SIGTERM, _exit)
    limited = available_cores() < len(os.sched_getaffinity(0)) and "OMP_NUM_THREADS" not in os.environ
    if threads is not None or limited:
        os.environ["OMP_NUM_THREADS"] = str(threads or available_cores())  # for the model process, which imports torch
    with _listening(port) as listener, tempfile.TemporaryDirectory(prefix="dermscale-uploads-") as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"  # all of them become a table after each answer
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):  # nothing here leaves this machine
            os.environ.pop(name, None)
            os.environ.pop(name.upper(), None)
        serve(folders, data, listener, max_upload_mb, map(host_name, hosts), device, memory_format)
    return 0


def serve(
    folders: Sequence[Path],
    data: str | Path | None,
    listener: socket.socket,
    max_upload_mb: int,
    hosts: Iterable[str],
    device: str,
    memory_format: str = "auto",
) -> None:
    """Serve until Ctrl-C. Raises DermscaleError if the run cannot be loaded.

    listener: a socket that listens. hosts: names that requests may give this machine, beside those of the loopback.
    """
    from train.inference import worker

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        starting = process.submit(worker.start, folders, data, device, memory_format)
        _import_gradio()  # while the other process imports torch
        from train.inference import page
        from train.inference.guard import Guard
        from train.inference.output import NOTICE

        try:
            abouts, credit = starting.result()
        except BrokenExecutor:
            raise DermscaleError("the model process ended while it loaded the run; is the memory full?") from None
        try:
            app = page.application(partial(ask, process), abouts, credit, max_upload_mb * 1_000_000)
            with _answering(Guard(app, hosts), listener), contextlib.suppress(KeyboardInterrupt):
                # from the line on that tells the user to press Ctrl-C
                click.echo(NOTICE, err=True)
                seconds = time.perf_counter() - _STARTED
                address = f"http://{HOST}:{listener.getsockname()[1]}"
                click.echo(f"{address} is ready after {seconds:.1f} s; press Ctrl-C to stop")
                sys.stdout.flush()
                while True:  # a signal that reaches another thread does not wake this one
                    time.sleep(1)
        finally:
            with contextlib.suppress(BrokenExecutor):
                process.submit(worker.stop)


@contextlib.contextmanager
def _answering(app: "ASGIApp", listener: socket.socket) -> Iterator[None]:
    """Answer requests in a thread until the block ends."""
    import uvicorn

    from train.inference.limits import CONNECTIONS, impatient

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=impatient(),
            log_level="warning",
            ws="none",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, args=([listener],), name="answering", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise DermscaleError("the page could not be started; the lines above say why")
        time.sleep(0.005)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(5)


def ask(process: ProcessPoolExecutor, image: bytes) -> "Answer | str":
    """The results for an image file, or the reason why there are none. It goes on after the name of the file."""
    from shards.encode import BadImageError
    from train.inference import worker

    try:
        return process.submit(worker.answer, image).result()
    except BadImageError as error:
        return str(error)
    except MemoryError:
        return "does not fit into memory"
    except BrokenExecutor:
        return "could not be predicted: the model process has ended; start this program again"
    except (DermscaleError, RuntimeError) as error:  # a full GPU is a RuntimeError
        return f"could not be predicted: {one_line(error, 200)}"


def _import_gradio() -> None:
    """Import Gradio. Raises DermscaleError if it is not installed."""
    try:
        with cli.importing():
            import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise DermscaleError(f"{error.name} is not installed: pip install 'dermscale[serve]'") from None


def _exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _listening(port: int) -> socket.socket:
    """A socket that listens on the port. Raises UsageError if another program does."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UsageError(f"--port {port} cannot be used ({reason}): choose another") from None


if __name__ == "__main__":
    cli.run(main)
