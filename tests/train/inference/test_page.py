"""The web page as an application, with an answer that is made up: what it takes, what it refuses, and what it keeps."""

import http.client
import json
import secrets
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shards.format import Classes, EncodeSpec
from tests.conftest import anonymous_bytes
from train import serve
from train.inference.guard import Guard, host_name
from train.inference.output import About
from train.inference.worker import Answer

pytest.importorskip("gradio", reason="gradio is not installed (pip install 'dermscale[serve]')")

ABOUT = About(
    "resnet18",
    32,
    Classes(("mel", "nv"), {"mel": "melanoma"}),
    (0.5,) * 3,
    (0.2,) * 3,
    EncodeSpec(),
    0.875,
    "balanced",
    1.0,
    (1, 1),
)
ANSWER = Answer({"mel": 0.25, "nv": 0.75}, b"png", b"png", "", [], "none")


@dataclass
class Visitor:
    """Speaks to a page as its own code does in a browser. asked: the images that reached the model."""

    port: int
    uploads: Path
    page: Any
    asked: list[bytes] = field(default_factory=list)

    def request(self, method: str, path: str, body: str | bytes = b"", **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        answer.content = answer.read()  # pyright: ignore[reportAttributeAccessIssue]
        connection.close()
        return answer

    def upload(self, name: bytes, data: bytes, **headers: str) -> http.client.HTTPResponse:
        head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="' + name + b'"\r\n\r\n'
        kind = {"Content_Type": "multipart/form-data; boundary=b"}
        return self.request("POST", "/gradio_api/upload", head + data + b"\r\n--b--\r\n", **kind, **headers)

    def results(self, path: str) -> dict[str, Any]:
        """What the page shows for an upload, in a visit of its own."""
        [event] = self.page.fns.values()
        file = {"path": path, "orig_name": "x", "size": 1, "meta": {"_type": "gradio.FileData"}}
        visit = {"session_hash": secrets.token_hex(6), "trigger_id": event.targets[0][0], "fn_index": event._id}
        kind = {"Content_Type": "application/json"}
        asked = self.request("POST", "/gradio_api/queue/join", json.dumps(visit | {"data": [file]}), **kind)
        assert asked.status == 200
        said = self.request("GET", f"/gradio_api/queue/data?session_hash={visit['session_hash']}").content.decode()
        [found] = [line for line in said.splitlines() if '"process_completed"' in line]
        return json.loads(found.removeprefix("data: "))

    def predicted(self, name: bytes, data: bytes) -> str:
        """Upload a file; the message of the page about it."""
        [path] = json.loads(self.upload(name, data).content)
        found = self.results(path)
        assert found["success"], found
        return found["output"]["data"][1]

    def kept(self) -> list[Path]:
        return [file for file in self.uploads.rglob("*") if file.name != "vibe_edit_history"]  # made at Gradio's start


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitor]:
    from train.inference import page

    uploads = tmp_path_factory.mktemp("uploads")
    asked: list[bytes] = []

    def ask(image: bytes) -> Answer | str:
        asked.append(image)
        return ANSWER if image.startswith(b"good") else "is no image"

    pages = []
    build = page.build
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        patch.setattr(page, "build", lambda *given: pages.append(build(*given)) or pages[0])
        app = page.application(ask, [ABOUT], "credit", 1_000_000)
        with serve._answering(Guard(app, {"derma.example.org"}), listener):
            yield Visitor(listener.getsockname()[1], uploads, pages[0], asked)
    assert "answering" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("name", [b"mole.jpg", "é <b>.jpg".encode(), b"caf\xe9.jpg", b".jpg", b"a" * 300 + b".jpg"])
def test_an_upload_is_answered_by_name_and_leaves_nothing(visitor, name):
    data = b"good" + secrets.token_bytes(8)
    message = visitor.predicted(name, data)
    assert "the upload has been deleted" in message and "jpg</b>" in message
    assert visitor.asked[-1] == data
    refused = visitor.predicted(name, b"bad" + secrets.token_bytes(8))
    assert "is no image." in refused and "<b>" not in refused
    assert not visitor.kept() and not any(visitor.page.temp_file_sets)


def test_a_file_that_is_dropped_twice_at_once_is_answered_once(visitor):
    paths = [json.loads(visitor.upload(b"mole.jpg", b"good twice").content)[0] for _ in range(2)]
    assert paths[0] == paths[1]
    first, second = (visitor.results(path)["output"]["data"][1] for path in paths)
    assert "has been deleted" in first and "drop it again" in second
    assert not visitor.kept()


def test_files_of_this_machine_are_not_taken_for_uploads(visitor, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"good")
    before = len(visitor.asked)
    for path in (
        str(secret),
        f"{visitor.uploads}/../{tmp_path.name}/secret.jpg",
        "/etc/hostname",
        "http://127.0.0.1/x",
    ):
        assert not visitor.results(path)["success"]
    assert len(visitor.asked) == before and secret.read_bytes() == b"good"
    assert not any(one.is_file() for one in visitor.kept())
    for folder in visitor.kept():  # Gradio makes one before it refuses an address
        folder.rmdir()


def test_other_pages_and_other_names_are_refused_in_one_line_and_get_no_credentials(visitor):
    own = f"127.0.0.1:{visitor.port}"
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": f"http://evil.example:{visitor.port}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
        {"Host": "evil.example"},  # a name that now leads to this machine (DNS rebinding)
        {"Host": f"evil.example:{visitor.port}", "Origin": f"http://evil.example:{visitor.port}"},
        {"Host": f"127.0.0.1.evil.example:{visitor.port}"},
        {"Host": own, "Origin": f"http://{own}.evil.example"},
        {"Host": ""},
    ):
        for answer in (
            visitor.upload(b"a.jpg", b"good", **headers),
            visitor.request("GET", "/", **headers),
            visitor.request("OPTIONS", "/gradio_api/upload", Access_Control_Request_Method="POST", **headers),
        ):
            assert answer.status == 403, headers
            assert answer.content.count(b"\n") == 1 and b"--allow-host NAME" in answer.content
            assert not any(name.lower().startswith("access-control") for name in answer.headers)
    assert not visitor.kept()


def test_own_and_allowed_names_are_served(visitor):
    for name in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]", "derma.example.org"):
        for host in (name, f"{name}:{visitor.port}"):
            assert visitor.request("GET", "/", Host=host).status == 200
            assert visitor.request("GET", "/", Host=host, Origin=f"http://{host}").status == 200
    # a proxy before the page may send its own name for the page
    assert visitor.request("GET", "/", Origin="https://derma.example.org").status == 200


def test_names_of_hosts_are_read_as_people_write_them():
    expected = {
        "Derma.example.org": "derma.example.org",
        "localhost:7860": "localhost",
        "https://derma.example.org:8443/page": "derma.example.org",
        "[::1]:7860": "::1",
        "[::1": "",
        "": "",
        "null": "null",
    }
    assert {place: host_name(place) for place in expected} == expected


@pytest.mark.slow
def test_memory_does_not_grow_with_the_visits(visitor):
    def visits(count: int) -> int:
        for _ in range(count):
            visitor.predicted(b"mole.jpg", b"good" + secrets.token_bytes(8))
        return anonymous_bytes()

    before = visits(300)
    grown = visits(300) - before
    assert grown < 300 * 20_000  # it was 53 kB for each
