"""The plan: a pure function of (seed, epoch, sample); its crops against torchvision's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import plan
from shards.common.errors import UsageError
from shards.kernels.load import compiled
from shards.kernels.workers import LEFT, Drawing, Room, Source, start_workers
from shards.plan import Augment, evaluation_plan, numpy_plan, training_plan


def make(samples, seed=3, epoch=1, height=300, width=400, augment=None):
    samples = np.asarray(samples)
    sides = np.full(len(samples), height), np.full(len(samples), width)
    return training_plan(seed, epoch, samples, *sides, augment or Augment())


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=40), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=25)
def test_a_sample_has_the_same_plan_in_any_company(samples, seed, epoch):
    together = make(samples, seed, epoch)
    for i, sample in enumerate(samples[:3]):
        alone = make([sample], seed, epoch)
        for name in ("boxes", "symmetry", "colour"):
            assert np.array_equal(getattr(alone, name)[0], getattr(together, name)[i])


def test_the_plan_is_written_down():
    # A change of these figures makes old runs irreproducible.
    p = make([0, 5, 70_000])
    assert p.boxes.tolist() == [[53, 21, 228, 280], [13, 162, 269, 216], [21, 33, 207, 249]]
    assert p.symmetry.tolist() == [1, 5, 7]
    expected = [1.2028050422668457, -0.048302605748176575, -0.028383728116750717, 0.012424368411302567]
    assert p.colour[1, 0].tolist() == expected


@given(st.integers(1, 500), st.integers(1, 500))
@settings(max_examples=60)
def test_boxes_lie_in_the_image(height, width):
    boxes = make(range(50), height=height, width=width).boxes
    assert (boxes >= [0, 0, 1, 1]).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (boxes[:, 1] + boxes[:, 3] <= width).all()
    square = evaluation_plan(np.array([height]), np.array([width]), Augment()).boxes[0]
    assert square[2] == square[3] >= 1 and square[0] + square[2] <= height and square[1] + square[3] <= width


@pytest.mark.parametrize(("height", "width"), [(300, 400), (450, 600), (100, 400)])
def test_crops_are_distributed_as_torchvisions(height, width):
    import torch
    from scipy.stats import ks_2samp
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    n = 4000
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.25, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    ours = make(range(n), height=height, width=width).boxes
    for name, a, b in zip("yxhw", ours.T, theirs.T, strict=True):
        assert ks_2samp(a, b).statistic < 1.95 * np.sqrt(2 / n), name  # 1.95: one such difference in 1,000 by chance


def test_symmetries_are_drawn_evenly_and_can_be_turned_off():
    counts = np.bincount(make(range(8000)).symmetry, minlength=8)
    assert len(counts) == 8 and np.abs(counts - 1000).max() < 150
    assert not make(range(100), augment=Augment(symmetries=False)).symmetry.any()


def test_colour_is_brightness_contrast_then_saturation_and_hue():
    augment = Augment()
    p = make(range(200), augment=augment)
    draws = plan._uniform(3, 1, np.arange(200))[:, 23:27]
    to_yiq = np.array([plan.LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    rgb = np.random.default_rng(0).uniform(0, 1, 3)
    for colour, (b, c, s, h) in zip(p.colour, draws, strict=True):
        x = rgb * (1 + augment.brightness * (2 * b - 1))
        x = (x - 0.5) * (1 + augment.contrast * (2 * c - 1)) + 0.5
        y, i, q = to_yiq @ x
        angle, saturation = (2 * h - 1) * augment.hue * 2 * np.pi, 1 + augment.saturation * (2 * s - 1)
        chroma = complex(i, q) * saturation * np.exp(1j * angle)
        expected = np.linalg.solve(to_yiq, [y, chroma.real, chroma.imag])
        assert np.allclose(colour[:, :3] @ rgb + colour[:, 3], expected, atol=2e-4)


def test_grey_stays_grey_and_evaluation_changes_nothing():
    p = make(range(100))
    grey = np.full(3, 0.37)
    out = p.colour[:, :, :3] @ grey + p.colour[:, :, 3]
    assert np.ptp(out, axis=1).max() < 1e-5
    identity = evaluation_plan(np.array([30]), np.array([40]), Augment())
    assert identity.colour[0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert identity.symmetry.tolist() == [0]


def test_series_equal_the_library_functions():
    x = np.linspace(-1.38, 1.38, 1001)
    assert np.allclose(plan._exp(x), np.exp(x), rtol=1e-14)
    assert np.allclose(plan._sin(x), np.sin(x), atol=1e-14) and np.allclose(plan._cos(x), np.cos(x), atol=1e-14)
    assert plan._log(4 / 3) == pytest.approx(np.log(4 / 3), abs=1e-15)


@pytest.mark.parametrize(
    "values",
    [
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.2)},
        {"ratio": (0.5, 1.0)},
        {"hue": 0.3},
        {"contrast": 1.0},
        {"eval_crop": 0.0},
        {"interpolation": "nearest"},
    ],
)
def test_values_without_meaning_are_refused(values):
    with pytest.raises(UsageError, match=next(iter(values)).split("_")[0]):
        Augment(**values)


@pytest.mark.skipif(compiled() is None, reason="the compiled library was not built")
@given(count=st.integers(1, 300), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40), wild=st.booleans())
@settings(max_examples=40)
def test_the_compiled_plan_is_that_of_numpy_to_the_bit(count, seed, epoch, wild):
    rng = np.random.default_rng(count)
    samples = rng.permutation(300_000)[:count]
    heights, widths = rng.integers(1, 700, (2, count)).astype(np.uint16)
    augment = Augment()
    if wild:
        augment = Augment((0.05, 1.0), (0.25, 4.0), bool(count % 2), 0.9, 0.9, 0.9, 0.25)
    found = training_plan(seed, epoch, samples, heights, widths, augment)
    expected = numpy_plan(seed, epoch, samples, heights, widths, augment)
    assert np.array_equal(found.boxes, expected.boxes) and np.array_equal(found.symmetry, expected.symmetry)
    assert np.array_equal(found.colour.view(np.uint32), expected.colour.view(np.uint32))


@pytest.mark.skipif(compiled() is None, reason="the compiled library was not built")
@pytest.mark.parametrize("augment", [Augment(), Augment((1.0, 1.0), (0.9, 1 / 0.9), symmetries=False, eval_crop=0.4)])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("side", [8, 0])
def test_what_the_threads_draw_has_the_plan_of_numpy(shard_sets, augment, train, side):
    data = shard_sets["sizes"]
    rows, labels = np.arange(len(data))[::-1].copy(), np.arange(len(data)) + 100
    positions = np.random.default_rng(1).permutation(len(data))
    room = Room((len(data), 8, 8, 3), lambda shape: np.empty(shape, np.uint8))
    with start_workers(data, 2) or pytest.skip("no kernel for this processor") as workers:
        source = Source(rows, labels, augment, 7, train)
        status = Drawing(workers, source, (3, positions, positions.ctypes.data), room, side).result()
    assert (status is None) if side else (status is not None and (status == LEFT).all())
    sides = data.column("height")[rows[positions]], data.column("width")[rows[positions]]
    if train:
        expected = numpy_plan(7, 3, rows[positions], *sides, augment)
    else:
        expected = evaluation_plan(*sides, augment)
    assert np.array_equal(room.samples, rows[positions]) and np.array_equal(room.labels, labels[positions])
    assert np.array_equal(room.boxes, expected.boxes) and np.array_equal(room.symmetry, expected.symmetry)
    assert np.array_equal(room.colour.view(np.uint32), expected.colour.view(np.uint32))
