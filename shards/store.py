"""Shard sets in object stores: read through a cache of verified files, and written with the manifest last.

Every store that fsspec reaches will do: `s3://`, `gs://`, `hf://datasets/…`, `https://` …, with the credentials and
settings of that store's own tools.

The cache is a folder with a folder for each set, named by the SHA-256 of the set's manifest, so it never holds files of
two versions under one name. A file in it is whole: it arrives as `.NAME.BYTES-VERSION.part`, is compared with the
manifest's SHA-256, flushed and renamed. The part that is fetched is locked, so each file is fetched by one process at a
time. A file that is in use has a shared lock, which lives as long as its mapping, and is never removed.
"""

import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeGuard, TypeVar

import click

from shards.common import kept
from shards.common.errors import DataError, DermscaleError, UsageError, one_line
from shards.common.fetch import Counter, CutError, RemoteFile, append, fetch_pieces, size_of
from shards.common.files import full_disk_names, sync_folder
from shards.format import CARDS, MANIFEST, Manifest
from shards.place import foreign

T = TypeVar("T")

CACHE, CACHE_GB = "DERMSCALE_CACHE", "DERMSCALE_CACHE_GB"
"""Environment variables: the folder of the cache, and its largest size in GB."""
_DEFAULT_GB = 100.0
_BLOCK_BYTES = 8 << 20
"""Of one request. Less than a shard, so that a cut connection costs little."""
_HASHED_BYTES = 1 << 18
_TRIES, _PAUSE_S = 5, 1.0
_MOST_MANIFEST_BYTES = 1 << 30
_PART = re.compile(r"\.(.+)\.(\d+)-[0-9a-f]{16}\.part")


def is_address(place: str | Path) -> TypeGuard[str]:
    """Whether a set is in a store, and not in a folder."""
    return isinstance(place, str) and "://" in place and not place.startswith("file://")


def folder_of(place: str | Path) -> Path:
    """The folder that a path or a `file://` address names."""
    return Path(place.removeprefix("file://") if isinstance(place, str) else place)


def name_of(place: str | Path) -> str:
    """What a set is called by its place: the name of its folder, or the last part of its address."""
    return place.rstrip("/").rpartition("/")[2] if is_address(place) else folder_of(place).resolve().name


