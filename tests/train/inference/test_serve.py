"""The web page, in a real browser: it predicts an upload as `train.predict` does, and deletes it."""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from shards.format import HAM10000
from tests.conftest import free_port
from tests.support.train_runs import child_environment
from train import serve
from train.inference.images import open_image
from train.inference.predictor import Predictor

pytest.importorskip("gradio", reason="gradio is not installed (pip install 'dermscale[serve]')")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]

PROXIES = {"ALL_PROXY": "socks5://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "no_proxy": ".cluster"}
"""As on the nodes of a cluster; nobody listens there, and httpx has no SOCKS without another package."""


@dataclass
class Server:
    address: str
    port: int
    uploads: Path
    process: subprocess.Popen[str]
    said: str = ""
    """After the end: what it printed once it was ready."""


@contextmanager
def serving(run: Path, temporary: Path, *options: object, before: Sequence[object] = ()) -> Iterator[Server]:
    """`python -m train.serve` until the block ends; its temporary files lie in a folder of their own.

    before: of the command.
    """
    port = free_port()
    command = [*before, sys.executable, "-m", "train.serve", "--run", run, "--port", port, "--device", "cpu", *options]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=child_environment() | PROXIES | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background job ignores
    )
    found = None
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "is ready" in line:
                break
        else:
            pytest.fail(f"the server ended: {''.join(lines)}")
        (uploads,) = temporary.glob("dermscale-uploads-*")
        found = Server(f"http://127.0.0.1:{port}", port, uploads, process)
        yield found
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
        if found is not None:
            found.said = said


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(run, tmp_path_factory.mktemp("tmp"), "--max-upload-mb", 1) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@dataclass
class Visit:
    """A page that is open, with what the browser said about it and where it went."""

    page: Any
    complaints: list[str]
    elsewhere: list[str]

    def drop(self, name: str, data: bytes) -> None:
        """Drag a file onto the page and drop it there, as a person does."""
        transfer = self.page.evaluate_handle(
            """([name, bytes]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], name));
                return transfer;
            }""",
            [name, list(data)],
        )
        for event in ("dragenter", "dragover", "drop"):
            self.page.dispatch_event("#upload button", event, {"dataTransfer": transfer})


