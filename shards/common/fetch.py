"""Fetches one file until it is complete: resumes after a cut, waits for a busy server, checks the hash.

`fetch_pieces` does that for any server; `fetch` is for HTTP. What has arrived so far lies in a part file next to the
file, also between runs. A file under its own name is complete and checked.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import click

from shards.common.errors import DataError, one_line
from shards.common.progress import Progress

if TYPE_CHECKING:
    import requests

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = (15, 60)  # to connect, between two reads
_BUSY = (429, 500, 502, 503, 504)
_RETRIES = 3
"""Of one request, while the server is busy or cannot be reached."""
_TRIES = 5
"""Requests in a row that bring nothing, or too little in a minute, before the download gives up."""
_LONGEST_PAUSE_S = 60
_FLOOR = (60.0, 100_000)
"""Seconds, and the bytes that must arrive in them; else the server is asked again."""
_NUMBER = "[0-9]{1,18}"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file to fetch. exact: `bytes` is the published size, else roughly. md5: None if none is published."""

    name: str
    url: str
    bytes: int
    md5: str | None
    exact: bool = True

    @property
    def most_bytes(self) -> int:
        """More than this is not accepted from a server."""
        return self.bytes if self.exact else 2 * self.bytes + (1 << 20)


class Counter(Protocol):
    """Counts bytes as they arrive: a `Progress`, or what passes them on to one."""

    def advance(self, amount: int) -> None:
        """`amount` more have arrived; some are lost if it is negative."""
        ...

    def resize(self, total: int) -> None:
        """The size of the whole file."""
        ...


class CutError(Exception):
    """The transfer ended early. useless: what arrived does not belong to the server's file. slow: it was too slow."""

    def __init__(self, reason: str, useless: bool = False, slow: bool = False) -> None:
        super().__init__(reason)
        self.useless, self.slow = useless, slow


def open_session(backoff_s: float = 1.0) -> "requests.Session":
    """A session that repeats a request while a server is busy or unreachable, with growing pauses from `backoff_s`.

    It waits as long as the server asks for, but at most a minute.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util.retry import Retry

    retry = Retry(
        total=_RETRIES,
        backoff_factor=backoff_s,
        backoff_max=_LONGEST_PAUSE_S,
        retry_after_max=_LONGEST_PAUSE_S,
        status_forcelist=_BUSY,
        allowed_methods=("GET",),
        raise_on_status=False,
    )
    session = requests.Session()
    session.mount("https://", HTTPAdapter(max_retries=retry))
    session.mount("http://", HTTPAdapter(max_retries=retry))
    session.headers["Accept-Encoding"] = "identity"  # offsets must mean bytes of the file
    session.headers["User-Agent"] = "dermscale-download"
    return session


def part_of(target: Path) -> Path:
    """Where an incomplete `target` lies."""
    return target.with_name(f".{target.name}.part")


def fetch(session: "requests.Session", remote: RemoteFile, folder: Path, pause_s: float = 1.0) -> Path:
    """Fetch `remote` into `folder`, complete and with the right MD5; returns its path. Raises DataError.

    An existing file of that name with the right size and MD5 is used. pause_s: after a cut; doubled for each in a row.
    """
    target = folder / remote.name
    part = part_of(target)
    if target.exists():
        problem = _problem(target, remote)
        if problem:
            raise DataError(f"{target}: {problem}; move it away and start again to get the official one")
        return target
    again = True  # a wrong file that was put together from pieces is fetched once more
    while True:
        with Progress(remote.name, remote.bytes, "bytes", done=size_of(part)) as bar:
            in_one_piece = fetch_pieces(remote, part, bar, lambda: _fetch_piece(session, remote, part, bar), pause_s)
        problem = _problem(part, remote)
        if problem is None:
            part.rename(target)
            return target
        part.unlink()
        if in_one_piece or not again:
            raise DataError(
                f"{remote.name}: the server's file has {problem}; it was removed and nothing was unpacked; "
                "try again later or from another network"
            )
        again = False
        click.echo(f"{remote.name}: {problem}; the pieces do not fit together, fetching all of it again", err=True)


def _problem(path: Path, remote: RemoteFile) -> str | None:
    """How a file's size or MD5 differs from what is published; None if it does not."""
    size = path.stat().st_size
    if remote.exact and size != remote.bytes:
        return f"{size:,} bytes, and the official one {remote.bytes:,}"
    if remote.md5 is None:
        return None
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file, Progress(f"checking {remote.name}", size, "bytes") as bar:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            bar.advance(len(chunk))
    return None if digest.hexdigest() == remote.md5 else f"MD5 {digest.hexdigest()}, and the official one {remote.md5}"


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


