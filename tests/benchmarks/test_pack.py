"""The writers: what they pack, what is timed, and how close the packed images are to their originals."""

import cv2
import numpy as np
import pytest

from benchmarks.datasets import Job, originals
from benchmarks.pack import PACKERS, judge, psnr_db, set_up
from tests.support.benchdata import IMAGES, in_a_process_of_its_own, skip_without


@pytest.mark.parametrize("name", ["dermscale raw", "webdataset", "ceiling: bare calls"])
def test_files_are_found_before_a_packer_is_timed(job, tmp_path, monkeypatch, name):
    skip_without(PACKERS[name].packages)
    (tmp_path / "warm").mkdir()
    PACKERS[name].write(job, tmp_path / "warm")
    for found in ("benchmarks.datasets.read_source", "preprocess.ham10000.read_source", "benchmarks.pack.prepared"):
        monkeypatch.setattr(found, lambda *_: pytest.fail("looks for its files in a timed round"))
    (tmp_path / "timed").mkdir()
    PACKERS[name].write(job, tmp_path / "timed")


def test_the_bare_calls_only_decode_reduce_and_encode(job, tmp_path, monkeypatch):
    for beside in ("decode_upright", "decode_strictly", "exif_orientation", "channel_sums", "encode_jpeg"):
        monkeypatch.setattr(f"shards.encode.{beside}", lambda *_: pytest.fail("does more than that"))
    PACKERS["ceiling: bare calls"].write(job, tmp_path)


def packed_by(name: str, job: Job) -> tuple[int, dict[str, float]]:
    """The images that a packer wrote, and what it says of them."""
    running = set_up(name, job)
    return running.once(), running.about


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKERS)
def test_packer_writes_what_can_be_read(name, job):
    skip_without(PACKERS[name].packages)
    count, about = in_a_process_of_its_own(packed_by, name, job)
    assert count == IMAGES * 2
    if name.startswith("ceiling"):
        assert not about
        return
    assert about["psnr_source_db"] > 30
    assert about["psnr_reduced_db"] > 30
    assert 0 < about["bytes_per_image"] <= about["file_bytes_per_image"]
    if PACKERS[name].encoding == "raw":
        assert 160 * 120 * 3 <= about["bytes_per_image"] < 160 * 120 * 3 + 200


def test_psnr_of_known_differences():
    assert psnr_db([1.0]) == pytest.approx(48.13, abs=0.01)
    assert psnr_db([0.0, 4.0]) == pytest.approx(10 * np.log10(255**2 / 2))
    assert psnr_db([0.0]) == float("inf")
    with pytest.raises(ValueError):
        psnr_db([])


def test_psnr_falls_with_what_is_lost(job):
    first = originals(job)[0][0]
    pixels = cv2.cvtColor(cv2.imread(str(first)), cv2.COLOR_BGR2RGB)
    small = cv2.resize(pixels, (160, 120), interpolation=cv2.INTER_AREA)
    worse = cv2.GaussianBlur(small, (0, 0), 5)
    good, bad = (judge(job, iter([(first.stem, image)])) for image in (small, worse))
    assert good["psnr_reduced_db"] > 55
    assert bad["psnr_reduced_db"] < good["psnr_reduced_db"]
    assert bad["psnr_source_db"] < good["psnr_source_db"]


def test_psnr_is_of_the_same_originals_in_whatever_order_they_were_packed(job, monkeypatch):
    monkeypatch.setattr("benchmarks.pack._JUDGED", 3)
    paths = [path for path, _, _ in originals(job)]
    packed = [(p.stem, cv2.resize(cv2.imread(str(p), cv2.IMREAD_COLOR_RGB), (160, 120))) for p in paths[:6]]
    assert judge(job, iter(packed)) == pytest.approx(judge(job, iter([*packed[::-1], *packed])))
