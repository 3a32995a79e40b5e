"""Not a test: an S3 server on this machine and a proxy before it that misbehaves; a Hub; for the tests of stores."""

import base64
import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

BUCKET = "bucket"
SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request"}
"""Enough for moto's server, which lets in nobody without a name."""


class Seen:
    """A request that the proxy saw: method, path, and the first and last byte that it asked for."""

    def __init__(self, method: str, path: str, wanted: str | None) -> None:
        self.method, self.path = method, path
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        self.first, self.last = (int(match[1]), int(match[2])) if match and match[2] else (None, None)


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the S3 server, except where a fault is planned for them."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = port
        self.faults: list[tuple[str, str, int]] = []
        self.seen: list[Seen] = []
        self.release = threading.Event()
        self.after: Callable[[str], None] = lambda request: None
        self._lock = threading.Lock()

    def plan(self, request: str, fault: str, times: int = 1) -> None:
        """The next `times` requests that match `METHOD /path` meet the fault: `word:value`."""
        self.faults.append((request, fault, times))

    def fault_of(self, request: str) -> tuple[str, str]:
        """The word and the value of the fault that is planned for a request."""
        with self._lock:
            for place, (pattern, fault, times) in enumerate(self.faults):
                if times and re.search(pattern, request):
                    self.faults[place] = pattern, fault, times - 1
                    return fault.partition(":")[0], fault.partition(":")[2]
        return "", ""

    def asked(self, method: str, ending: str) -> list[Seen]:
        """The requests of a method for files with this ending, in order."""
        return [one for one in self.seen if one.method == method and one.path.split("?")[0].endswith(ending)]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news here."""


class Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {self.path}"
        self.server.seen.append(Seen(self.command, self.path, self.headers.get("Range")))
        word, value = self.server.fault_of(request)
        if word == "status":  # value: the status and S3's name of the error
            status, _, code = value.partition(":")
            text = f"The difference between the request time and the current time: {code}" if "Skewed" in code else code
            body = f"<Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
            self.reply(int(status), {"Content-Type": "application/xml"}, body)
            return
        if word == "slow":
            time.sleep(float(value))
        if word == "hang":  # before anything is passed on
            self.server.release.wait(30)
        inner = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        inner.request(self.command, self.path, sent, SIGNED | dict(self.headers))
        answer = inner.getresponse()
        body = answer.read()
        inner.close()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "date", "server")}
        if word == "short":  # a shorter body whose length is said rightly
            body = body[: int(value)]
            headers = {k: v for k, v in headers.items() if k.lower() != "content-length"}
        if word == "wrong":
            body = bytes(255 - byte for byte in body)
        if word in ("cut", "stall"):
            self.reply(answer.status, headers, body, int(value))
            self.wfile.flush()
            if word == "stall":
                self.server.release.wait(30)
            self.close_connection = True
            return
        self.reply(answer.status, headers, body)
        self.server.after(request)

    def reply(self, status: int, headers: dict[str, str], body: bytes, most: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in {name.lower() for name in headers}:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:most])

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815


class S3:
    """A bucket on this machine. proxy: what the tests' own requests pass through."""

    def __init__(self, proxy: Proxy, port: int) -> None:
        self.proxy, self._port = proxy, port

    @property
    def url(self) -> str:
        """The bucket as a web server would offer it."""
        return f"http://127.0.0.1:{self.proxy.server_address[1]}/{BUCKET}"

    def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A request past the proxy."""
        inner = http.client.HTTPConnection("127.0.0.1", self._port)
        inner.request(method, f"/{path}", body, SIGNED)
        answer = inner.getresponse().read()
        inner.close()
        return answer

    def put(self, name: str, content: bytes) -> None:
        """Put an object into the bucket, past the proxy."""
        self.ask("PUT", f"{BUCKET}/{name}", content)

    def get(self, name: str) -> bytes:
        """An object of the bucket, past the proxy."""
        return self.ask("GET", f"{BUCKET}/{name}")

    def put_set(self, folder: Path, name: str = "set") -> str:
        """Put a shard set into the bucket; returns its address."""
        for file in folder.iterdir():
            self.put(f"{name}/{file.name}", file.read_bytes())
        return f"s3://{BUCKET}/{name}"

    def names(self, name: str = "set") -> list[str]:
        """The files of a set in the bucket."""
        return sorted(re.findall(rf"<Key>{name}/([^<]+)</Key>", self.ask("GET", BUCKET).decode()))


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An empty bucket, and the environment that leads to it through the proxy, for this process and its children."""
    import s3fs
    from moto.server import ThreadedMotoServer

    from shards import store
    from tests.conftest import free_port

    port = free_port()
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    with Proxy(port) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_address[1]}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(store, "_PAUSE_S", 0)
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
        s3fs.S3FileSystem.clear_instance_cache()
        s3 = S3(proxy, port)
        s3.ask("POST", "moto-api/reset")
        s3.ask("PUT", BUCKET)
        try:
            yield s3
        finally:
            proxy.release.set()
            proxy.shutdown()
            thread.join()
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()


