"""Fetches one file over HTTP until it is whole: goes on where it was cut, waits for a busy server, checks the MD5.

What has come so far lies beside the file as `.NAME.part`, across runs too. The file's own name means whole and checked.
"""

import hashlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shards.common.errors import DataError
from shards.common.progress import Progress

if TYPE_CHECKING:
    import requests

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = (15, 60)  # to connect, between two reads
_BUSY = (429, 500, 502, 503, 504)
_RETRIES = 3
"""Of one request, while the server is busy or cannot be reached."""
_TRIES = 5
"""Requests in a row that bring no byte, before a file is given up."""
_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file to fetch. exact: `bytes` is the published size, else about it. md5: None where none is published."""

    name: str
    url: str
    bytes: int
    md5: str | None
    exact: bool = True

    @property
    def most_bytes(self) -> int:
        """What a server may send before it is cut off."""
        return self.bytes if self.exact else 2 * self.bytes + (1 << 20)


class _CutError(Exception):
    """The transfer ended early; what came is kept."""


class _ForeignRangeError(Exception):
    """The server sends another range than it was asked for."""


def open_session(backoff_s: float = 1.0) -> "requests.Session":
    """A session that asks again, after growing pauses from `backoff_s`, while a server is busy or cannot be reached."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.response import BaseHTTPResponse
    from urllib3.util.retry import Retry

    class PatientRetry(Retry):
        def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
            """What the server asks for, but no more than a minute: nobody waits hours before a silent screen."""
            wanted = super().get_retry_after(response)
            return None if wanted is None else min(wanted, _LONGEST_PAUSE_S)

    retry = PatientRetry(
        total=_RETRIES,
        backoff_factor=backoff_s,
        backoff_max=_LONGEST_PAUSE_S,
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
    """Where an unfinished `target` lies."""
    return target.with_name(f".{target.name}.part")


def fetch(session: "requests.Session", remote: RemoteFile, folder: Path, pause_s: float = 1.0) -> Path:
    """Bring `remote` into `folder`, whole and with the right MD5, or raise DataError; returns its path.

    A file of that name whose size and MD5 fit is taken as it is. pause_s: after a cut, doubled for each in a row.
    """
    target = folder / remote.name
    part = part_of(target)
    if target.exists():
        problem = _problem(target, remote)
        if problem:
            raise DataError(f"{target}: {problem}; move it away and start again to get the official one")
        return target
    again = True  # a file that was put together from pieces, and is wrong, is fetched once more
    while True:
        in_one_piece = _fetch_pieces(session, remote, part, pause_s)
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
        click.echo(f"{remote.name}: {problem}; the pieces do not fit together, fetching it anew", err=True)


def _problem(path: Path, remote: RemoteFile) -> str | None:
    """What of a file's size or MD5 is not as published; None where all is."""
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


def _fetch_pieces(session: "requests.Session", remote: RemoteFile, part: Path, pause_s: float) -> bool:
    """Fill `part` to the end, over as many connections as it takes; returns True where one was enough."""
    started_with = part.stat().st_size if part.exists() else 0
    connections = empty = 0
    with Progress(remote.name, remote.bytes, "bytes", done=started_with) as bar:
        while True:
            before = part.stat().st_size if part.exists() else 0
            if remote.exact and before == remote.bytes:
                break
            if before > remote.most_bytes:  # another file's
                part.unlink()
                bar.advance(-before)
                before = 0
            connections += 1
            try:
                _fetch_piece(session, remote, part, bar)
                break
            except _CutError as cut:
                after = part.stat().st_size if part.exists() else 0
                empty = 0 if after > before else empty + 1
                if empty >= _TRIES:
                    raise DataError(
                        f"{remote.name}: gave up after {_TRIES} attempts that brought nothing ({cut}); "
                        f"the {after:,} bytes that came are kept: start again to go on from there"
                    ) from None
                wait_s = min(_LONGEST_PAUSE_S, pause_s * 2**empty)
                click.echo(f"{remote.name}: {cut}; going on in {wait_s:.0f} s", err=True)
                time.sleep(wait_s)
    return started_with == 0 and connections == 1


def _fetch_piece(session: "requests.Session", remote: RemoteFile, part: Path, bar: Progress) -> None:
    """One request, from where `part` ends. Raises _CutError when it ended early, DataError when there is no use."""
    import requests
    import urllib3

    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        with session.get(remote.url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
            if answer.status_code == 416:  # nothing is there beyond what we have: it is whole, or not this file at all
                total = _total(answer.headers.get("Content-Range", ""))
                if total == have:
                    return
                part.unlink()
                bar.advance(-have)
                raise _CutError(f"the server has no byte {have:,}")
            try:
                start, total = _extent(answer, remote, have)
            except _ForeignRangeError as foreign:
                part.unlink(missing_ok=True)
                bar.advance(-have)
                raise _CutError(str(foreign)) from None
            if total is not None and (total > remote.most_bytes or (remote.exact and total != remote.bytes)):
                raise DataError(
                    f"{remote.name}: the server's file has {total:,} bytes, and the official one "
                    f"{'' if remote.exact else 'about '}{remote.bytes:,}; try again later or from another network"
                )
            bar.resize(total or remote.bytes)
            if start != have:  # the server ignores Range and sends it all
                bar.advance(-have)
            with part.open("ab" if start else "wb") as file:
                # read1 hands over what is there; larger units would be lost where the connection ends inside one.
                while chunk := answer.raw.read1(_CHUNK_BYTES):
                    file.write(chunk)
                    bar.advance(len(chunk))
                    if file.tell() > remote.most_bytes:
                        raise DataError(f"{remote.name}: the server sends more than {remote.most_bytes:,} bytes")
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _CutError(_reason(error)) from None
    if total is not None and size < total:
        raise _CutError(f"the connection ended at byte {size:,} of {total:,}")


def _extent(answer: "requests.Response", remote: RemoteFile, have: int) -> tuple[int, int | None]:
    """First byte and whole size that an answer announces. Raises _CutError for a busy server, DataError for a no."""
    code = answer.status_code
    if code in _BUSY:
        raise _CutError(f"the server answers {code} {answer.reason}")
    if code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != have:
            raise _ForeignRangeError(f"asked from byte {have:,}, it sends '{answer.headers.get('Content-Range')}'")
        return have, None if match[2] == "*" else int(match[2])
    if code == 200:
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    raise DataError(f"{remote.name}: {remote.url} answers {code} {answer.reason}; check the address or try again later")


def _total(content_range: str) -> int | None:
    """Size in `bytes */SIZE`."""
    match = re.fullmatch(r"bytes \*/(\d+)", content_range)
    return int(match[1]) if match else None


def _reason(error: Exception) -> str:
    """The innermost cause of an error of requests, in a few words."""
    text = str(error).split("Caused by ")[-1]
    return f"{type(error).__name__}: {text[:160]}"
