"""The `predict` benchmark: both sides judge the same images alike, and nothing but a start is timed as one."""

import numpy as np
import pytest

from benchmarks.datasets import Job
from benchmarks.machine import environment
from benchmarks.measure import Row, Sample, Series
from benchmarks.predict import (
    EVALUATION,
    PREDICT,
    PREDICT_PLAIN,
    START_PREDICT,
    START_SERVE,
    PredictJob,
    StartFailedError,
    full_batches,
    make_run,
    measure_predicting,
    plain_files,
    predicting_in_words,
    predicting_text,
    rows_of,
    set_up,
    shard_files,
    start_predict,
    start_serve,
)
from benchmarks.targets import verdict
from shards.common.errors import DataError
from tests.support.benchdata import IMAGES, write_source


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Job:
    source = write_source(tmp_path_factory.mktemp("ham"))
    return Job(source, tmp_path_factory.mktemp("bench"), packed_px=64, resolution_px=32, batch_size=16, copies=1)


@pytest.fixture(scope="module")
def job(images: Job) -> PredictJob:
    return PredictJob(images, make_run(images, "resnet18", "cpu"))


def timed(*seconds: float) -> Series:
    return Series([Sample(100, one, one, 0.1) for one in seconds])


def test_batches_are_as_full_as_they_can_be_in_as_few_as_there_must_be():
    for count in range(1, 200):
        for most in (1, 7, 64):
            size = full_batches(count, most)
            batches = -(-count // size)
            assert 1 <= size <= most and batches == -(-count // most)
            assert batches * size - count < batches  # with one image less in each they would not be enough


def test_rows_are_judged_by_their_interval(images):
    series = {
        EVALUATION: timed(*[2.0] * 6),
        PREDICT: timed(*[2.5] * 6),
        PREDICT_PLAIN: timed(3.0, 3.0, 3.0, 4.0, 4.0, 4.0),
    }
    started = {START_PREDICT: timed(*[6.0] * 6), START_SERVE: Series(failed="StartFailedError: no gradio")}
    rows = rows_of(series, started, images, "resnet18", "400x300", environment("x"))
    ratios = {row.system: row for row in rows if row.beside}
    assert ratios[PREDICT].value == pytest.approx(0.8)
    assert verdict(ratios[PREDICT]) == "at least 0.6: held"
    assert verdict(ratios[PREDICT_PLAIN]).startswith("at least 0.6: undecided")  # 0.67 in some rounds, 0.5 in others
    starts = {row.system: row for row in rows if row.metric == "start_s"}
    assert starts[START_PREDICT].value == 6.0 and starts[START_PREDICT].other_cpu == 0.1
    assert verdict(starts[START_PREDICT]) == "under 5 s: missed"
    assert starts[START_SERVE].value is None and not verdict(starts[START_SERVE])
    (speed,) = (row for row in rows if row.system == EVALUATION and row.metric == "img_per_s")
    assert (speed.value, speed.batch_size, verdict(speed)) == (50.0, 14, "")
    text = predicting_text(rows)
    assert f"| {START_PREDICT} | 6.00 [6.00, 6.00] | under 5 s: missed |" in text
    assert f"| {PREDICT} / {EVALUATION} | 0.80 [0.80, 0.80] | at least 0.6: held |" in text
    assert "no gradio" in text
    words = predicting_in_words(rows)
    assert len(words) == 4 and any(line.endswith("failed: StartFailedError: no gradio.") for line in words)


def test_one_run_of_a_system_decides_nothing():
    assert verdict(Row("predict", START_PREDICT, "start_s", "s", 1.0)) == ""


def test_what_cannot_start_is_no_figure(tmp_path):
    with pytest.raises(StartFailedError, match="not a run folder"):
        start_predict(tmp_path, tmp_path / "image.jpg", "cpu")


def test_without_images_there_is_no_measurement(tmp_path):
    empty = Job(tmp_path, tmp_path / "bench")
    with pytest.raises(DataError, match=r"HAM10000_metadata\.csv"):
        measure_predicting(empty, "resnet18", "cpu", environment("x"), rounds=5, seconds=0, announce=lambda step: None)


@pytest.mark.slow
def test_every_system_judges_every_image(job):
    for name in (EVALUATION, PREDICT, PREDICT_PLAIN):
        assert set_up(name, job).once() == IMAGES


@pytest.mark.slow
def test_both_sides_are_given_the_same_images(job):
    from shards import Loader, ShardSet
    from train.inference.images import read_image
    from train.inference.predictor import Predictor

    selection = ShardSet(next(job.images.cache.glob("*/shards-jpg-64/set"))).select("train")
    predictor = Predictor(job.run, "cpu")
    loader = Loader(selection, batch_size=IMAGES, resolution=32, train=False, engine="native")
    (batch,) = loader
    seen = batch.images.permute(0, 2, 3, 1).numpy()
    exact, plain = (
        np.stack([predictor.prepare(read_image(path), path.stem).square for path in files])
        for files in (shard_files(job.images, selection), plain_files(job.images, selection))
    )
    loader.close()
    assert np.array_equal(seen, exact)
    apart = np.abs(seen.astype(int) - plain).mean(axis=(1, 2, 3))
    assert 0 < apart.max() < 4  # encoded once more
    others = np.abs(seen.astype(int) - np.roll(plain, 1, axis=0)).mean(axis=(1, 2, 3))
    assert (apart < others).all()
    assert read_image(shard_files(job.images, selection)[0]).packed
    assert not read_image(plain_files(job.images, selection)[0]).packed


@pytest.mark.slow
def test_starts_are_timed(job):
    sample = start_predict(job.run, next(job.images.source.rglob("*.jpg")), "cpu")
    assert sample.count == 1 and sample.cpu_s > 0.2 and sample.seconds > 0.2
    pytest.importorskip("gradio", reason="gradio is not installed (pip install 'dermscale[serve]')")
    sample = start_serve(job.run, "cpu")
    assert sample.count == 1 and sample.cpu_s > 0.2 and sample.seconds > 0.2
    assert 0 <= sample.other_cpu <= 1
    with pytest.raises(StartFailedError, match="not a run folder"):
        start_serve(job.images.source, "cpu")
