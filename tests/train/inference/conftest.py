"""Raw images, and a run on the set that was packed from them, for all tests of inference."""

from pathlib import Path

import pytest

from preprocess.ham10000 import read_source
from preprocess.packing import Settings, pack
from shards.format import EncodeSpec
from tests.support.rawdata import write_raw
from tests.support.train_runs import small
from train.loop import train_once


def train_on(raw: Path, folder: Path, encode: EncodeSpec, **changes: object) -> Path:
    """Pack a raw folder into `folder`/shards and train one epoch on it; the run, `folder`/run."""
    pack(read_source(raw), folder / "shards", Settings(encode=encode))
    train_once(small(folder / "shards", epochs=1, **changes), folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw"), images=70, size=(60, 80))


@pytest.fixture(scope="session")
def run(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet, JPEG, balanced prior, 70 % of the training lesions; the shard set is beside it."""
    encode = EncodeSpec(max_resolution=64, jpeg_quality=85)
    return train_on(raw, tmp_path_factory.mktemp("inference"), encode, model="resnet18", fraction=0.7)
