"""A folder as a bucket on an S3 server of this machine: read only, with added latency, and with a bound on its speed.

It stands for moto's server with a proxy before it. moto alone took more than four times this server's CPU time for each
byte, on the cores that the loaders need too; here the kernel sends the files. It knows HEAD, and GET with one range or
none, and does not look at signatures.
"""

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO
from urllib.request import urlopen

NAME = "bucket"
"""The bucket; any other name will do."""
_SENT = "/sent"
_CHUNK_BYTES = 1 << 18


def environment(endpoint: str) -> dict[str, str]:
    """The environment variables that lead the clients of S3 to a server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "S3_ENDPOINT_URL": endpoint,  # of MosaicML Streaming
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def sent_bytes(endpoint: str) -> int:
    """Bytes of files that a server has sent so far."""
    with urlopen(endpoint + _SENT) as answer:
        return int(answer.read())


@contextmanager
def serving(folder: Path, latency_s: float, bytes_per_s: float) -> Iterator[str]:
    """The endpoint of a server in a process of its own, which ends with this one.

    latency_s: from a request to its answer. bytes_per_s: of all answers together.
    """
    mine, its = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve, args=(its, folder, latency_s, bytes_per_s), name="bucket")
    process.start()
    its.close()
    try:
        yield mine.recv()
    finally:
        mine.close()
        process.join()


def _serve(pipe: Connection, folder: Path, latency_s: float, bytes_per_s: float) -> None:
    """The code of the process: serve until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    with _Server(folder, latency_s, bytes_per_s) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pipe.send(f"http://127.0.0.1:{server.server_address[1]}")
        pipe.poll(None)
        server.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, latency_s: float, bytes_per_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.latency_s, self.sent = folder, latency_s, 0
        self._bytes_per_s, self._free, self._lock = bytes_per_s, 0.0, threading.Lock()

    def wait_for(self, count: int) -> None:
        """Wait until so many bytes more may be sent."""
        with self._lock:
            self.sent += count
            now = time.monotonic()
            self._free = max(self._free, now) + count / self._bytes_per_s
            wait_s = self._free - now
        time.sleep(wait_s)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news here."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == _SENT:
            text = str(self.server.sent).encode()
            self._head(200, len(text))
            self.wfile.write(text)
            return
        time.sleep(self.server.latency_s)
        try:
            with (self.server.folder / path.lstrip("/").partition("/")[2]).open("rb") as file:
                self._send(file)
        except OSError as error:
            if isinstance(error, ConnectionError):
                raise
            text = b"<Error><Code>NoSuchKey</Code></Error>"
            self._head(404, len(text))
            if self.command != "HEAD":
                self.wfile.write(text)

    do_HEAD = do_GET  # noqa: N815

    def _head(self, status: int, size: int, **headers: str) -> None:
        self.send_response(status)
        # A client that is forked with an open connection, as MosaicML Streaming's is, mixes up the answers on it. TLS
        # would notice that.
        self.send_header("Connection", "close")
        for name, value in ({"Content-Length": str(size), "Content-Type": "application/xml"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _send(self, file: IO[bytes]) -> None:
        """The answer: a file, or the range of it that is asked for."""
        about = os.fstat(file.fileno())
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        end = min(int(wanted[2]) + 1, about.st_size) if wanted and wanted[2] else about.st_size
        headers = {"ETag": f'"{about.st_mtime_ns:x}-{about.st_size:x}"', "Accept_Ranges": "bytes"}
        headers |= {"Last_Modified": formatdate(about.st_mtime, usegmt=True), "Content_Type": "binary/octet-stream"}
        if wanted:
            headers["Content_Range"] = f"bytes {first}-{end - 1}/{about.st_size}"
        self._head(206 if wanted else 200, end - first, **headers)
        while self.command == "GET" and first < end:
            count = min(_CHUNK_BYTES, end - first)
            self.server.wait_for(count)
            first += self.connection.sendfile(file, first, count)
