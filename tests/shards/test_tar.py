"""Our tar headers are tarfile's, byte for byte, and a shard's index points at its contents."""

import hashlib
import tarfile

from hypothesis import given, settings
from hypothesis import strategies as st

from shards.tar import Shard, index_of, tar_header

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/"), min_size=1, max_size=95)


@settings(deadline=None)
@given(NAMES, st.integers(0, 8**11 - 1))
def test_headers_are_those_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    assert tar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


@settings(deadline=None, max_examples=30)  # each flushes to the disk
@given(st.lists(st.lists(st.binary(max_size=1500), min_size=1, max_size=3), min_size=1, max_size=5))
def test_offsets_hash_and_index_are_those_of_the_file(tmp_path_factory, samples):
    folder = tmp_path_factory.mktemp("tar")
    shard = Shard(folder, 7, "train")
    offsets = [shard.add(f"s{i}", [(f"e{j}", c) for j, c in enumerate(members)]) for i, members in enumerate(samples)]
    info = shard.complete()
    data = (folder / "shard-00007.tar").read_bytes()
    assert (info.file, info.samples, info.bytes) == ("shard-00007.tar", len(samples), len(data))
    assert info.sha256 == hashlib.sha256(data).hexdigest()
    for offset, members in zip(offsets, samples, strict=True):
        assert data[offset : offset + len(members[0])] == members[0]
    assert index_of(folder / "shard-00007.tar") == (folder / "shard-00007.idx").read_bytes()
    lines = (folder / "shard-00007.idx").read_text().splitlines()
    assert lines[0] == f"v1.2 {len(samples)}"
    found = {}
    for line in lines[1:]:
        fields = line.split()
        for extension, position, size, name in zip(*[iter(fields)] * 4, strict=True):
            assert name.endswith(f".{extension}")
            found[name] = data[int(position) : int(position) + int(size)]
    with tarfile.open(folder / "shard-00007.tar") as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == found
    assert len(found) == sum(map(len, samples))
