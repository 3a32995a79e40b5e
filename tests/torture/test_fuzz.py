"""Damaged input never ends a reader in a traceback, a hang or a flood of memory. `make fuzz` does so for the C code."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from shards import ShardSet
from shards.common.errors import DataError
from shards.format import INDEX
from shards.labelmap import read_map
from tests.conftest import write_set
from tests.support.parity import change_manifest
from tests.support.train_runs import child_environment
from tests.torture.fuzz import TARGETS

pytestmark = pytest.mark.slow
SHARES = {"manifest": 300_000, "table": 250_000, "picture": 150_000, "condition": 100_000, "weights": 50_000}
OTHERS = 75_000
"""Inputs of a full run: a million in all."""
PIECE = 25_000
"""Inputs of one process."""


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_read_or_refused(name: str, tmp_path: Path, times: Callable, record: Callable) -> None:
    left, seed, cases = times(300, SHARES.get(name, OTHERS)), 0, list[Counter[str]]()
    longest = peak = 0.0
    while left:
        count, folder = min(left, PIECE), tmp_path / str(seed)
        folder.mkdir()
        command = [sys.executable, "-m", "tests.torture.fuzz", name, str(seed), str(count), str(folder)]
        done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}\n{(folder / 'input').read_bytes()[:2000]!r}"
        found = json.loads(done.stdout)
        cases = [a + Counter(b) for a, b in zip_longest(cases, found["cases"], fillvalue=Counter())]
        longest, peak = max(longest, found["longest_s"]), max(peak, found["peak_bytes"])
        left, seed = left - count, seed + 1
    total = sum(cases, Counter())
    assert all(counts["refused"] for counts in cases)
    assert total["read"] > total["refused"] / 1000  # damage that no reader can see; with it, not only the first check
    record(target=name, **total, cases=cases, longest_s=longest, peak_bytes=peak)


def test_a_message_stays_on_one_line_whatever_it_quotes(tmp_path: Path) -> None:
    """Found by fuzzing: names of columns and splits with line breaks."""
    table, folder = tmp_path / "table.csv", write_set(tmp_path / "set", images=20)
    table.write_bytes(b'image,"at\r\n\x1b[2Jment"\nA.jpg,4\n')
    with pytest.raises(DataError, match=r"^[^\x00-\x1f]*at  +\[2Jment[^\x00-\x1f]*$"):
        read_map(str(table))
    rows = parquet.read_table(folder / INDEX)
    splits = pa.array(["tra\nn", *rows["split"].to_pylist()[1:]])
    parquet.write_table(rows.set_column(rows.schema.get_field_index("split"), "split", splits), folder / INDEX)
    digest = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
    change_manifest(folder, lambda content: content.update(index_sha256=digest))
    with pytest.raises(DataError, match=r"^[^\x00-\x1f]*'tra n'[^\x00-\x1f]*$"):
        ShardSet(folder)
