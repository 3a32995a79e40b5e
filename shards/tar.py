"""One tar of a shard set, always the same bytes, with DALI's index of it."""

import hashlib
import os
import tarfile
from functools import cache
from pathlib import Path
from typing import IO

from shards.common.files import write_durably
from shards.format import ShardInfo, shard_name

BLOCK = 512
"""Tar's unit: headers have this size, contents are padded to it."""
_BUFFER = 1 << 20
"""Bytes that go to the system at once: one call per sample would take twice as long as hashing the sample."""


@cache
def _empty_header() -> tuple[bytes, int]:
    """The USTAR header of an empty member without name, time, user or machine, and the sum of its bytes."""
    info = tarfile.TarInfo("")
    info.mtime, info.mode = 0, 0o644
    header = info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    return header, sum(header[:148]) + 8 * ord(" ") + sum(header[156:]) - sum(b"00000000000")


def tar_header(name: str, size: int) -> bytes:
    """The USTAR header of a member: the bytes that `tarfile` makes, in a tenth of the time (each sample has three)."""
    template, total = _empty_header()
    name_field, size_field = name.encode("ascii"), b"%011o" % size
    checksum = b"%06o\0 " % (total + sum(name_field) + sum(size_field))
    return name_field.ljust(100, b"\0") + template[100:124] + size_field + template[135:148] + checksum + template[156:]


def index_name(tar: str) -> str:
    """The file name of a tar's .idx."""
    return f"{tar.removesuffix('.tar')}.idx"


def index_of(tar: Path) -> bytes:
    """The .idx of a complete tar, from its members. Raises tarfile.TarError or ValueError if `tar` is not one."""
    samples: dict[str, list[str]] = {}
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            image_id, _, suffix = member.name.partition(".")
            entry = f"{suffix} {member.offset_data} {member.size} {member.name}"
            samples.setdefault(image_id, []).append(entry)
    return _index([" ".join(entries) for entries in samples.values()])


def _index(lines: list[str]) -> bytes:
    return ("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n").encode()


def member_bytes(length: int) -> int:
    """Bytes that a member with `length` bytes of content takes in a tar: its header, the content, the padding."""
    return BLOCK + length + -length % BLOCK


class Shard:
    """One tar being written, with DALI's index of it (v1.2: `extension offset size name` for each member)."""

    def __init__(self, folder: Path, number: int, split: str) -> None:
        self.path, self.split, self.number = folder / shard_name(number), split, number
        self.samples = self.position = 0
        self._file: IO[bytes] = self.path.open("wb", buffering=_BUFFER)
        self._sha = hashlib.sha256()
        self._lines: list[str] = []

    def _write(self, block: bytes) -> None:
        self._file.write(block)
        self._sha.update(block)
        self.position += len(block)

    def add(self, image_id: str, members: list[tuple[str, bytes]]) -> int:
        """Append one sample; returns the offset of its first member's content in the tar."""
        blocks, entries = [], []
        first = position = self.position + BLOCK
        for suffix, content in members:
            name = f"{image_id}.{suffix}"
            padding = -len(content) % BLOCK
            blocks += [tar_header(name, len(content)), content, b"\0" * padding]
            entries.append(f"{suffix} {position} {len(content)} {name}")
            position += len(content) + padding + BLOCK
        self._write(b"".join(blocks))
        self._lines.append(" ".join(entries))
        self.samples += 1
        return first

    def complete(self) -> ShardInfo:
        """End the archive with two zero blocks, flush it to the disk, close it, and write the .idx."""
        with self._file:
            self._write(b"\0" * (2 * BLOCK))
            self._file.flush()
            os.fsync(self._file.fileno())
        write_durably(self.path.with_suffix(".idx"), _index(self._lines))
        return ShardInfo(self.path.name, self.split, self.samples, self.position, self._sha.hexdigest())

    def close(self) -> None:
        """Close the file of an archive that stays incomplete."""
        self._file.close()