class Hub(ThreadingHTTPServer):
    """What the client of the Hugging Face Hub asks for when it reads and writes the data set `lab/set`: a folder.

    As on the Hub, a commit that begins before another one has ended is refused. So are the first `busy` ones.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.commits: list[str] = []
        self.committing, self.busy = threading.Lock(), 0


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        if path.endswith(("/preupload/main", "/commit/main")):
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.commit(sent) if path.endswith("/commit/main") else self.plan(json.loads(sent)["files"])
        else:
            self.do_GET()

    def plan(self, files: list[dict]) -> None:
        """Every file is to come within its commit."""
        modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
        self.reply(200, json.dumps({"files": modes}).encode(), Content_Type="application/json")

    def commit(self, sent: bytes) -> None:
        if self.server.busy or not self.server.committing.acquire(blocking=False):
            self.server.busy = max(0, self.server.busy - 1)
            self.reply(412, b'{"error": "A commit has happened since. Please refresh and try again."}')
            return
        try:
            time.sleep(0.05)  # long enough for another one to begin
            for line in map(json.loads, sent.splitlines()):
                file = self.server.folder / line["value"].get("path", "")
                if line["key"] == "file":
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
                elif line["key"] == "deletedFile":
                    file.unlink()
                self.server.commits += [file.name] if line["key"] != "header" else []
        finally:
            self.server.committing.release()
        about = {"success": True, "commitOid": "0" * 40, "commitUrl": "http://127.0.0.1/datasets/lab/set/commit/0"}
        self.reply(200, json.dumps(about).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        files = [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": f"{file.stat().st_mtime_ns:040x}"}
            for file in sorted(self.server.folder.iterdir())
        ]
        if match := re.fullmatch("/datasets/lab/set/resolve/main/([^/]+)", path):
            content = (self.server.folder / match[1]).read_bytes()
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
                first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
                extent = f"bytes {first}-{last}/{len(content)}"
                self.reply(206, content[first : last + 1], Content_Range=extent)
            else:
                self.reply(200, content)
        elif re.fullmatch("/api/datasets/lab/set/(tree|paths-info)/main(/.*)?", path):
            self.reply(200, json.dumps(files).encode(), Content_Type="application/json")
        elif re.fullmatch("/api/datasets/lab/set(/revision/main)?", path):
            about = {"id": "lab/set", "sha": "0" * 40, "siblings": [], "private": False, "tags": []}
            self.reply(200, json.dumps(about).encode(), Content_Type="application/json")
        else:
            self.reply(404, b"", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815


@contextmanager
def hub_server(folder: Path) -> Iterator[Hub]:
    """A Hub that has the files of a folder as `lab/set`."""
    with Hub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
