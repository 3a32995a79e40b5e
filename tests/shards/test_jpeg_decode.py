"""The decoder of restart-table JPEGs: to the bit what libjpeg-turbo gives, or declined."""

import ctypes
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from shards import jpeg
from shards.jpeg import TAG, encode_jpeg
from shards.kernels.load import compiled
from tests.conftest import picture
from tests.shards.test_kernels import fenced

SUBSAMPLINGS = ("444", "422", "420")
LEVELS = (0, 1, 2)


class Decoder:
    """`dermscale_decode_box` over one scratch memory, which ends where memory does that must not be touched."""

    def __init__(self, height: int, width: int) -> None:
        library = compiled()
        if library is None or not hasattr(library, "dermscale_decode_box"):
            pytest.skip("the kernels are not built")
        pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        library.dermscale_decode_scratch.restype = count
        library.dermscale_decode_scratch.argtypes = [number, number]
        library.dermscale_decode_box.argtypes = [
            pointer,
            count,
            *[number] * 6,
            *[pointer, count] * 1,
            *[pointer] * 2,
            number,
        ]
        self._library = library
        self._scratch = fenced(np.zeros(library.dermscale_decode_scratch(height, width), np.uint8))
        self._pixels, self._stride = ctypes.c_void_p(), ctypes.c_int64()

    def __call__(
        self, raw: bytes | np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int], level: int
    ) -> np.ndarray | None:
        """A copy of the box's pixels; None where the file is declined."""
        file = np.frombuffer(raw, np.uint8) if isinstance(raw, bytes) else raw
        scratch = self._scratch
        declined = self._library.dermscale_decode_box(
            *(file.ctypes.data, file.size, *size, *box, scratch.ctypes.data, scratch.size),
            *(ctypes.byref(self._pixels), ctypes.byref(self._stride), level),
        )
        if declined:
            return None
        start = (self._pixels.value or 0) - scratch.ctypes.data
        return as_strided(scratch[start:], (*box[2:], 3), (self._stride.value, 3, 1)).copy()


@cache
def decoder() -> Decoder:
    return Decoder(640, 640)


