"""The resize: every level gives the same, within 1 of other libraries, and writes nothing beside its target."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.engines.resample import Resampler
from shards.kernels.load import LEVELS, in_use
from shards.plan import INTERPOLATIONS

LEVEL = LEVELS.index(in_use()["resize"])
needs_kernel = pytest.mark.skipif(LEVEL == 0, reason="the kernel is not built, or the processor has no AVX2")


def without_kernel(crop: np.ndarray, symmetry: int, side: int, interpolation: str = "bilinear") -> np.ndarray:
    """The branch for machines without the kernel."""
    out = np.empty((side, side, 3), np.uint8)
    Resampler(side, 0, interpolation)(crop, symmetry, out)
    return out


def exactly(image: np.ndarray, side: int, cubic: bool) -> np.ndarray:
    """The same interpolation by its definition in float64: (side, side, 3)."""

    def kernel(distance: np.ndarray) -> np.ndarray:
        """Keys 1981, equation 4 with a = -1/2, or a triangle."""
        far = np.abs(distance)
        near, outer = 1.5 * far**3 - 2.5 * far**2 + 1, -0.5 * far**3 + 2.5 * far**2 - 4 * far + 2
        return np.select([far < 1, far < 2], [near, outer], 0) if cubic else np.maximum(1 - far, 0)

    def weights(size: int) -> np.ndarray:
        at, around = (np.arange(side) + 0.5) * size / side - 0.5, np.arange(-2, size + 2)
        matrix = kernel(at[:, None] - around)
        matrix[:, 2] += matrix[:, :2].sum(1)  # beyond the edges: the pixels at the edges
        matrix[:, -3] += matrix[:, -2:].sum(1)
        return matrix[:, 2:-2]

    rows, columns = (weights(size) for size in image.shape[:2])
    return np.clip(np.einsum("iy,yxc,jx->ijc", rows, image.astype(float), columns, optimize=True), 0, 255)


@needs_kernel
@given(
    *(st.integers(1, 300), st.integers(1, 300), st.integers(1, 260), st.sampled_from([3, 4]), st.integers(0, 7)),
    *(st.sampled_from(INTERPOLATIONS), st.data()),
)
@settings(max_examples=400, deadline=None)
def test_every_level_is_the_same(height, width, side, channels, symmetry, interpolation, data):
    """Bilinear, OpenCV takes the place of the kernel: its values differ by at most 1."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    image = rng.integers(0, 256, (height + 3, width + 5, channels), np.uint8)
    crop = image[1 : 1 + height, 2 : 2 + width]  # its rows lie apart
    found = []
    for level in range(1, LEVEL + 1):
        out = np.full((side + 2, side, 3), 77, np.uint8)
        Resampler(side, level, interpolation)(crop, symmetry, out[1:-1])
        assert (out[0] == 77).all() and (out[-1] == 77).all()
        found.append(out[1:-1])
    assert all(np.array_equal(found[0], other) for other in found)
    difference = np.abs(found[0].astype(int) - without_kernel(crop, symmetry, side, interpolation))
    assert difference.max() <= (1 if interpolation == "bilinear" else 0)


@needs_kernel
@pytest.mark.parametrize("side", [19, 64, 200])
@pytest.mark.parametrize("size", [(57, 83), (1, 40), (2, 3), (150, 130)])
def test_bilinear_rounds_to_the_nearest(size, side):
    """The mean error is that of rounding, 0.25, and no value is 1 off."""
    image, out = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8), np.empty((side, side, 3), np.uint8)
    Resampler(side)(image, 0, out)
    error = np.abs(out - exactly(image, side, cubic=False))
    assert error.max() < 0.56 and error.mean() < 0.28


@pytest.mark.parametrize("level", range(LEVEL + 1))
@pytest.mark.parametrize("side", [19, 64, 200])
@pytest.mark.parametrize("size", [(57, 83), (1, 40), (2, 3), (150, 130)])
def test_bicubic_rounds_to_the_nearest(size, side, level):
    """Also where it leaves the range of the pixels, beside black and white."""
    for highest in (2, 256):
        image = np.random.default_rng(0).integers(0, highest, (*size, 3), np.uint8) * np.uint8(510 // highest)
        out = np.empty((side, side, 3), np.uint8)
        Resampler(side, level, "bicubic")(image, 0, out)
        error = np.abs(out - exactly(image, side, cubic=True))
        assert error.max() < 0.6 and error.mean() < 0.28


def test_bicubic_enlarges_as_pillow_does():
    """At the edges Pillow takes fewer pixels, and it limits the values between its passes. It reduces with antialias,
    which engines do not."""
    image = np.random.default_rng(0).integers(64, 192, (40, 50, 3), np.uint8)
    out = np.empty((120, 120, 3), np.uint8)
    Resampler(120, interpolation="bicubic")(image, 0, out)
    pillow = np.asarray(Image.fromarray(image).resize((120, 120), Image.Resampling.BICUBIC))
    inside = (slice(6, -6), slice(6, -6))
    assert np.abs(out[inside].astype(int) - pillow[inside]).max() <= 1


def test_equal_images_stay_equal_whatever_their_size():
    """A grey of one value has no other value anywhere, whichever branch this machine takes."""
    for side, interpolation in itertools.product((1, 7, 48, 224), INTERPOLATIONS):
        for value in (0, 1, 128, 255):
            out = np.empty((side, side, 3), np.uint8)
            Resampler(side, interpolation=interpolation)(np.full((50, 70, 3), value, np.uint8), 5, out)
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
