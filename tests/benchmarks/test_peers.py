"""The systems of the loader benchmark: the same job for all, the check of their batches, and the command."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.datasets import (
    ORIGINALS,
    PACKED,
    Job,
    described,
    originals,
    packed_size,
    prepared,
    samples,
    sized,
    stats,
)
from benchmarks.options import Settings
from benchmarks.peers.ffcv import max_resolution
from benchmarks.peers.ours import SHARDS_JPG
from benchmarks.peers.pytorch import TARS
from benchmarks.peers.system import MissingPeerError, WrongBatchError, check_batch, need
from benchmarks.run import main
from benchmarks.systems import SYSTEMS, set_up
from benchmarks.tables import read_csv
from shards import Loader, ShardSet
from shards.common.errors import DataError, UsageError
from tests.support.benchdata import IMAGES, in_a_process_of_its_own, skip_without

# ------------------------------------------------------------------ the check of what comes out


def photographs(side: int = 48, n: int = 16) -> np.ndarray:
    random = np.random.default_rng(1)
    found = [
        cv2.resize(random.normal(0, 20, (5, 5, 3)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
        for _ in range(n)
    ]
    return (np.stack(found) + np.array([190, 140, 120])).clip(0, 255).astype(np.uint8)


JOB = Job(Path(), Path(), resolution_px=48, batch_size=16)
MEAN = (190.0, 140.0, 120.0)
LABELS = np.arange(16) % 7


@pytest.mark.parametrize("layout", ["channels last", "channels first"])
def test_photographs_pass(layout):
    images = photographs() if layout == "channels last" else photographs().transpose(0, 3, 1, 2)
    check_batch((images, LABELS), JOB, MEAN)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda x: x[:15], "shape"),
        (lambda x: x[:, :40], "shape"),
        (lambda x: x.astype(np.float32), "type float32"),
        (lambda x: x[..., ::-1].copy(), "not its RGB"),
        (lambda x: np.full_like(x, 150), "flat"),
        (lambda x: np.concatenate([x[:15], np.full_like(x[:1], 150)]), "flat"),
        (lambda x: np.repeat(x[:2], 8, axis=0), "the same"),
        (lambda x: np.random.default_rng(0).integers(0, 256, x.shape, dtype=np.uint8), "not a photograph"),
        (lambda x: x.reshape(16, 3, 48, 48), "not a photograph"),
        (lambda x: x // 128, "flat"),
    ],
)
def test_anything_else_is_refused(broken, said):
    with pytest.raises(WrongBatchError, match=said):
        check_batch((broken(photographs()), LABELS), JOB, MEAN)


@pytest.mark.parametrize("labels", [LABELS[:15], LABELS + 1, LABELS - 1, LABELS.astype(np.float32)])
def test_wrong_labels_are_refused(labels):
    with pytest.raises(WrongBatchError, match="labels"):
        check_batch((photographs(), labels), JOB, MEAN)


# ------------------------------------------------------------------ equal job


def test_formats_of_different_content_have_different_folders():
    writers: dict[str, set] = {}
    for system in SYSTEMS.values():
        writers.setdefault(system.format.name, set()).add(id(system.format))
    assert len(writers) >= 10 and all(len(formats) == 1 for formats in writers.values())


@pytest.mark.parametrize(
    ("size", "px", "packed"),
    [
        ((450, 600), 341, (256, 341)),
        ((450, 600), 400, (300, 400)),
        ((450, 600), 700, (450, 600)),
        ((600, 450), 341, (341, 256)),
    ],
)
def test_ffcv_is_asked_for_the_size_that_all_pack(size, px, packed):
    assert packed_size(*size, px) == packed
    ratio = max_resolution(*size, px) / max(size)  # what FFCV's writer computes with, and cuts to whole pixels
    if ratio < 1:
        assert (int(size[0] * ratio), int(size[1] * ratio)) == packed
    else:
        assert packed == size


def test_our_packer_and_the_others_agree_on_the_size(job):
    data = ShardSet(prepared(SHARDS_JPG, job) / "set")
    assert stats(job)[1] == "160x120"
    assert set(data.column("height").tolist()) == {120}
    assert set(data.column("width").tolist()) == {160}
    assert len(data.select("train")) == IMAGES * 2


def test_all_jpeg_formats_hold_the_same_bytes(job):
    import tarfile

    packed = {path.stem: path.read_bytes() for path in prepared(PACKED, job).rglob("*.jpg")}
    assert len(packed) == IMAGES * 2
    in_tars = {}
    for tar in prepared(TARS, job).glob("*.tar"):
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    in_tars[Path(member.name).stem] = archive.extractfile(member).read()
    assert in_tars == packed


def test_a_format_is_written_once_and_another_source_is_another(job):
    folder = prepared(PACKED, job)
    made = (folder / "stats.json").stat().st_mtime_ns
    assert prepared(PACKED, job) == folder
    assert (folder / "stats.json").stat().st_mtime_ns == made
    assert prepared(ORIGINALS, replace(job, copies=3)) != prepared(ORIGINALS, job)
    assert not list(folder.parent.glob(".*partial*"))


def test_a_source_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="HAM10000_metadata"):
        originals(Job(tmp_path, tmp_path))


def test_samples_fill_a_batch_for_every_worker_so_that_no_loader_drops_what_it_decoded(job):
    fewer = sized(replace(job, batch_size=12), 80, whole_batches=True)
    assert samples(fewer) == samples(job)[:72]
    assert len(ShardSet(prepared(SHARDS_JPG, fewer) / "set").select("train")) == 72


@pytest.mark.parametrize("workers", [1, 3, 10, 32])
def test_every_worker_has_as_many_whole_batches_and_tars(job, workers):
    many = sized(replace(job, workers=workers), 80, whole_batches=True)
    assert len(samples(many)) >= 8 * workers and len(samples(many)) % (8 * workers) == 0
    assert len(set(samples(many))) == len(samples(many))
    assert len(list(prepared(TARS, many).glob("*.tar"))) == len(samples(many)) // 8


def test_tars_are_of_the_batch_size_that_was_asked_for(job):
    assert prepared(TARS, job) != prepared(TARS, replace(job, batch_size=16))


def test_a_job_has_its_size_whatever_the_source_holds(job):
    assert (sized(job, 120).copies, len(samples(sized(job, 120)))) == (3, 120)
    assert len(samples(sized(job, 20))) == 20
    part = sized(job, 20, whole_batches=True)
    assert (part.copies, len(originals(part)), len(samples(part))) == (1, 20, 16)
    assert described(part).startswith(f"20 images of {job.source.name}, the first 16 samples")
    assert prepared(ORIGINALS, part) != prepared(ORIGINALS, job)


def test_a_round_leaves_out_the_epoch_that_was_begun_outside_the_clock(job):
    folder = prepared(SHARDS_JPG, job)
    system = SYSTEMS["dermscale native jpg"]

    def first(epoch: int) -> np.ndarray:
        loader = Loader(ShardSet(folder / "set").select("train"), batch_size=8, resolution=64, engine="native")
        loader.set_epoch(epoch)
        return next(iter(loader)).images.numpy()

    epochs = system.open(job, folder)
    for _ in epochs():
        pass  # and the next epoch is under way
    assert system.before
    system.before(epochs)()
    images, _ = next(epochs())
    assert np.array_equal(images.numpy(), first(2)) and not np.array_equal(images.numpy(), first(1))


# ------------------------------------------------------------------ the systems themselves


def counted(name: str, job: Job) -> int:
    """The images of an epoch of a system."""
    return set_up(name, job).once()  # checks the batches first


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_system_gives_an_epoch_of_real_images(name, job):
    skip_without(SYSTEMS[name].packages)
    if SYSTEMS[name].on_gpu and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    count = in_a_process_of_its_own(counted, name, job)
    if SYSTEMS[name].ceiling:
        assert count == IMAGES * 2
    else:  # full batches of 8; workers that batch on their own may each drop one
        assert count % 8 == 0
        assert IMAGES * 2 - 16 <= count <= IMAGES * 2


def test_the_script_installs_what_the_project_samples():
    root = Path(__file__).parents[2]
    named = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["peers"]
    script = (root / "benchmarks/install_peers.sh").read_text().partition('-e "')[2]
    assert sorted(re.findall(r'"([\w-]+>=[\d.]+)"', script)) == sorted(named)


def test_a_missing_peer_says_how_to_get_it():
    with pytest.raises(MissingPeerError, match=r"no-such-distribution.*make peers"):
        need(("torch", "no-such-distribution"))


# ------------------------------------------------------------------ the command


def test_only_those_are_measured_whose_names_are_given():
    whole = Settings("x", False, Path(), Path(), Path(), 5)
    assert whole.chosen(SYSTEMS) == list(SYSTEMS.values())
    assert [s.name for s in replace(whole, only=("ffcv", "SPDL")).chosen(SYSTEMS)] == [
        name for name in SYSTEMS if "FFCV" in name or name == "SPDL"
    ]
    with pytest.raises(UsageError, match=r"they are .*FFCV jpg"):
        replace(whole, only=("nobody",)).chosen(SYSTEMS)


def test_the_loader_command_writes_csv_and_markdown(job, tmp_path):
    options = ["loader", "--quick", "--only", "memory copy", "--source", str(job.source), "--cache", str(job.cache)]
    found = CliRunner().invoke(main, [*options, "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    rows = read_csv(tmp_path / "loader-quick.csv")
    assert {row.metric for row in rows} == {"img_per_s", "cpu_s_per_1000"}
    assert all(row.value and row.environment for row in rows)
    assert "ceiling: memory copy only" in (tmp_path / "loader-quick.md").read_text()
    assert json.dumps(str(tmp_path)) not in (tmp_path / "loader-quick.csv").read_text()
