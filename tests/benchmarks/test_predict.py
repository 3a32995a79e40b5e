"""The `predict` benchmark: both sides judge the same images alike, and nothing but a start is timed as one."""

import numpy as np
import pytest

from benchmarks.datasets import Job
from benchmarks.measure import Series
from benchmarks.predict import (
    EVALUATION,
    PAGE,
    PREDICT,
    PREDICT_PLAIN,
    START_PREDICT,
    START_SERVE,
    PredictJob,
    files_of,
    full_batches,
    make_run,
    measure_predicting,
    rows_of,
    set_up,
    start_predict,
    start_serve,
)
from benchmarks.targets import verdict
from benchmarks.worker import SystemFailedError
from shards.common.errors import DataError
from tests.support.benchdata import IMAGES, measurement, series


@pytest.fixture(scope="module")
def predict_job(small_job: Job) -> PredictJob:
    return PredictJob(small_job, make_run(small_job, "resnet18", "cpu"))


def timed(*seconds: float) -> Series:
    return series(*(100 / one for one in seconds))


def test_batches_are_as_full_as_they_can_be_in_as_few_as_there_must_be():
    for count in range(1, 200):
        for most in (1, 7, 64):
            size = full_batches(count, most)
            batches = -(-count // size)
            assert 1 <= size <= most and batches == -(-count // most)
            assert batches * size - count < batches  # with one image less in each they would not be enough


def test_rows_of_starts_and_speeds_stand_beside_each_other():
    measured = {EVALUATION: timed(*[2.0] * 6), PREDICT: timed(*[2.5] * 6)}
    started = {START_PREDICT: timed(*[6.0] * 6), START_SERVE: Series(failed="SystemFailedError: no gradio")}
    rows = rows_of(measured, started, IMAGES, 16, "400x300", {"benchmark": "predict"})
    (ratio,) = (row for row in rows if row.beside)
    assert ratio.value == pytest.approx(0.8) and verdict(ratio) == "at least 0.6: met"
    starts = {row.system: row for row in rows if row.metric == "start_s"}
    assert starts[START_PREDICT].value == 6.0 and starts[START_PREDICT].other_cpu == 0.25
    assert starts[START_SERVE].value is None and not verdict(starts[START_SERVE])
    (speed,) = (row for row in rows if row.system == EVALUATION and row.metric == "img_per_s")
    assert (speed.value, speed.batch_size) == (50.0, 14)
    text = PAGE.text(rows)
    assert f"| {START_PREDICT} | 6.00 [6.00, 6.00] |" in text and "no gradio" in text


def test_what_cannot_start_is_no_figure(tmp_path):
    with pytest.raises(SystemFailedError, match="not a run folder"):
        start_predict(tmp_path, tmp_path / "image.jpg", "cpu")


def test_without_images_there_is_no_measurement(tmp_path):
    empty = Job(tmp_path, tmp_path / "bench")
    with pytest.raises(DataError, match=r"HAM10000_metadata\.csv"):
        measure_predicting(empty, "resnet18", "cpu", measurement())


@pytest.mark.slow
def test_every_system_judges_every_image(predict_job):
    for name in (EVALUATION, PREDICT, PREDICT_PLAIN):
        assert set_up(name, predict_job).once() == IMAGES


@pytest.mark.slow
def test_both_sides_are_given_the_same_images(predict_job):
    from shards import Loader, ShardSet
    from train.inference.images import read_image
    from train.inference.predictor import Predictor

    selection = ShardSet(next(predict_job.images.cache.glob("*/shards-jpg-64/set"))).select("train")
    predictor = Predictor(predict_job.run, "cpu")
    loader = Loader(selection, batch_size=IMAGES, resolution=32, train=False, engine="native")
    (batch,) = loader
    seen = batch.images.permute(0, 2, 3, 1).numpy()
    exact, plain = (
        np.stack([predictor.prepare(read_image(path), path.stem).square for path in files])
        for files in (files_of(name, predict_job.images, selection) for name in (PREDICT, PREDICT_PLAIN))
    )
    loader.close()
    assert np.array_equal(seen, exact)
    apart = np.abs(seen.astype(int) - plain).mean(axis=(1, 2, 3))
    assert 0 < apart.max() < 4  # encoded once more
    others = np.abs(seen.astype(int) - np.roll(plain, 1, axis=0)).mean(axis=(1, 2, 3))
    assert (apart < others).all()
    for name in (PREDICT, PREDICT_PLAIN):
        assert read_image(files_of(name, predict_job.images, selection)[0]).packed == (name == PREDICT)


@pytest.mark.slow
def test_starts_are_timed(predict_job):
    sample = start_predict(predict_job.run, next(predict_job.images.source.rglob("*.jpg")), "cpu")
    assert sample.count == 1 and sample.cpu_s > 0.2 and sample.seconds > 0.2
    pytest.importorskip("gradio", reason="gradio is not installed (pip install 'dermscale[serve]')")
    sample = start_serve(predict_job.run, "cpu")
    assert sample.count == 1 and sample.cpu_s > 0.2 and sample.seconds > 0.2
    assert 0 <= sample.other_cpu <= 1
    with pytest.raises(SystemFailedError, match="not a run folder"):
        start_serve(predict_job.images.source, "cpu")
