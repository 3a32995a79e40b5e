"""Not a test: a local HTTP server that misbehaves, and what it serves, for the tests of the downloader."""

import hashlib
import io
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

from preprocess import download as dl
from shards.common import fetch as fe

HEADER = "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset\n"


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def picture(name: str) -> bytes:
    """Not a picture, but as incompressible as one."""
    return b"".join(hashlib.sha256(f"{name}{i}".encode()).digest() for i in range(1500))


FILES = {
    "HAM10000_metadata.csv": (
        HEADER + "".join(f"HAM_{i},ISIC_{i},nv,histo,45.0,male,back,rosendahl\n" for i in range(5))
    ).encode(),
    "HAM10000_images_part_1.zip": zip_of({f"ISIC_{i}.jpg": picture(f"{i}") for i in (0, 1, 2)}),
    "HAM10000_images_part_2.zip": zip_of(
        {"inside/": b"", "inside/LICENSE.txt": b"x", "__MACOSX/._ISIC_3.jpg": b"x"}
        | {f"inside/ISIC_{i}.jpg": picture(f"{i}") for i in (3, 4)}
    ),
    "ISIC2018_Task3_Test_Images.zip": zip_of({f"T/ISIC_{i}.jpg": picture(f"{i}") for i in (7, 8)}),
    "ISIC2018_Task3_Test_GroundTruth.zip": zip_of(
        {
            "T/ISIC2018_Task3_Test_GroundTruth.csv": b"image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
            b"ISIC_7,1.0,0.0,0.0,0.0,0.0,0.0,0.0\nISIC_8,0.0,1.0,0.0,0.0,0.0,0.0,0.0\n"
            b"ISIC_0035068,0.0,1.0,0.0,0.0,0.0,0.0,0.0\n",
            "T/LICENSE.txt": b"x",
        }
    ),
}
WHOLE = [
    "HAM10000_images_part_1/ISIC_0.jpg",
    "HAM10000_images_part_1/ISIC_1.jpg",
    "HAM10000_images_part_1/ISIC_2.jpg",
    "HAM10000_images_part_2/ISIC_3.jpg",
    "HAM10000_images_part_2/ISIC_4.jpg",
    "HAM10000_metadata.csv",
]
WHOLE_TEST = [
    "ISIC2018_Task3_Test/ISIC2018_Task3_Test_GroundTruth.csv",
    "ISIC2018_Task3_Test/ISIC2018_Task3_Test_Images/ISIC_7.jpg",
    "ISIC2018_Task3_Test/ISIC2018_Task3_Test_Images/ISIC_8.jpg",
]


def items_of(files: dict[str, bytes]) -> tuple[dl.Item, ...]:
    """The official table with the sizes and hashes of `files`."""
    images = {"HAM10000_images_part_1.zip": 3, "HAM10000_images_part_2.zip": 2, "ISIC2018_Task3_Test_Images.zip": 2}
    items = []
    for item in dl.OFFICIAL:
        name = item.name
        md5 = hashlib.md5(files[name]).hexdigest() if item.md5 else None
        rows = {"MEL": 1, "NV": 2, "BCC": 0, "AKIEC": 0, "BKL": 0, "DF": 0, "VASC": 0} if item.rows else None
        items.append(replace(item, bytes=len(files[name]), md5=md5, images=images.get(name, 0), rows=rows))
    return tuple(items)


class Server(ThreadingHTTPServer):
    """Serves `files`; each request first takes the next word of `script`, which says how to misbehave."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.script = dict(files), []
        self.seen: list[tuple[str, str | None]] = []
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news here."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.seen.append((self.path, wanted))
        word, _, value = (self.server.script.pop(0) if self.server.script else "").partition(":")
        content = self.server.files.get(self.path.lstrip("/"))
        if word == "status" or content is None:
            self.send_response(int(value or 404))
            if value == "503":
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if word == "header":  # one header, as it is; value: status, name and content
            status, name, said = value.split("|")
            self.send_response(int(status))
            self.send_header(name, said)
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = True
            return
        if word == "wrong":
            content = bytes(255 - byte for byte in content)
        start, ranged = 0, False
        match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
        if match and word != "ignore-range":
            start, ranged = int(match[1]), True
        if ranged and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:]
        self.send_response(206 if ranged else 200)
        if ranged:
            first = start + 1 if word == "foreign-range" else start
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if word == "endless":
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            while True:
                self.wfile.write(b"x" * 65536)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if word == "drip":
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if self.server.release.wait(0.01):
                    return
        if word in ("cut", "stall"):
            self.wfile.write(body[: int(value)])
            self.wfile.flush()
            if word == "stall":
                self.server.release.wait(20)
            self.close_connection = True
            return
        self.wfile.write(body)


@contextmanager
def serving() -> Iterator[Server]:
    """A server of FILES until the block ends, and a downloader that reads little at a time."""
    with mock.patch.object(fe, "_CHUNK_BYTES", 4096), Server(FILES) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.release.set()
        running.shutdown()
        thread.join()


def run(server: Server, out: Path, files: dict[str, bytes] = FILES, test_set: bool = True) -> None:
    items = [item for item in items_of(files) if test_set or not item.test]
    dl.download(items, out, server.url, pause_s=0)


def tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