class Place(click.Path):
    """The type of a command's option or argument: a folder, as a Path, or an address in a store, as text."""

    name = "place"

    def __init__(self) -> None:
        """As any path that may or may not be there."""
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Leave an address as it is: a Path would make one slash of two."""
        return value if is_address(value) else super().convert(folder_of(value), param, ctx)


class Version(NamedTuple):
    """The size of a file in a store, and a text that is another one after the file was replaced."""

    bytes: int
    token: str


class Store:
    """A folder in a store. What the user can correct is raised as DataError or UsageError, in one line."""

    def __init__(self, address: str) -> None:
        """Nothing is asked yet."""
        self.address = address.rstrip("/")
        self.protocol = address.partition("://")[0].split("::")[0]
        # the Hub makes a commit of each file, and refuses one that begins before another has ended
        self._turn = threading.Lock() if self.protocol == "hf" else nullcontext()

    @property
    def reads_only(self) -> bool:
        """Whether its files can be neither listed nor written: on a web server."""
        return self.protocol in ("http", "https")

    def _system(self, name: str = "") -> tuple[Any, str]:
        """fsspec's file system, of which each process has its own, and a path in it."""
        import fsspec.core

        system, path = fsspec.core.url_to_fs(self.address)
        return system, f"{path.rstrip('/')}/{name}" if name else path

    def _ask(self, name: str, ask: Callable[[Any, str], T]) -> T:
        """The answer of the file system on a file. Asks again while the store is busy or out of reach."""
        where, tries = f"{self.address}/{name}" if name else self.address, 1
        while True:
            try:
                return ask(*self._system(name))
            except Exception as error:  # the drivers' errors have no common base
                if (problem := _problem(error, where)) is not None:
                    raise problem from error
                if tries == _TRIES:
                    raise DataError(
                        f"{where}: gave up after {_TRIES} attempts ({type(error).__name__}: {one_line(error, 160)}); "
                        "check the address and the network, or try again later"
                    ) from error
            time.sleep(_PAUSE_S * 2**tries)
            tries += 1

    def version(self, name: str) -> Version:
        """Of a file. The text is made from its ETag or generation, or else from its size and time."""

        def ask(system: Any, path: str) -> Version:
            system.invalidate_cache(path)
            return _version(system.info(path))

        return self._ask(name, ask)

    def files(self) -> dict[str, Version]:
        """What is at the address and below it, by the paths from there; by "" if the address is that of a file.

        Of a web server, which cannot be listed, it is always a file. Raises DataError if there is nothing.
        """
        if self.reads_only:
            return {"": self.version("")}

        def ask(system: Any, path: str) -> dict[str, Version]:
            system.invalidate_cache()
            path = path.rstrip("/")
            found = system.find(path, detail=True)  # S3's console makes an empty object `sub/` for a folder
            below = {
                name: info
                for name, info in found.items()
                if (name == path or name.startswith(f"{path}/")) and not name.endswith("/")
            }
            return {name[len(path) + 1 :]: _version(info) for name, info in sorted(below.items())}

        if not (found := self._ask("", ask)):
            raise DataError(f"{self.address}: is not there; check the address")
        return found

    def read(self, name: str, most: int) -> bytes:
        """A whole small file. Raises DataError if it is larger than `most` bytes."""
        size = self.version(name).bytes
        if size > most:
            raise DataError(f"{self.address}/{name}: has {size:,} bytes, and at most {most:,} are read")
        return self.content(name)

    def content(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """The bytes of a file, or `size` of them from `start` on."""
        end = None if size is None else start + size
        found = self._ask(name, lambda system, path: system.cat_file(path, start=start or None, end=end))
        if size is not None and len(found) != size:
            raise DataError(f"{self.address}/{name}: ends before byte {end:,}; it was replaced, so start again")
        return found

    def fetch(self, remote: RemoteFile, part: Path, bar: Counter) -> None:
        """Complete `part` with a file's bytes, from where it ends. Raises DataError."""
        with full_disk_names(part):
            fetch_pieces(remote, part, bar, lambda: self._fetch_piece(remote, part, bar), _PAUSE_S)

    def _fetch_piece(self, remote: RemoteFile, part: Path, bar: Counter) -> None:
        """One try, from the end of `part`. Raises CutError if it ended early, DataError if more will not help."""
        name, where = remote.name, f"{self.address}/{remote.name}"

        def read() -> bytes:
            try:
                return file.read(_BLOCK_BYTES)
            except Exception as error:  # the drivers' errors have no common base
                raise _problem(error, where) or _cut(error) from error

        try:
            system, path = self._system(name)
            headers = {}
            if self.reads_only and (etag := system.info(path).get("ETag", "")).startswith('"'):
                headers = {"headers": {"If-Match": etag}}  # s3fs does this itself
            file = system.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="none", **headers)
        except Exception as error:  # the drivers' errors have no common base
            raise _problem(error, where) or _cut(error) from error
        with file, part.open("ab") as local:
            file.seek(local.tell())
            size = append(remote, local, read, bar)
        if size < remote.bytes:
            raise CutError(f"the store's file ended at byte {size:,} of {remote.bytes:,}")

    def names(self) -> set[str]:
        """The files that are there; none if the folder is not."""

        def ask(system: Any, path: str) -> set[str]:
            system.invalidate_cache(path)
            try:
                found = {entry["name"].rstrip("/") for entry in system.ls(path, detail=True)}
                return {entry.rpartition("/")[2] for entry in found if entry != path.rstrip("/")}
            except FileNotFoundError:
                return set()

        return self._ask("", ask)

    def write(self, name: str, content: bytes | Path) -> Version:
        """Put bytes, or a local file, there; a file of that name is replaced. Returns what is there then."""
        size = content.stat().st_size if isinstance(content, Path) else len(content)

        def ask(system: Any, path: str) -> None:
            try:
                if isinstance(content, Path):
                    system.put_file(str(content), path)
                else:
                    system.pipe_file(path, content)
            except Exception as error:  # the drivers' errors have no common base
                if _status(error) in (409, 412):
                    raise ConnectionError("somebody else writes there") from error
                raise

        with self._turn:
            self._ask(name, ask)
        there = self.version(name)
        if there.bytes != size:
            raise DataError(f"{self.address}/{name}: has {there.bytes:,} bytes, and {size:,} were sent; start again")
        return there

    def remove(self, name: str) -> None:
        """Remove a file."""
        with self._turn:
            self._ask(name, lambda system, path: system.rm_file(path))


def _version(info: dict[str, Any]) -> Version:
    """Of what fsspec says of a file."""
    if info.get("size") is None:
        raise ValueError("the server does not say how large the file is")
    said = {key.lower(): str(value) for key, value in info.items() if value is not None}
    keys = ("etag", "generation", "md5hash", "blob_id", "mtime", "last-modified", "lastmodified", "created")
    mark = next((said[key] for key in keys if key in said), "")
    token = hashlib.sha256(f"{info['size']}/{mark}".encode()).hexdigest()[:16]
    return Version(int(info["size"]), token)


