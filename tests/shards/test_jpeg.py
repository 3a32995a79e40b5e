"""The restart table: any decoder reads the file, and a cut region has exactly the whole image's pixels."""

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.jpeg import TAG, RegionCutter, _cut, encode_jpeg, restart_interval
from shards.kernels.load import compiled
from tests.conftest import picture


def cut_region(raw: memoryview, *place: int) -> tuple[np.ndarray, int, int] | None:
    return RegionCutter()(raw, *place)


def decode(data) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return image


@given(st.data(), st.integers(17, 220), st.integers(17, 220), st.sampled_from(["420", "422", "444"]))
@settings(max_examples=80)
def test_a_region_has_the_pixels_of_the_whole(data, height, width, subsampling):
    image = picture(np.random.default_rng(height * width), 3, height, width)
    encoded = encode_jpeg(image, 90, subsampling)
    whole = decode(encoded)
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    y, x = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    part = cut_region(memoryview(encoded), height, width, y, x, h, w)
    in_numpy = _cut(memoryview(encoded), height, width, y, x, h, w)
    assert (part is None) == (in_numpy is None)
    if part is not None:
        assert np.array_equal(part[0], in_numpy[0]) and part[1:] == in_numpy[1:]
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


@pytest.mark.usefixtures("built")
def test_a_table_that_does_not_fit_its_file_is_not_followed():
    """Neither cut trusts a length: a file that ends early, or whose runs are said to be longer, is left whole."""
    encoded = encode_jpeg(picture(np.random.default_rng(0), 1, 300, 400))
    box = (300, 400, 100, 100, 60, 60)
    assert cut_region(memoryview(encoded), *box) is not None
    for end in range(31, len(encoded) // 3, 7):
        assert cut_region(memoryview(encoded[:end]), *box) is None
    start = encoded.index(TAG) + len(TAG) + 8  # the lengths of the runs
    assert cut_region(memoryview(encoded[:start] + b"\xff" * 100 + encoded[start + 100 :]), *box) is None
    for byte in range(start - 8, start):
        for value in (0, 255):
            changed = bytearray(encoded)
            changed[byte] = value
            cut_region(memoryview(changed), *box)  # whatever comes out: nothing outside the file was read


@pytest.mark.skipif(compiled() is None, reason="the compiled library was not built")
def test_both_cuts_make_the_same_of_damaged_tables():
    rng = np.random.default_rng(0)
    encoded = encode_jpeg(picture(rng, 1, 120, 160))
    start = encoded.index(TAG) + len(TAG)
    cuts = 0
    for _ in range(2000):
        changed = bytearray(encoded[: rng.integers(start, len(encoded))] if rng.random() < 0.1 else encoded)
        for place in rng.integers(start, start + 8 + 2 * 8 * 3, rng.integers(1, 4)).tolist():
            if place < len(changed):
                changed[place] = int(rng.integers(0, 256)) >> int(rng.integers(0, 8)) * int(rng.integers(0, 2))
        box = (120, 160, int(rng.integers(0, 80)), int(rng.integers(0, 80)), 40, 60)
        one, other = (cut(memoryview(changed), *box) for cut in (cut_region, _cut))
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert np.array_equal(one[0], other[0]) and one[1:] == other[1:]
            cuts += 1
    assert 100 < cuts < 1900


def test_a_box_that_is_not_inside_the_image_is_not_cut():
    encoded = memoryview(encode_jpeg(picture(np.random.default_rng(0), 1, 120, 160)))
    most = 2**31 - 1
    boxes = [(-1, 0, 9, 9), (0, -1, 9, 9), (0, 0, 0, 9), (0, 0, 9, 0), (112, 0, 9, 9), (0, 152, 9, 9), (most, 0, 9, 9)]
    for cut in (cut_region, _cut):
        assert cut(encoded, 120, 160, 0, 0, 9, 9) is not None
        for box in [*boxes, (0, most, 9, 9), (9, 9, most, 9), (9, 9, 9, most)]:
            assert cut(encoded, 120, 160, *box) is None
        assert cut(encoded, 0, 160, 0, 200, 9, 9) is None


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
