"""A local web page: drop an image in, see its probabilities, where the evidence lies, and similar training lesions.

python -m train.serve --run runs/resnet18_f1_s0_u0        # then open http://127.0.0.1:7860

Only this machine can reach the page. An upload is deleted as soon as it has been judged. Research software, not a
medical device.
"""

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.common import cli
from shards.common.errors import DermscaleError, UsageError

if TYPE_CHECKING:
    from train.inference.worker import Opinion

HOST = "127.0.0.1"
_STARTED = time.perf_counter()


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--run", "folder", required=True, type=click.Path(path_type=Path), help="Folder of a finished run.")
@click.option(
    "--data", type=click.Path(path_type=Path), show_default="the run's own", help="Shard set of the training lesions."
)
@click.option("--port", default=7860, type=click.IntRange(1, 65_535), help=f"Port on {HOST}.")
@click.option("--max-upload-mb", default=20, type=click.IntRange(1, 300), help="Larger files are refused.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
def main(folder: Path, data: Path | None, port: int, max_upload_mb: int, device: str) -> int:
    """Serve a web page on this machine that judges images. Research software, not a medical device.

    The first start computes the features of the training lesions in the background and keeps them in the run folder.
    """
    _check_port(port)
    signal.signal(signal.SIGTERM, _end)
    with tempfile.TemporaryDirectory(prefix="dermscale-uploads-") as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY"), HOST)))
        serve(folder, data, port, max_upload_mb, device)
    return 0


def serve(folder: Path, data: Path | None, port: int, max_upload_mb: int, device: str) -> None:
    """Serve until Ctrl-C. Raises DermscaleError where the run cannot be loaded."""
    from train.inference import worker as consult
    from train.inference.notice import NOTICE

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        starting = worker.submit(consult.start, folder, data, device)
        page, style = _import_page()  # while the worker imports torch
        try:
            started = starting.result()
        except BrokenExecutor:
            raise DermscaleError("the process of the model ended while it was loading; is the memory full?") from None
        try:
            blocks = page(partial(ask, worker), started, NOTICE)
            blocks.queue(max_size=20).launch(
                server_name=HOST,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=max_upload_mb * 1_000_000,
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                enable_monitoring=False,
                css=style(),
            )
            with contextlib.suppress(KeyboardInterrupt):  # from the line on that says what Ctrl-C does
                click.echo(NOTICE, err=True)
                seconds = time.perf_counter() - _STARTED
                click.echo(f"http://{HOST}:{port} is ready after {seconds:.1f} s; Ctrl-C ends it")
                sys.stdout.flush()
                threading.Event().wait()
            blocks.close(verbose=False)
        finally:
            with contextlib.suppress(BrokenExecutor):
                worker.submit(consult.stop)


def ask(worker: ProcessPoolExecutor, image: bytes) -> "Opinion | str":
    """The model's opinion on an image file, or the reason why there is none."""
    from shards.encode import BadImageError
    from train.inference import worker as consult

    try:
        return worker.submit(consult.answer, image).result()
    except BadImageError as error:
        return str(error)
    except MemoryError:
        return "does not fit into the memory"
    except DermscaleError as error:
        return f"could not be judged: {error}"
    except BrokenExecutor:
        return "could not be judged: the process of the model has ended; start the page again"


def _import_page() -> tuple[Any, Any]:
    """The functions of the Gradio page, with Gradio imported. Raises DermscaleError where it is not installed."""
    try:
        with cli.importing():
            import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise DermscaleError(f"{error.name} is not installed: pip install 'dermscale[serve]'") from None
    from train.inference.page import build, style

    return build, style


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _check_port(port: int) -> None:
    """Raise UsageError where another program listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UsageError(f"--port {port} cannot be had ({error.strerror}): choose another") from None


if __name__ == "__main__":
    cli.run(main)
