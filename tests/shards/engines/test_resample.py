"""The compiled resize: every level gives the same, within 1 of OpenCV's, and writes nothing beside its target."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.engines.resample import Resampler
from shards.kernels.load import LEVELS, in_use

LEVEL = LEVELS.index(in_use()["resize"])
needs_kernel = pytest.mark.skipif(LEVEL == 0, reason="the kernel is not built, or the processor has no AVX2")


def by_opencv(crop: np.ndarray, symmetry: int, side: int) -> np.ndarray:
    """The branch for machines without the kernel."""
    out = np.empty((side, side, 3), np.uint8)
    Resampler(side, level=0)(crop, symmetry, out)
    return out


@needs_kernel
@given(
    st.integers(1, 300), st.integers(1, 300), st.integers(1, 260), st.sampled_from([3, 4]), st.integers(0, 7), st.data()
)
@settings(max_examples=300, deadline=None)
def test_every_level_is_the_same_and_within_one_of_opencv(height, width, side, channels, symmetry, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    image = rng.integers(0, 256, (height + 3, width + 5, channels), np.uint8)
    crop = image[1 : 1 + height, 2 : 2 + width]  # its rows lie apart
    found = []
    for level in range(1, LEVEL + 1):
        out = np.full((side + 2, side, 3), 77, np.uint8)
        Resampler(side, level)(crop, symmetry, out[1:-1])
        assert (out[0] == 77).all() and (out[-1] == 77).all()
        found.append(out[1:-1])
    assert all(np.array_equal(found[0], other) for other in found)
    difference = np.abs(found[0].astype(int) - by_opencv(crop, symmetry, side))
    assert difference.max() <= 1


@needs_kernel
def test_the_kernel_rounds_to_the_nearest():
    """Against the same interpolation in float64: the mean error is that of rounding, 0.25, and no value is 1 off."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (57, 83, 3), np.uint8)
    out = np.empty((64, 64, 3), np.uint8)
    Resampler(64)(image, 0, out)

    def weights(size: int) -> np.ndarray:
        at = np.clip((np.arange(64) + 0.5) * size / 64 - 0.5, 0, size - 1)
        low = np.minimum(at.astype(int), size - 2)
        matrix = np.zeros((64, size))
        matrix[np.arange(64), low], matrix[np.arange(64), low + 1] = 1 - (at - low), at - low
        return matrix

    exact = np.einsum("iy,yxc,jx->ijc", weights(57), image.astype(float), weights(83))
    error = np.abs(out - exact)
    assert error.max() < 0.55 and error.mean() < 0.26


def test_equal_images_stay_equal_whatever_their_size():
    """A grey of one value has no other value anywhere, whichever branch this machine takes."""
    for side in (1, 7, 48, 224):
        for value in (0, 1, 128, 255):
            out = np.empty((side, side, 3), np.uint8)
            Resampler(side)(np.full((50, 70, 3), value, np.uint8), 5, out)
            assert (out == value).all()


@pytest.mark.parametrize("level", [0, None])
def test_what_the_kernel_would_misread_is_refused(level):
    image, out = np.zeros((9, 11, 3), np.uint8), np.zeros((7, 7, 3), np.uint8)
    resize = Resampler(7, level)
    for wrong in (
        image[:0],
        image[:, :0],
        image[..., :1],
        image[..., ::-1],
        image[:, ::2],
        image.astype(np.float32),
        np.zeros((1, 65536, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match="resize"):
            resize(wrong, 0, out)
    for wrong in (out[:6], out[::-1], np.zeros((7, 7, 3), np.float32), np.broadcast_to(np.uint8(0), (7, 7, 3))):
        with pytest.raises(ValueError, match="resize"):
            resize(image, 0, wrong)
    resize(image[::-1], 0, out)  # rows may stand in any order
