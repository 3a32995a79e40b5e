"""The restart table: any decoder reads the file, and a cut region has exactly the whole image's pixels."""

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.jpeg import cut_region, encode_jpeg, restart_interval
from tests.conftest import picture


def decode(data) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return image


@given(st.data(), st.integers(17, 220), st.integers(17, 220), st.sampled_from(["420", "422", "444"]))
@settings(max_examples=80, deadline=None)
def test_a_region_has_the_pixels_of_the_whole(data, height, width, subsampling):
    image = picture(np.random.default_rng(height * width), 3, height, width)
    encoded = encode_jpeg(image, 90, subsampling)
    whole = decode(encoded)
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    y, x = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    part = cut_region(memoryview(encoded), height, width, y, x, h, w)
    if part is not None:
        pixels = decode(part[0])
        assert pixels.size <= whole.size
        crop = pixels[y - part[1] : y - part[1] + h, x - part[2] : x - part[2] + w]
        assert np.array_equal(crop, whole[y : y + h, x : x + w])


def test_a_small_box_is_cut_small():
    encoded = encode_jpeg(picture(np.random.default_rng(0), 1, 300, 400))
    part = cut_region(memoryview(encoded), 300, 400, 100, 100, 60, 60)
    assert part is not None
    assert decode(part[0]).size < 0.15 * 300 * 400 * 3
    assert len(part[0]) < 0.3 * len(encoded)
    assert cut_region(memoryview(encoded), 300, 400, 0, 0, 300, 400) is None


@pytest.mark.parametrize("subsampling", ["420", "422", "444"])
def test_the_table_changes_no_pixel_and_other_decoders_read_the_file(subsampling):
    image = picture(np.random.default_rng(0), 1, 100, 140)
    with_table, without = (encode_jpeg(image, 90, subsampling, restart) for restart in (True, False))
    assert np.array_equal(decode(with_table), decode(without))
    assert np.array_equal(decode(with_table), np.asarray(Image.open(io.BytesIO(with_table)).convert("RGB")))
    assert cut_region(memoryview(without), 100, 140, 0, 0, 20, 20) is None
    assert abs(len(with_table) / len(without) - 1) < 0.25


@given(st.integers(16, 4000))
def test_restart_runs_divide_the_row(width):
    row = -(-width // 16)
    assert row % restart_interval(width, 16) == 0
