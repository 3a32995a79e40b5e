"""The web page under load and abuse: it answers or refuses in one line, in bounded memory, and no person waits long."""

import http.client
import json
import os
import re
import secrets
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support.train_runs import small
from tests.torture.conftest import FULL
from tests.torture.victims import has_strace, shared_memory
from tests.train.inference.test_serve import Server, serving
from train.inference.limits import COOKIE, KEPT
from train.inference.neighbours import FILE
from train.loop import train_once

pytestmark = pytest.mark.slow
MOST_BYTES = 1_000_000_000
"""Bound on the own memory (RssAnon) of all processes of the server, as docs/reliability.md states it."""
LARGEST_BYTES = 3_500_000_000
"""The bound while images of 100 megapixels are predicted."""
DELAY_S = 2.0
"""By how much longer than alone a person may wait."""
MB = 1_000_000
UPLOAD = "/gradio_api/upload"
IN_PARTS = {"Content-Type": "multipart/form-data; boundary=b"}
HEAD = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
END = b"\r\n--b--\r\n"


def png(side: int = 64) -> bytes:
    """An image that nobody has uploaded yet."""
    file = BytesIO()
    pixels = np.frombuffer(secrets.token_bytes(side * side * 3), np.uint8).reshape(side, side, 3)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def bombs() -> Iterator[bytes]:
    """Small files of images of 50,000 × 50,000 px: PNG with all its rows, and JPEG and BMP that only say so."""
    side, rows = 50_000, zlib.compressobj(9)
    zeros = bytes(1 + side // 8)
    data = b"".join(rows.compress(zeros * 100) for _ in range(side // 100)) + rows.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    yield b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    jpeg = bytearray(file.getvalue())
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", side, side)
    yield bytes(jpeg)
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, "BMP")
    bmp = bytearray(file.getvalue())
    bmp[18:26] = struct.pack("<ii", side, side)
    yield bytes(bmp)


@dataclass
class Client:
    """Someone who uses the page's addresses; after `visit`, with the cookie of a browser that has opened it."""

    port: int
    headers: dict[str, str] = field(default_factory=dict)

    def request(self, method: str, path: str, body: "bytes | Iterable[bytes]" = b"", **headers: str) -> tuple[int, str]:
        """The answer's code and text; code 0 if the server has ended the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, self.headers | headers)
            answer = connection.getresponse()
            cookie = answer.headers.get("Set-Cookie", "")
            if match := re.match(f"{COOKIE}=[^;]*", cookie):
                self.headers["Cookie"] = match[0]
            return answer.status, answer.read().decode(errors="replace")
        except (ConnectionError, http.client.BadStatusLine):
            return 0, ""
        finally:
            connection.close()

    def visit(self) -> "Client":
        assert self.request("GET", "/")[0] == 200 and self.headers["Cookie"]
        return self

    def upload(self, data: bytes) -> tuple[int, str]:
        return self.request("POST", UPLOAD, HEAD + data + END, **IN_PARTS)

    def ask(self, path: str) -> tuple[int, str]:
        """The page's message about an upload, or why there is none."""
        session = secrets.token_hex(6)
        [shown] = json.loads(self.request("GET", "/config")[1])["dependencies"]
        event = {"session_hash": session, "fn_index": shown["id"], "trigger_id": shown["targets"][0][0]}
        file = {"path": path, "orig_name": "x", "size": 1, "meta": {"_type": "gradio.FileData"}}
        body = json.dumps(event | {"data": [file]}).encode()
        code, said = self.request("POST", "/gradio_api/queue/join", body, **{"Content-Type": "application/json"})
        if code != 200:
            return code, said
        code, said = self.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        [found] = [json.loads(line[6:]) for line in said.splitlines() if '"process_completed"' in line]
        return (200, found["output"]["data"][1]) if found["success"] else (400, "not an upload")

    def predict(self, data: bytes) -> tuple[int, str]:
        code, said = self.upload(data)
        return self.ask(json.loads(said)[0]) if code == 200 else (code, said)

    def timed(self) -> float:
        """Seconds until an image is predicted."""
        began = time.monotonic()
        code, said = self.predict(png())
        assert code == 200 and "has been deleted" in said, (code, said)
        return time.monotonic() - began


class Meter:
    """The largest memory that the processes of a server have of their own at a moment."""

    def __init__(self, server: Server) -> None:
        """Start to measure."""
        self.process, self.most, self.ended = psutil.Process(server.process.pid), 0, threading.Event()
        self.thread = threading.Thread(target=self._measure)
        self.thread.start()

    def _measure(self) -> None:
        while not self.ended.wait(0.05):
            anonymous = 0
            for one in (self.process, *self.process.children(recursive=True)):
                with suppress(FileNotFoundError, ProcessLookupError):
                    status = Path(f"/proc/{one.pid}/status").read_text()
                    found = re.search(r"RssAnon:\s+(\d+)", status)  # a process that has just ended has no such line
                    anonymous += int(found[1]) * 1024 if found else 0
            self.most = max(self.most, anonymous)

    def close(self) -> int:
        self.ended.set()
        self.thread.join()
        return self.most


def left(server: Server) -> list[Path]:
    """Files in the temporary folder."""
    return [file for file in server.uploads.rglob("*") if file.is_file()]


@pytest.fixture(scope="module")
def server(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A full run takes a network whose answers take as long as a real one's."""
    run, before = tmp_path_factory.mktemp("serve") / "run", shared_memory()
    model = {"model": "resnet18", "resolution": 224} if FULL in os.environ else {}
    train_once(small(tiny_shards, epochs=1, **model), run)
    temporary = tmp_path_factory.mktemp("tmp")
    with serving(run, temporary) as found:
        person = Client(found.port).visit()
        for _ in range(3):
            person.timed()
        processes = [psutil.Process(found.process.pid)]
        processes += processes[0].children(recursive=True)
        yield found
    lines = found.said.splitlines()  # Gradio's own about paths that are no uploads are the only tracebacks
    refused = [line for line in lines if line.startswith("gradio.exceptions.InvalidPathError: ")]
    assert lines.count("Traceback (most recent call last):") == len(refused), found.said
    assert not psutil.wait_procs(processes, timeout=20)[1]
    assert not list(temporary.iterdir()) and shared_memory() <= before


@pytest.fixture
def beside(
    server: Server, times: Callable[[int, int], int], record: Callable[..., None]
) -> Callable[..., Counter[int]]:
    """Does `one` so often, all at the same time, while a person asks for predictions; the codes of the answers."""

    def work(
        count: int,
        one: Callable[[int], tuple[int, str]],
        bound: int = MOST_BYTES,
        delay_s: float = DELAY_S,
        **others: object,
    ) -> Counter[int]:
        person, meter, codes = Client(server.port).visit(), Meter(server), Counter()
        alone = median(person.timed() for _ in range(times(3, 10)))
        waited = []
        with ThreadPoolExecutor(count) as pool:
            running = [pool.submit(one, number) for number in range(count)]
            while not all(each.done() for each in running) or len(waited) < 3:
                waited.append(person.timed())
        for each in running:
            code, said = each.result()
            codes[code] += 1
            assert code == 200 or said.strip().count("\n") == 0, said
        most = meter.close()
        assert max(waited) <= alone + delay_s, (alone, waited)
        assert most <= bound
        assert len(left(server)) <= KEPT
        counted = {"count": count, "codes": dict(codes), "asked": len(waited)}
        record(**counted, alone_s=alone, waited_s=max(waited), bytes=most, **others)
        return codes

    return work


def test_two_hundred_programs_at_once(server, beside, times):
    """Each goes on when it was refused, for a while, as a program does that reads `Retry-After`."""
    until = time.monotonic() + times(6, 120)

    def insist(request: Callable[[], tuple[int, str]]) -> tuple[int, str]:
        while (answer := request())[0] == 503 and time.monotonic() < until:
            time.sleep(1)
        return answer

    def one(_: int) -> tuple[int, str]:
        client, image = Client(server.port), png()
        code, said = insist(lambda: client.upload(image))
        return insist(lambda: client.ask(json.loads(said)[0])) if code == 200 else (code, said)

    codes = beside(200, one)
    assert codes[200] and set(codes) <= {200, 503}


def test_two_hundred_visits_at_once(server, beside):
    assert set(beside(200, lambda _: Client(server.port).request("GET", "/"))) == {200}


@pytest.mark.parametrize("how", ["named", "chunked", "message"])
def test_uploads_of_a_gigabyte(server, beside, times, how):
    """Whose size is named before, or shows while they arrive; and a message of that size in place of an upload."""
    size, path = times(100, 1000) * MB, UPLOAD if how != "message" else "/gradio_api/queue/join"

    def body() -> Iterator[bytes]:
        yield HEAD
        for _ in range(size // MB):
            yield bytes(MB)

    def one(_: int) -> tuple[int, str]:
        headers = IN_PARTS if how == "chunked" else {**IN_PARTS, "Content-Length": str(len(HEAD) + size)}
        return Client(server.port).visit().request("POST", path, body(), **headers)

    codes = beside(times(2, 8), one, megabytes=size // MB)
    assert set(codes) <= {413, 503, 0}


def test_bombs(server, beside, times):
    files = list(bombs())

    def one(number: int) -> tuple[int, str]:
        code, said = Client(server.port).visit().predict(files[number % len(files)] + secrets.token_bytes(4))
        assert code != 200 or 'class="refused"' in said, said
        return code, said

    assert beside(times(3, 15), one)[200]


def largest() -> Iterator[bytes]:
    """Files of images of 100 megapixels, the most that is decoded, in the formats that need most memory last."""
    rows = np.add.outer(np.arange(10_000), np.arange(10_000)) // 64
    image = Image.fromarray(np.stack([rows, rows[::-1], 255 - rows], 2).astype(np.uint8))
    progressive, cmyk = {"quality": 60, "progressive": True}, image.convert("CMYK")
    kinds = ((image, "JPEG", progressive), (image, "PNG", {}), (image.convert("RGBA"), "PNG", {}))
    for one, kind, options in (*kinds, (cmyk, "JPEG", {"quality": 50}), (image, "AVIF", {}), (image, "WEBP", {})):
        file = BytesIO()
        with suppress(OSError, KeyError):  # this Pillow cannot write it
            one.save(file, kind, **options)
            yield file.getvalue()


def test_largest_images(server, beside, times):
    """A person may have to wait for the answer that is being computed, and that of such an image takes seconds."""
    files = list(islice(largest(), times(2, 6)))

    def one(number: int) -> tuple[int, str]:
        code, said = Client(server.port).visit().predict(files[number])
        assert code != 200 or "has been deleted" in said, said
        return code, said

    assert beside(len(files), one, LARGEST_BYTES, delay_s=20.0)[200] == len(files)


def test_slow_clients(server, beside, times):
    """They send a byte at a time, send nothing, or read nothing; as long as others are served."""
    seconds = times(3, 60)

    def one(number: int) -> tuple[int, str]:
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", server.port))
            until = time.monotonic() + seconds
            name = f"Host: 127.0.0.1:{server.port}\r\n".encode()
            if number % 3 == 0:
                slow.sendall(b"POST " + UPLOAD.encode() + b" HTTP/1.1\r\n" + name)
                slow.sendall(b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000000\r\n\r\n" + HEAD)
            elif number % 3 == 1:
                slow.sendall(b"GET / HTTP/1.1\r\n" + name + b"\r\nGET /config HTTP/1.1\r\n" + name + b"\r\n")
            with suppress(ConnectionError):  # refused meanwhile
                while time.monotonic() < until:
                    if number % 3 == 0:
                        slow.sendall(b"x")
                    time.sleep(0.2)
        return 200, ""

    beside(times(30, 150), one)


def test_foreign_pages_and_names(server, beside):
    foreign = ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"})

    def one(number: int) -> tuple[int, str]:
        return Client(server.port, dict(foreign[number % 3])).upload(png())

    assert set(beside(200, one)) == {403}


TRICKS = ("{}", "/{}", "../../../../../../{}", "%2e%2e%2f" * 8 + "{}", "....//....//{}", "file://{}", "\\..\\..\\{}")


def test_path_tricks(server, beside, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("nobody may read this")
    places = ("gradio_api/file=", "gradio_api/file/", "gradio_api/proxy=", "file=", "static/", "assets/", "svelte/")
    paths = [f"/{place}{trick.format(secret)}" for place in places for trick in TRICKS]

    def one(number: int) -> tuple[int, str]:
        if number < len(TRICKS):
            return Client(server.port).visit().ask(TRICKS[number].format(secret))
        code, said = Client(server.port).request("GET", paths[number - len(TRICKS)])
        assert "nobody may read this" not in said
        return code, said

    assert set(beside(len(TRICKS) + len(paths), one)) <= {400, 403, 404}


@pytest.mark.skipif(FULL not in os.environ or not has_strace(), reason="`make torture` runs it, with strace")
def test_nothing_outside_the_temporary_folder_is_written(whole: Path, tmp_path: Path, record: Callable) -> None:
    log, temporary = tmp_path / "strace", tmp_path / "tmp"
    temporary.mkdir()
    calls = "openat,open,creat,mkdir,mkdirat,rename,renameat2,link"
    watch = ("strace", "-D", "-f", "-qq", "-e", f"trace={calls}", "-o", log)
    with serving(whole, temporary, before=watch) as server:
        person = Client(server.port).visit()
        person.timed()
        for data in (b"no image", *bombs()):
            person.predict(data)
        for trick in TRICKS:
            person.ask(trick.format("/etc/hostname"))
    lines = [line for line in log.read_text(errors="replace").splitlines() if " = -1 " not in line]
    wrote = [line for line in lines if not re.search(r"open(at)?\(", line) or re.search("O_(WRONLY|RDWR|CREAT)", line)]
    paths = {path for line in wrote for path in re.findall(r'"(/[^"]*)"', line)}
    outside = sorted(path for path in paths if not path.startswith((str(temporary), "/dev/", "/proc/self/")))
    assert set(outside) <= {str(whole / FILE), str(whole / f".{FILE}.partial")}
    assert not any("/etc/hostname" in line for line in lines)
    record(calls=len(lines), outside=outside)