def _problem(error: Exception, where: str) -> DermscaleError | None:
    """The line for the user; None if the store was busy, slow or out of reach, so that it can be asked again."""
    if isinstance(error, DermscaleError):
        return error
    cause = error.__cause__
    if isinstance(cause, Exception) and "aiohttp" in type(cause).__module__:
        error = cause  # fsspec says of any trouble with a web server that the file is not there
    kind, text = type(error).__name__, one_line(error, 160)
    code = _status(error)
    if isinstance(error, ImportError):
        return UsageError(
            f"{where}: {text.rstrip('.')} (pip install 'dermscale[stores]' brings the packages for s3://, https:// and "
            "hf://)"
        )
    if "Skewed" in text or "request time" in text:
        return DataError(f"{where}: the store refuses this machine's clock ({text}); set the clock")
    if "Credentials" in kind or "credentials" in text.lower():
        return DataError(
            f"{where}: no credentials ({text}); set those of the store's own tools, such as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket"
        )
    if isinstance(error, FileNotFoundError) or code in (404, 410):
        return DataError(f"{where}: is not there; check the address")
    if isinstance(error, PermissionError) or code in (401, 403):
        return DataError(f"{where}: access is refused ({text}); check the credentials and the address")
    if kind == "FileExpired" or code == 412:
        return DataError(f"{where}: was replaced while it was fetched; start again")
    if isinstance(error, (ValueError, NotImplementedError)):  # what fsspec raises for an address that it cannot use
        return UsageError(f"{where}: cannot be used ({text}); check the address")
    return None


def _status(error: Exception) -> int | None:
    """The status of HTTP that an error is about."""
    answer = getattr(error, "response", None)  # of requests and httpx; botocore has a dictionary
    return getattr(error, "status", None) or getattr(answer, "status_code", None)


def _cut(error: Exception) -> CutError:
    return CutError(f"{type(error).__name__}: {one_line(error, 160)}")


def read_manifest(place: str | Path) -> Manifest:
    """The manifest of the set in a folder or a store. Raises DataError."""
    if not is_address(place):
        return Manifest.from_file(folder_of(place) / MANIFEST)
    return Manifest.from_bytes(Store(place).read(MANIFEST, _MOST_MANIFEST_BYTES), f"{place}/{MANIFEST}")


# ------------------------------------------------------------------ reading


class Wanted(NamedTuple):
    """A file of a set, as its manifest describes it. bytes: None if the manifest does not say."""

    name: str
    sha256: str
    bytes: int | None = None


class Silent:
    """Counts nothing."""

    def advance(self, amount: int) -> None:
        """Do nothing."""

    def resize(self, total: int) -> None:
        """Do nothing."""