def some_image(rng: np.random.Generator, kind: str, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 RGB."""
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    if kind == "extremes":
        return (rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
    if kind == "flat":
        return np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    return picture(rng, 3, height, width)


def assert_equal_to_libjpeg(raw: bytes, boxes: list[tuple[int, int, int, int]]) -> None:
    whole = simplejpeg.decode_jpeg(raw)
    height, width = whole.shape[:2]
    file = fenced(np.frombuffer(raw, np.uint8))
    for y, x, h, w in [(0, 0, height, width), *boxes]:
        for level in LEVELS:
            found = decoder()(file, (height, width), (y, x, h, w), level)
            assert found is not None
            assert np.array_equal(found, whole[y : y + h, x : x + w])


@given(
    st.data(),
    st.integers(0, 2**32),
    st.sampled_from(["noise", "extremes", "flat", "picture"]),
    st.integers(1, 100),
    st.sampled_from(SUBSAMPLINGS),
    st.integers(1, 70) | st.integers(1, 640),
    st.integers(1, 70) | st.integers(1, 640),
)
@settings(max_examples=300)
def test_a_box_has_the_pixels_of_libjpeg(data, seed, kind, quality, subsampling, height, width):
    raw = encode_jpeg(some_image(np.random.default_rng(seed), kind, height, width), quality, subsampling)
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    box = (data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w)
    assert_equal_to_libjpeg(raw, [box])


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_every_small_size_and_its_edges(subsampling):
    rng = np.random.default_rng(0)
    for height, width in [(h, w) for h in (1, 2, 3, 8, 9, 17) for w in range(1, 36)] + [(w, 5) for w in range(1, 36)]:
        raw = encode_jpeg(some_image(rng, "noise", height, width), 95, subsampling)
        assert_equal_to_libjpeg(raw, [(height - 1, width - 1, 1, 1), (height // 2, width // 2, 1, 1)])


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_real_images(real_images: Path, subsampling):
    rng = np.random.default_rng(0)
    paths = sorted(real_images.rglob("*.jpg"))[:: 1 if subsampling == "420" else 4][:60]
    assert paths
    for path in paths:
        image = simplejpeg.decode_jpeg(path.read_bytes())[:640, :640]
        raw = encode_jpeg(image, int(rng.integers(70, 101)), subsampling)
        height, width = image.shape[:2]
        y, x = int(rng.integers(0, height // 2)), int(rng.integers(0, width // 2))
        assert_equal_to_libjpeg(raw, [(y, x, height // 2, width // 2), (y, x, height - y, width - x)])


def test_huffman_tables_other_than_the_usual_ones():
    image = picture(np.random.default_rng(0), 3, 200, 300)
    interval = jpeg.restart_interval(300, 16)
    for quality in (5, 50, 90, 100):
        options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
        done, data = cv2.imencode(".jpg", image, [*options, cv2.IMWRITE_JPEG_RST_INTERVAL, interval])
        assert done
        assert_equal_to_libjpeg(jpeg._with_table(data, 16, 16, interval), [(20, 30, 99, 101)])
        assert_equal_to_libjpeg(encode_jpeg(image, quality), [])  # the last file's tables are not used again


def test_the_colours_of_16_bits_are_exact():
    """jpeg_pixels.c multiplies by fewer bits than JFIF's constants have."""
    chroma = np.arange(-128, 128)
    for short, exact in ((22971, 91881), (29033, 116130)):
        assert np.array_equal((2 * chroma * short + (1 << 14)) >> 15, (chroma * exact + (1 << 15)) >> 16)


def test_files_of_others_are_declined():
    image = picture(np.random.default_rng(0), 3, 64, 96)
    interval, box = jpeg.restart_interval(96, 16), (0, 0, 64, 96)
    sound = encode_jpeg(image)
    restart = [cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    baseline, progressive = b"\xff\xc0\0\x11", b"\xff\xc2\0\x11"
    scans = cv2.imencode(".jpg", image, [*restart, cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    scans = np.frombuffer(scans.replace(progressive, baseline), np.uint8)
    grey = cv2.imencode(".jpg", image[..., 0], restart)[1]
    vertical = cv2.imencode(".jpg", image, [*restart, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x121111])[1]
    adobe = sound[:-2].replace(b"\xff\xdb", b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0\xff\xdb", 1) + sound[-2:]
    others = {
        "without a table": encode_jpeg(image, restart=False),
        "progressive": jpeg._with_table(scans, 16, 16, interval).replace(baseline, progressive),
        "grey": jpeg._with_table(grey, 16, 16, interval),
        "4:4:0": jpeg._with_table(vertical, 16, 8, interval),
        "Adobe": adobe,
        "12 bit": sound.replace(baseline + b"\x08", baseline + b"\x0c"),
        "extended": sound.replace(baseline, b"\xff\xc1\0\x11"),
        "empty": b"\xff\xd8",
        "more behind the end": sound + b"\0",
    }
    for level in LEVELS:
        assert decoder()(sound, (64, 96), box, level) is not None
        for name, raw in others.items():
            assert raw != sound
            assert decoder()(raw, (64, 96), box, level) is None, name
        for size, wrong in [
            ((65, 96), box),
            ((64, 95), (0, 0, 64, 95)),
            ((0, 0), box),
            ((64, 96), (0, 0, 65, 96)),
            ((64, 96), (-1, 0, 9, 9)),
            ((64, 96), (0, 0, 0, 9)),
            ((64, 96), (60, 90, 2**31 - 1, 2**31 - 1)),
            ((2**31 - 1, 2**31 - 1), box),
        ]:
            assert decoder()(sound, size, wrong, level) is None
        assert Decoder(40, 40)(sound, (64, 96), box, level) is None


def test_a_file_that_ends_early_or_whose_table_lies_is_declined():
    image = picture(np.random.default_rng(0), 3, 64, 96)
    encoded, box = encode_jpeg(image), (0, 0, 64, 96)
    for end in range(0, len(encoded), 7):
        assert decoder()(fenced(np.frombuffer(encoded[:end], np.uint8)), (64, 96), box, 1) is None
    start = encoded.index(TAG) + len(TAG)
    runs = int.from_bytes(encoded[22:24], "big") - 17
    for place in range(start, start + 8 + runs):
        for change in (1, 2, 255):
            changed = bytearray(encoded)
            changed[place] = (changed[place] + change) % 256
            assert decoder()(bytes(changed), (64, 96), box, 1) is None, place


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_damaged_files_are_declined_or_decoded_as_libjpeg_does(subsampling):
    rng = np.random.default_rng(0)
    size, decoded = (48, 64), 0
    kinds = ("noise", "picture", "extremes")
    files = [encode_jpeg(some_image(rng, kind, *size), q, subsampling) for kind in kinds for q in (10, 60, 100)]
    for number in range(3000):
        raw = np.frombuffer(files[number % len(files)], np.uint8).copy()
        for _ in range(rng.integers(1, 4)):
            if rng.random() < 0.1:
                raw = raw[: rng.integers(len(raw) + 1)]
            elif len(raw):
                raw[rng.integers(len(raw))] = rng.choice([0, 255, rng.integers(256)])
        file, box = fenced(raw), (0, 0, *size)
        found = [decoder()(file, size, box, level) for level in LEVELS]
        if found[0] is None:
            assert all(one is None for one in found)
            continue
        decoded += 1
        expected = simplejpeg.decode_jpeg(raw.tobytes(), strict=False)
        assert all(np.array_equal(one, expected) for one in found)
    assert decoded > 30
