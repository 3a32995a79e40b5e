"""Shards that shrink while they are read: one line, and not the end of the process by SIGBUS."""

import subprocess
import sys

import pytest

from shards.kernels.load import compiled
from tests.conftest import write_set

_SCRIPT = """
import os, sys
from contextlib import closing
from shards import Loader, ShardSet
from shards.common.errors import DataError

data = ShardSet(sys.argv[1])
how = sys.argv[2]
loader = Loader(data.select("train"), batch_size=8, resolution=32, threads=2)
batches = iter(loader)
next(batches)
for shard in data.manifest.shards:
    os.truncate(data.path / shard.file, 4096)
try:
    if how == "read":
        for sample in range(len(data)):
            data.read(sample)
    else:
        for epoch in range(3):
            for batch in loader:
                pass
except DataError as error:
    print(error)
"""


@pytest.mark.skipif(compiled() is None, reason="the compiled library was not built")
@pytest.mark.parametrize("how", ["read", "load"])
@pytest.mark.parametrize("encoding", ["raw", "jpg"])
def test_a_file_that_is_truncated_under_a_reader_is_one_line(tmp_path, encoding, how):
    out = write_set(tmp_path / "set", encoding)
    command = [sys.executable, "-X", "faulthandler", "-c", _SCRIPT, str(out), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "damaged in" in done.stdout and "become shorter since it was opened" in done.stdout