class CachedSet:
    """The files of one set in a store, in a cache that several sets, processes and users share.

    folder: where they lie. Safe to share between threads.
    """

    def __init__(self, address: str, cache: str | Path | None = None, cache_gb: float | None = None) -> None:
        """Read the manifest. cache, cache_gb: default, the environment variables CACHE and CACHE_GB, or else the user's
        cache folder and 100 GB. Raises UsageError for a size that is not above 0, and DataError as `Store` does.
        """
        self.store = Store(address)
        self.cache = Path(cache or os.environ.get(CACHE) or kept.home() / "shards").expanduser().absolute()
        self.most_bytes = _bytes_of(cache_gb)
        self.manifest = self.store.read(MANIFEST, _MOST_MANIFEST_BYTES)
        self.folder = self.cache / hashlib.sha256(self.manifest).hexdigest()[:32]

    def opened(self, wanted: Wanted, bar: Counter | None = None) -> IO[bytes]:
        """A file of the set, whole, open for reading. It is fetched if it is not there.

        It stays in the cache until this file, and every mapping of it, is closed. Raises DataError if it cannot be
        fetched, if it is not what the manifest says, and if the cache has no room for it.
        """
        path = self.folder / wanted.name
        while True:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                self._fetch(wanted, path, bar or Silent())
                continue
            _flock(file, fcntl.LOCK_SH, path)
            if os.fstat(file.fileno()).st_nlink:  # else it was removed before it was locked
                with suppress(PermissionError):  # a file of another user; it leaves a little earlier
                    os.utime(path)
                return file
            file.close()

    def _fetch(self, wanted: Wanted, path: Path, bar: Counter) -> None:
        """Bring a file into the cache, unless another process is doing so: then wait for it."""
        found = self.store.version(wanted.name)
        if wanted.bytes is not None and found.bytes != wanted.bytes:
            raise DataError(
                f"{self.store.address}/{wanted.name}: {found.bytes:,} bytes, and the manifest says {wanted.bytes:,}; "
                "another set was written to this address, or is being written: start again later"
            )
        part = path.with_name(f".{path.name}.{found.bytes}-{found.token}.part")
        with self._part(part, path, found.bytes) as mine:
            if mine:
                complete(self.store, wanted, found.bytes, part, bar)
                part.replace(path)
                sync_folder(path.parent)

    @contextmanager
    def _part(self, part: Path, path: Path, size: int) -> Iterator[bool]:
        """Lock the part file, for which there is room then; False if another process has completed it meanwhile."""
        with self._counting():
            if not part.exists():
                self._make_room(size)
            part.parent.mkdir(exist_ok=True)
            file = part.open("ab")
            self._share(part.parent, 0o7777)
            with suppress(FileNotFoundError):  # it was just completed, and renamed
                self._share(part, 0o666)
            locked = _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, part)
        with file:
            while not locked and not path.exists():
                time.sleep(0.02)
                locked = _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, part)
            try:
                same = locked and os.path.samestat(os.fstat(file.fileno()), part.stat())
            except FileNotFoundError:
                same = False
            if same and path.exists():  # it was completed before this part was made
                part.unlink()
                same = False
            yield same

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Let no other process count, add or remove files of the cache."""
        self.cache.mkdir(parents=True, exist_ok=True)
        lock = self.cache / ".lock"
        with lock.open("ab") as file:  # NFS locks no folder, and no file that is open for reading alone
            self._share(lock, 0o666)
            _flock(file, fcntl.LOCK_EX, lock)
            yield

    def _share(self, made: Path, mode: int) -> None:
        """Give a file or folder of this user the permissions of the cache, for whoever shares it."""
        if made.stat().st_uid == os.geteuid():
            made.chmod(self.cache.stat().st_mode & mode)

    def _make_room(self, size: int) -> None:
        """Remove the files that were not used for longest until `size` bytes more fit."""
        files = sorted(_files(self.cache))
        excess = sum(taken for _, taken, _ in files) + size - self.most_bytes
        in_use = 0
        for _, taken, file in files if size <= self.most_bytes else []:
            if excess <= 0:
                return
            if _removed(file):
                excess -= taken
            else:
                in_use += taken
        if excess > 0:
            raise DataError(
                f"{self.cache}: holds at most {self.most_bytes / 1e9:g} GB, {in_use / 1e9:.3g} GB of it are in use, "
                f"and {size / 1e9:.3g} GB more are needed; set {CACHE_GB} to {_gb(in_use + size)} or more"
            )

    def refuse_larger(self, size: int) -> None:
        """Raise UsageError if the cache can never hold `size` bytes."""
        if size > self.most_bytes:
            raise UsageError(
                f"{self.store.address}: {size / 1e9:.3g} GB of shards are needed and the cache holds at most "
                f"{self.most_bytes / 1e9:g} GB; set {CACHE_GB} to {_gb(size)} or more, choose a smaller fraction, or "
                "draw from a few shards at a time: --window N"
            )


def complete(store: Store, wanted: Wanted, size: int, part: Path, bar: Counter) -> None:
    """Make `part` the whole file, with the right SHA-256 and flushed. Raises DataError."""
    remote = RemoteFile(wanted.name, f"{store.address}/{wanted.name}", size, None)
    if size_of(part) > size:
        os.truncate(part, 0)
    hashed = _Hashed(part, bar)
    for again in (size_of(part) > 0, False):  # what was put together from pieces is fetched once more
        store.fetch(remote, part, hashed)
        if hashed.sha256() == wanted.sha256:
            return
        os.truncate(part, 0)
        hashed.advance(-size)
        if not again:
            break
    raise DataError(
        f"{remote.url}: its SHA-256 is not the manifest's, so it was not used; it was damaged, or another set is being "
        "written to this address"
    )


class _Hashed:
    """A Counter that hashes a file while it grows, so that no time is left for that when its last byte arrives."""

    def __init__(self, file: Path, bar: Counter) -> None:
        """bar: is told the same."""
        self._file, self._bar, self._hash, self._bytes = file, bar, hashlib.sha256(), 0

    def advance(self, amount: int) -> None:
        """The file has grown, or is shorter."""
        self._bar.advance(amount)
        self._follow()

    def resize(self, total: int) -> None:
        """Nothing but the bar has to know."""
        self._bar.resize(total)

    def sha256(self) -> str:
        """The SHA-256 of the file."""
        self._follow()
        return self._hash.hexdigest()

    def _follow(self) -> None:
        """Hash what is new in the file."""
        if size_of(self._file) < self._bytes:
            self._hash, self._bytes = hashlib.sha256(), 0
        if size_of(self._file) > self._bytes:
            with self._file.open("rb") as file:
                file.seek(self._bytes)
                while chunk := file.read(_HASHED_BYTES):
                    self._hash.update(chunk)
                    self._bytes += len(chunk)


def _bytes_of(cache_gb: float | None) -> int:
    """The largest size of the cache."""
    given: Any = os.environ.get(CACHE_GB, _DEFAULT_GB) if cache_gb is None else cache_gb
    try:
        gb = float(given)
    except ValueError:
        gb = 0.0
    if not 0.0 < gb < 1e9:
        raise UsageError(f"{CACHE_GB} {given}: must be a number of GB above 0")
    return int(gb * 1e9)


def _gb(size: int) -> str:
    """The GB that hold `size` bytes, rounded up to a tenth."""
    return f"{-(-size // 100_000_000) / 10:g}"


def _files(cache: Path) -> Iterator[tuple[float, int, Path]]:
    """When each file of a cache was last used, its size, and its path. A part counts with its whole size."""
    for file in cache.glob("*/*"):
        part = _PART.fullmatch(file.name)
        with suppress(FileNotFoundError):
            about = file.stat()
            yield about.st_mtime, int(part[2]) if part else about.st_size, file


def _removed(file: Path) -> bool:
    """Remove a file of the cache, and its folder if that is empty then, unless it is in use."""
    with suppress(FileNotFoundError, PermissionError), file.open("r+b") as opened:
        if not _flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB, file):
            return False
        file.unlink()
        with suppress(OSError):  # other files are in it
            file.parent.rmdir()
    return not file.exists()


def _flock(file: IO[bytes] | int, kind: int, place: Path) -> bool:
    """Lock an open file until it is closed; False if another one has the lock and `kind` does not wait."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        raise DataError(
            f"{place}: its file system has no locks ({error.strerror}); set {CACHE} to a folder on another one"
        ) from None
    return True