@pytest.fixture
def visit(server: Server, browser: Any) -> Iterator[Visit]:
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(60_000)
    found = Visit(page, [], [])
    page.on("console", lambda m: found.complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on(
        "request",
        lambda r: None if r.url.startswith((server.address, "data:", "blob:")) else found.elsewhere.append(r.url),
    )
    page.goto(server.address)
    page.wait_for_selector("#upload input[type=file]", state="attached")
    yield found
    page.close()


def kept(server: Server) -> list[str]:
    """Files of uploads that have something in them."""
    return [str(file) for file in server.uploads.rglob("*") if file.is_file() and file.stat().st_size]


def shown_probabilities(page: Any) -> dict[str, float]:
    text = page.inner_text("#probabilities")
    found = {dx: re.search(re.escape(HAM10000.described(dx)) + r"\s*(\d+)%", text) for dx in HAM10000.names}
    assert all(found.values()), text
    return {dx: int(match[1]) / 100 for dx, match in found.items() if match}


def expected_probabilities(run: Path, data: bytes) -> dict[str, float]:
    predictor = Predictor(run, "cpu")
    square = predictor.prepare(open_image(data), "upload").square
    return dict(zip(HAM10000.names, predictor.probabilities(predictor.logits(square[None]))[0], strict=True))


def drawn(page: Any, selector: str) -> list[tuple[int, int]]:
    """Width and height of each picture, in its own px; 0 where it could not be drawn."""
    return page.eval_on_selector_all(
        selector, "images => images.map(i => i.complete ? [i.naturalWidth, i.naturalHeight] : [0, 0])"
    )


def test_a_dropped_image_is_predicted_explained_compared_and_deleted(server, visit, run, raw):
    data = next(raw.rglob("*.jpg")).read_bytes()
    for _ in range(30):  # the features of the training lesions are still computed after the first start
        visit.drop("mole.jpg", data)
        visit.page.wait_for_selector("#message >> text=mole.jpg")
        visit.page.wait_for_selector("#pictures img")
        if visit.page.query_selector("#similar img"):
            break
        assert "still being processed" in visit.page.inner_text("#similar")
        visit.page.reload()
        visit.page.wait_for_selector("#upload input[type=file]", state="attached")
    expected = expected_probabilities(run, data)
    for dx, shown in shown_probabilities(visit.page).items():
        assert abs(shown - expected[dx]) <= 0.0051
    assert drawn(visit.page, "#pictures img") == [[64, 48], [64, 48]]
    assert drawn(visit.page, "#similar img") == [[64, 48]] * 6
    assert "balanced prior" in visit.page.inner_text("#message")
    assert "not a medical device" in visit.page.inner_text("body")
    assert HAM10000.described(max(expected, key=lambda dx: expected[dx])) in visit.page.inner_text("#pictures")
    assert not kept(server)
    assert not visit.complaints and not visit.elsewhere


def test_an_image_can_be_chosen_as_well_as_dropped(server, visit, raw, tmp_path):
    image = tmp_path / "grey & <i>16 bit.png"
    grey = np.asarray(Image.open(next(raw.rglob("*.jpg"))).convert("L")).astype(np.uint16) << 8
    Image.fromarray(grey).save(image)
    visit.page.set_input_files("#upload input[type=file]", image)
    visit.page.wait_for_selector("#pictures img")
    assert "bit.png" in visit.page.inner_text("#message")
    assert visit.page.query_selector("#message i") is None  # the name is shown as text
    assert not kept(server) and not visit.complaints


def test_a_file_that_is_not_an_image_is_refused_by_name_and_deleted(server, visit):
    visit.drop("notes.jpg", b"these are only words")
    visit.page.wait_for_selector("#message >> text=notes.jpg")
    assert "is not an image of a known format" in visit.page.inner_text("#message")
    assert not visit.page.query_selector("#pictures img")
    assert not kept(server)


def test_a_file_above_the_limit_is_refused_and_deleted(server):
    boundary = "limit"
    for size, code in ((900_000, 200), (1_100_000, 413)):
        file = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'.encode()
        body = file + bytes(size) + f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        with closing(connection):
            connection.putrequest("POST", "/gradio_api/upload")
            for name, value in (*headers.items(), ("Content-Length", str(len(body)))):
                connection.putheader(name, value)
            connection.endheaders()
            with suppress(BrokenPipeError, ConnectionResetError):  # the server may refuse it before it has read all
                connection.send(body)
            found = connection.getresponse().status
        assert found == code
    assert all(Path(file).stat().st_size <= 900_000 for file in kept(server))


def test_only_this_machine_can_reach_the_page(server):
    found = psutil.net_connections("tcp")
    listening = {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == server.port}
    assert listening == {"127.0.0.1"}


def test_ctrl_c_ends_all_processes_and_deletes_uploads(run, tmp_path):
    with serving(run, tmp_path) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=60) == 0
        assert children and not psutil.wait_procs(children, timeout=20)[1]
    assert not list(tmp_path.glob("dermscale-uploads-*"))


def test_a_mistake_ends_in_one_line(run, raw, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        for arguments, code, text in (
            (("--run", run, "--port", taken), 2, f"--port {taken} cannot be used"),
            (("--run", tmp_path, "--port", free_port()), 1, "not a run folder"),
            (("--run", run, "--port", free_port(), "--data", raw), 1, "not a shard set"),
            (("--run", run, "--allow-host", "[::1"), 2, "--allow-host [::1: is not the name of a host"),
        ):
            command = [sys.executable, "-m", "train.serve", *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=child_environment())
            assert done.returncode == code
            assert done.stderr.strip().startswith("error:") and text in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1


def test_the_page_starts_in_a_process_without_torch_or_timm():
    program = (
        "import sys, train.serve as s; s._import_gradio(); import train.inference.worker, train.inference.page; "
        "print(sorted({'torch', 'timm', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("asked", "cores", "said", "threads"),
    [(3, 8, None, "3"), (None, 8, None, None), (None, 2, None, "2"), (None, 2, "5", "5")],
)
def test_the_model_process_gets_its_threads(asked, cores, said, threads, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(serve, "available_cores", lambda: cores)
    os.environ.pop("OMP_NUM_THREADS", None)
    if said is not None:
        os.environ["OMP_NUM_THREADS"] = said
    monkeypatch.setattr(serve, "serve", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    arguments = ["--run", "x", "--port", str(free_port()), *(["--threads", str(asked)] if asked else [])]
    serve.main.main(arguments, standalone_mode=False)
    assert os.environ.get("OMP_NUM_THREADS") == threads
