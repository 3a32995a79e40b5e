"""What several tests of the benchmarks share: images like HAM10000's, and jobs on them."""

from pathlib import Path

import pytest

from benchmarks.datasets import Job
from tests.support.benchdata import IMAGES
from tests.support.rawdata import write_raw


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like HAM10000's, with pictures of its size. No test writes into it."""
    return write_raw(tmp_path_factory.mktemp("images") / "ham", IMAGES, (450, 600))


@pytest.fixture(scope="module")
def job(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Images of 160 px, each twice, in batches of 8 at 64 px."""
    return Job(source, tmp_path_factory.mktemp("bench"), 160, 64, batch_size=8, copies=2)


@pytest.fixture(scope="module")
def small_job(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Images of 64 px, each once, in batches of 8 at 32 px: for whole runs."""
    return Job(source, tmp_path_factory.mktemp("bench"), 64, 32, batch_size=8, copies=1)