def fetch_pieces(
    remote: RemoteFile, part: Path, bar: Counter, fetch_piece: Callable[[], None], pause_s: float = 1.0
) -> bool:
    """Complete `part`, over as many connections as it takes; returns True if one was enough.

    fetch_piece: one connection, which goes on at the end of `part` and raises CutError if it ends early. pause_s: after
    a cut; doubled for each in a row. Raises DataError after five in a row that brought nothing.
    """
    started_with = size_of(part)
    connections = empty = 0
    while True:
        before = size_of(part)
        if remote.exact and before == remote.bytes:
            break
        if before > remote.most_bytes:  # it belongs to another file
            part.unlink()
            bar.advance(-before)
            before = 0
        connections += 1
        try:
            fetch_piece()
            break
        except CutError as cut:
            if cut.useless:
                part.unlink(missing_ok=True)
                bar.advance(-before)
            after = size_of(part)
            empty = 0 if after > before and not cut.slow else empty + 1
            if empty >= _TRIES:
                raise DataError(
                    f"{remote.name}: gave up after {_TRIES} attempts that brought nothing or too little ({cut}); "
                    f"the {after:,} bytes that arrived are kept: start again to resume there"
                ) from None
            wait_s = min(_LONGEST_PAUSE_S, pause_s * 2**empty)
            click.echo(f"{remote.name}: {cut}; resuming in {wait_s:.0f} s", err=True)
            time.sleep(wait_s)
    return started_with == 0 and connections == 1


def append(remote: RemoteFile, file: IO[bytes], read: Callable[[], bytes], bar: Counter) -> int:
    """Write what `read` gives to `file` until it gives nothing, and flush it to the disk; returns the size then.

    Raises CutError if too little comes in a minute, and DataError if more comes than the file has.
    """
    since, from_byte = time.monotonic(), file.tell()
    while chunk := read():
        file.write(chunk)
        bar.advance(len(chunk))
        if file.tell() > remote.most_bytes:
            raise DataError(f"{remote.name}: the server sends more than {remote.most_bytes:,} bytes")
        if time.monotonic() - since > _FLOOR[0]:
            if file.tell() - from_byte < _FLOOR[1]:
                raise CutError(f"fewer than {_FLOOR[1]:,} bytes came in {_FLOOR[0]:.0f} s", slow=True)
            since, from_byte = time.monotonic(), file.tell()
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def _fetch_piece(session: "requests.Session", remote: RemoteFile, part: Path, bar: Counter) -> None:
    """One request, from the end of `part`. Raises CutError if it ended early, DataError if more will not help."""
    import requests
    import urllib3

    have = size_of(part)
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        with session.get(remote.url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
            start, total = _extent(answer, remote, have)
            if have and start == total:  # nothing is left to fetch
                return
            if total is not None and (total > remote.most_bytes or (remote.exact and total != remote.bytes)):
                raise DataError(
                    f"{remote.name}: the server's file has {total:,} bytes, and the official one "
                    f"{'' if remote.exact else 'about '}{remote.bytes:,}; try again later or from another network"
                )
            bar.resize(total or remote.bytes)
            if start != have:  # the server ignores Range and sends all of it
                bar.advance(-have)
            with part.open("ab" if start else "wb") as file:
                # read1 returns what has arrived. Larger units would be lost if the connection ends inside one.
                size = append(remote, file, lambda: answer.raw.read1(_CHUNK_BYTES), bar)
    except requests.exceptions.InvalidSchema as error:  # trying again does not help
        raise DataError(
            f"{remote.name}: {remote.url} cannot be fetched ({one_line(error, 160)}); check the address, and the "
            "environment variable ALL_PROXY: a SOCKS proxy needs the package PySocks"
        ) from None
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
        cause = str(error).split("Caused by ")[-1]
        raise CutError(f"{type(error).__name__}: {one_line(cause, 160)}") from None
    except ValueError as error:  # of requests, for an address that it is redirected to
        raise DataError(
            f"{remote.name}: the answer of {remote.url} cannot be read ({one_line(error, 160)}); "
            "check the address or try again later"
        ) from None
    if total is not None and size < total:
        raise CutError(f"the connection ended at byte {size:,} of {total:,}")


def _extent(answer: "requests.Response", remote: RemoteFile, have: int) -> tuple[int, int | None]:
    """The first byte and the size of the whole file that an answer announces; they are equal if `have` is all of it.

    Raises CutError for a busy server and for a range that was not asked for, DataError for a refusal.
    """
    code, content_range = answer.status_code, answer.headers.get("Content-Range", "")
    if code in _BUSY:
        raise CutError(f"the server answers {code} {answer.reason}")
    if code == 416 and have:  # no byte there: the file is complete, or another one
        if content_range == f"bytes */{have}":
            return have, have
        raise CutError(f"the server has no byte {have:,}", useless=True)
    if code == 206:
        match = re.fullmatch(rf"bytes ({_NUMBER})-{_NUMBER}/({_NUMBER}|\*)", content_range)
        if match is None or int(match[1]) != have:
            raise CutError(f"asked from byte {have:,}, it sends '{content_range}'", useless=True)
        return have, None if match[2] == "*" else int(match[2])
    if code == 200:
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if re.fullmatch(_NUMBER, length) else None
    raise DataError(f"{remote.name}: {remote.url} answers {code} {answer.reason}; check the address or try again later")