# ------------------------------------------------------------------ writing


class Upload:
    """A set on its way to a store, file by file and the manifest last. Files that arrived before are not sent again.

    Files may be sent from several threads. What has arrived is noted on this machine (`kept`), with its version in the
    store.
    """

    def __init__(self, address: str, overwrite: bool, again: bytes | None = None) -> None:
        """again: the manifest of the set if it may be there already.

        Raises DataError if the address holds anything but a shard set, or another shard set and `overwrite` is False;
        UsageError if nothing can be written there.
        """
        self.store, self._sent, self._lock = Store(address), set[str](), threading.Lock()
        self._kept = {MANIFEST}
        if self.store.reads_only:
            raise UsageError(f"{address}: a web server takes no files; choose s3://, gs://, hf:// or a folder")
        self._before = self.store.names()
        if name := foreign(self._before):
            raise DataError(f"{address}: holds '{name}', which is not part of a shard set; choose a new address")
        if MANIFEST in self._before:
            if self.store.read(MANIFEST, _MOST_MANIFEST_BYTES) == again:
                self._kept |= {*CARDS}  # they may have been written there
            elif not overwrite:
                raise DataError(f"{address}: already holds a shard set; add --overwrite to replace it")

    def send(self, name: str, content: bytes | Path, sha256: str) -> bool:
        """Put a file there; False if it was there already. The manifest of an older set is removed before."""
        self._sent.add(name)
        key = {"address": f"{self.store.address}/{name}", "sha256": sha256}
        receipt = kept.recall("sent", key, {"version": str}) if name in self._before else None
        if receipt is not None and self.store.version(name).token == receipt["version"]:
            return False
        with self._lock:  # what is there is no set until the new one is whole
            if MANIFEST in self._before:
                self.store.remove(MANIFEST)
                self._before.discard(MANIFEST)
        kept.keep("sent", key, {"version": self.store.write(name, content).token})
        return True

    def finish(self, manifest: bytes) -> None:
        """Remove what else there is of an older set, and write the manifest."""
        for name in sorted(self._before - self._sent - self._kept):
            self.store.remove(name)
        self.store.write(MANIFEST, manifest)
