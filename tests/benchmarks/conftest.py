"""What several tests of the benchmarks share: images like HAM10000's, and jobs on them."""

from pathlib import Path

import pytest

from benchmarks.datasets import Job
from tests.support.benchdata import write_source


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like HAM10000's. No test writes into it."""
    return write_source(tmp_path_factory.mktemp("images") / "ham")


@pytest.fixture(scope="module")
def job(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Images of 160 px, each twice, in batches of 8 at 64 px."""
    return Job(source, tmp_path_factory.mktemp("bench"), 160, 64, batch_size=8, copies=2)


@pytest.fixture(scope="module")
def small_job(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Images of 64 px, each once, in batches of 8 at 32 px: for whole runs."""
    return Job(source, tmp_path_factory.mktemp("bench"), 64, 32, batch_size=8, copies=1)
