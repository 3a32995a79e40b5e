"""What one client may take from the web page: bytes, time, and its share of the answers.

A visit is a browser that has opened the page, which gave it a cookie. All clients without one, such as programs, count
together as the stranger, whose images come last. So no number of them delays a person by more than the answer that is
being computed.
"""

import asyncio
import secrets
from collections.abc import Callable, MutableMapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "dermscale-visit"
UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"
OTHERS = frozenset({"/gradio_api/cancel", "/gradio_api/reset"})
SMALL_BYTES = 65_536
"""Of a request that is no upload, and of what an upload has beside its file."""
EACH = 3
"""Images of one visit that wait for their turn, and uploads that arrive at the same time; of the stranger, one."""
KEPT = 40
"""Uploads that nobody has asked about yet. Of more, the oldest are deleted; the stranger is refused from half on."""
CONNECTIONS = 500
SESSIONS = 100
"""Visits whose answers are kept until they are read. Of more, those that were used longest ago are dropped."""
ARRIVES_S = 120.0
"""How long the body of a request may take to arrive."""
STALLS_S = 30.0
"""How long a client may take to begin a request, or read nothing of an answer."""
LINGERS_S = 30.0
"""How long a client that was refused may go on sending: most read the reason only then."""


def forget(page: Any, file: Path) -> None:
    """Delete an upload to a page, a `gradio.Blocks`."""
    file.unlink(missing_ok=True)
    with suppress(OSError):  # another upload of this content under another name is in the folder
        file.parent.rmdir()
    for names in page.temp_file_sets:  # Gradio would remember the names of all uploads
        names.discard(str(file))


class Limits:
    """An ASGI application that refuses in one line what is above the limits, and passes on all else."""

    def __init__(self, app: "ASGIApp", page: Any, most_bytes: int) -> None:
        """app: of the page, a `gradio.Blocks` with a queue. most_bytes: of an uploaded file."""
        from gradio.utils import LRUCache

        class Recent(LRUCache):
            def __getitem__(self, key: Any) -> Any:
                self.move_to_end(key)
                return super().__getitem__(key)

        page._queue.pending_messages_per_session = Recent(SESSIONS)  # Gradio keeps 2000, of about a megabyte each
        self.app, self.page = app, page
        self.most = {UPLOAD: most_bytes + SMALL_BYTES} | dict.fromkeys((JOIN, *OTHERS), SMALL_BYTES)
        self.arriving: list[str] = []
        """The visit of each upload that is under way."""

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request, as ASGI defines it."""
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope)
        visit, path = _visit(request), request.url.path
        if request.method in ("GET", "HEAD"):
            return await self.app(scope, receive, send if visit or path != "/" else _with_cookie(send))
        if refused := self._refusal(request, visit, path):
            code, line = refused
            headers = {"Retry-After": "1"} if code == 503 else {}
            return await PlainTextResponse(f"{line}\n", code, headers)(scope, receive, send)
        with ExitStack() as arriving:
            if path == UPLOAD:
                self.arriving.append(visit)
                arriving.callback(self.arriving.remove, visit)
            await self.app(scope, _limited(receive, self.most[path], arriving.close), send)
        for queue in self._queues() if path == JOIN else ():
            queue.sort(key=lambda event: not _visit(event.request))

    def _queues(self) -> list[list[Any]]:
        return [one.queue for one in self.page._queue.event_queue_per_concurrency_id.values()]

    def _refusal(self, request: "Request", visit: str, path: str) -> tuple[int, str] | None:
        """Why a request that is to change something is refused, with the HTTP code; None if it is not."""
        if request.method != "POST" or path not in self.most:
            return 405, "this page has no such request"
        length = request.headers.get("content-length", "0")
        if int(length) > self.most[path]:
            return 413, f"the request has {length} bytes, above the maximum allowed size of {self.most[path]}"
        most = EACH if visit else 1
        waiting = sum(_visit(event.request) == visit for queue in self._queues() for event in queue)
        if (path == UPLOAD and self.arriving.count(visit) + waiting >= most) or (path == JOIN and waiting >= most):
            return 503, f"{most} of your images are waiting already; try again later"
        return self._make_room(visit) if path == UPLOAD else None

    def _make_room(self, visit: str) -> tuple[int, str] | None:
        """Delete the oldest uploads that nobody has asked about, or refuse another of the stranger."""
        kept = self.page.upload_file_set
        if not visit and len(kept) >= KEPT // 2:
            return 503, "too many uploads wait that nobody asks about; try again in ten minutes"
        if len(kept) >= KEPT:
            there = {file: file.stat().st_ctime for file in map(Path, kept) if file.exists()}
            for file in sorted(there, key=lambda file: there[file])[: len(kept) - KEPT + 1]:
                forget(self.page, file)
        return None


def _visit(request: "Request") -> str:
    """The visit of a request; empty for the stranger."""
    return request.cookies.get(COOKIE, "")


def _with_cookie(send: "Send") -> "Send":
    async def sending(message: "Message") -> None:
        if message["type"] == "http.response.start":
            cookie = f"{COOKIE}={secrets.token_hex(8)}; Path=/; HttpOnly; SameSite=Strict"
            message["headers"] = [*message["headers"], (b"set-cookie", cookie.encode())]
        await send(message)

    return sending


def _limited(receive: "Receive", most: int, arrived: Callable[[], None]) -> "Receive":
    """Receive a body of at most `most` bytes in ARRIVES_S, and then call `arrived`.

    Raises MultiPartException for every other body: Gradio then deletes what it has of an upload, and answers the line.
    """
    from starlette.formparsers import MultiPartException

    got, whole, until = 0, False, asyncio.get_running_loop().time() + ARRIVES_S

    async def receiving() -> MutableMapping[str, Any]:
        nonlocal got, whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            raise MultiPartException(f"the request took more than {ARRIVES_S:g} s to arrive\n") from None
        if message["type"] != "http.request":
            raise MultiPartException("the client has gone\n")
        got += len(message["body"])
        if got > most:
            raise MultiPartException(f"the request is above the maximum allowed size of {most} bytes\n")
        if not message["more_body"]:
            whole = True
            arrived()
        return message

    return receiving


def impatient() -> Any:
    """uvicorn's protocol, which also ends connections that stand still: without a request, or without a reader."""
    from h11 import SEND_BODY
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        stalls: asyncio.TimerHandle | None = None

        def within(self, seconds: float) -> None:
            """End the connection then, unless `going_on` is called before."""
            self.going_on()
            self.stalls = self.loop.call_later(seconds, self.transport.abort)

        def going_on(self) -> None:
            if self.stalls is not None:
                self.stalls.cancel()

        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
            super().connection_made(transport)
            self.within(STALLS_S)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:  # a request has begun
                self.going_on()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.within(STALLS_S)

        def resume_writing(self) -> None:
            super().resume_writing()
            self.going_on()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is SEND_BODY:
                self.within(LINGERS_S)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.going_on()

    return Impatient
