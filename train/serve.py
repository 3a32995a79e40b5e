"""A local web page: drop an image to see its probabilities, a map of the evidence, and similar training lesions.

python -m train.serve --run runs/resnet18_f1_s0_u0        # then open http://127.0.0.1:7860

Only this machine can open the page. An uploaded file is deleted as soon as its results are shown. Research software,
not a medical device.
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
from typing import TYPE_CHECKING

import click

from shards.common import cli
from shards.common.errors import DermscaleError, UsageError, one_line

if TYPE_CHECKING:
    from train.inference.worker import Answer

HOST = "127.0.0.1"
_STARTED = time.perf_counter()


@click.command(cls=cli.Command, context_settings={"show_default": True, "max_content_width": 120})
@click.option("--run", "folder", required=True, type=click.Path(path_type=Path), help="Folder of a finished run.")
@click.option(
    "--data", type=click.Path(path_type=Path), show_default="the run's own", help="Shard set of the training lesions."
)
@click.option("--port", default=7860, type=click.IntRange(1, 65_535), help=f"Port on {HOST}.")
@click.option("--max-upload-mb", default=20, type=click.IntRange(1, 300), help="Larger files are refused.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
def main(folder: Path, data: Path | None, port: int, max_upload_mb: int, device: str) -> int:
    """Serve a web page on this machine that predicts images. Research software, not a medical device.

    The first start computes the features of the training lesions in the background and saves them in the run folder.
    """
    _check_port(port)
    signal.signal(signal.SIGTERM, _exit)
    with tempfile.TemporaryDirectory(prefix="dermscale-uploads-") as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY"), HOST)))
        serve(folder, data, port, max_upload_mb, device)
    return 0


def serve(folder: Path, data: Path | None, port: int, max_upload_mb: int, device: str) -> None:
    """Serve until Ctrl-C. Raises DermscaleError if the run cannot be loaded."""
    from train.inference import worker

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        starting = process.submit(worker.start, folder, data, device)
        _import_gradio()  # while the other process imports torch
        from train.inference import page
        from train.inference.output import NOTICE

        try:
            about, credit = starting.result()
        except BrokenExecutor:
            raise DermscaleError("the model process ended while it loaded the run; is the memory full?") from None
        try:
            blocks = page.build(partial(ask, process), about, credit)
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
                css=page.STYLE,
            )
            with contextlib.suppress(KeyboardInterrupt):  # from the line on that tells the user to press Ctrl-C
                click.echo(NOTICE, err=True)
                seconds = time.perf_counter() - _STARTED
                click.echo(f"http://{HOST}:{port} is ready after {seconds:.1f} s; press Ctrl-C to stop")
                sys.stdout.flush()
                threading.Event().wait()
            blocks.close(verbose=False)
        finally:
            with contextlib.suppress(BrokenExecutor):
                process.submit(worker.stop)


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


def _check_port(port: int) -> None:
    """Raise UsageError if another program listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UsageError(f"--port {port} cannot be used ({error.strerror}): choose another") from None


if __name__ == "__main__":
    cli.run(main)
