"""The decoder of whole files: to the bit what libjpeg-turbo's strict decoding gives, or declined."""

import ctypes
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.encode import area_shrink
from shards.jpeg import encode_jpeg
from shards.kernels.load import compiled
from tests.conftest import picture
from tests.shards.test_jpeg_decode import SUBSAMPLINGS, some_image
from tests.shards.test_kernels import fenced

LEVELS = (1, 2)
ROW_SLACK = 192
SAMPLING = {"444": 11, "422": 21, "420": 22}


def decode(
    files: Sequence[bytes], height: int, width: int, level: int = 2, reduced: bool = False
) -> list[np.ndarray] | None:
    """`dermscale_decode_files` in memory whose ends must not be touched; None where it declines the files."""
    library = compiled()
    if library is None or not library.dermscale_decode_level():
        pytest.skip("the kernels are not built, or not for this processor")
    count, longest = len(files), max(map(len, files))
    shape = (height // 3 * 2, width // 3 * 2, 3) if reduced else (height, width, 3)
    inputs = [fenced(np.frombuffer(file, np.uint8)) for file in files]
    size = shape[0] * shape[1] * 3
    images = [fenced(np.zeros(size + ROW_SLACK * (not reduced), np.uint8)) for _ in files]
    scratch = fenced(np.full(library.dermscale_files_scratch(longest, width), 0xA5, np.uint8))
    declined = library.dermscale_decode_files(
        (ctypes.c_void_p * count)(*(one.ctypes.data for one in inputs)),
        (ctypes.c_int64 * count)(*map(len, files)),
        *(count, height, width, reduced, scratch.ctypes.data, scratch.size),
        (ctypes.c_void_p * count)(*(image.ctypes.data for image in images)),
        level,
    )
    return None if declined else [image[:size].reshape(shape) for image in images]


def strictly(file: bytes) -> np.ndarray | None:
    try:
        return simplejpeg.decode_jpeg(file, strict=True)
    except ValueError:
        return None


def assert_equal_to_libjpeg(files: Sequence[bytes]) -> None:
    expected = [simplejpeg.decode_jpeg(file, strict=True) for file in files]
    height, width = expected[0].shape[:2]
    for level in LEVELS:
        found = decode(files, height, width, level)
        assert found is not None
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def encoded(image: np.ndarray, quality: int, subsampling: str, optimised: bool) -> bytes:
    if not optimised:
        return simplejpeg.encode_jpeg(image, quality, colorsubsampling=subsampling)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, int(f"0x{SAMPLING[subsampling]}1111", 16)]
    done, data = cv2.imencode(".jpg", image, options)
    assert done
    return data.tobytes()


@given(
    st.integers(0, 2**32),
    st.lists(
        st.tuples(st.sampled_from(["noise", "extremes", "flat", "picture"]), st.integers(1, 100), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(SUBSAMPLINGS),
    st.integers(1, 70) | st.integers(1, 300),
    st.integers(1, 70) | st.integers(1, 300),
)
@settings(max_examples=200, deadline=None)
def test_files_have_the_pixels_of_libjpeg(seed, kinds, subsampling, height, width):
    rng = np.random.default_rng(seed)
    images = [(some_image(rng, kind, height, width), quality, optimised) for kind, quality, optimised in kinds]
    assert_equal_to_libjpeg([encoded(image, quality, subsampling, o) for image, quality, o in images])


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_every_quality(subsampling):
    image = picture(np.random.default_rng(0), 3, 61, 83)
    files = [encoded(image, quality, subsampling, quality % 2 == 0) for quality in range(1, 101)]
    for start in range(0, 100, 4):
        assert_equal_to_libjpeg(files[start : start + 4])


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_every_small_size(subsampling):
    rng = np.random.default_rng(0)
    for height, width in [(h, w) for h in (1, 2, 3, 8, 9, 17) for w in range(1, 36)] + [(w, 5) for w in range(1, 36)]:
        assert_equal_to_libjpeg([encoded(some_image(rng, "noise", height, width), 95, subsampling, False)] * 2)


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_two_thirds_are_those_of_the_whole_image(subsampling):
    rng = np.random.default_rng(0)
    for height, width in [(3, 3), (3, 90), (48, 3), (15, 33), (18, 48), (51, 27), (450, 600), (99, 81)]:
        files = [encoded(some_image(rng, kind, height, width), 100, subsampling, True) for kind in ("noise", "picture")]
        found = decode(files, height, width, reduced=True)
        assert found is not None
        for file, image in zip(files, found, strict=True):
            whole = simplejpeg.decode_jpeg(file)
            assert np.array_equal(image, area_shrink(whole, height // 3 * 2, width // 3 * 2))


def test_real_images(real_images: Path):
    alike: dict[bytes, list[bytes]] = {}
    for path in sorted((real_images / "originals").rglob("*.jpg")):
        file = path.read_bytes()
        frame = file.index(b"\xff\xc0")
        alike.setdefault(file[frame : frame + 19], []).append(file)
    for files in alike.values():
        for start in range(0, len(files), 4):
            assert_equal_to_libjpeg(files[start : start + 4])


@cache
def sound() -> bytes:
    return encoded(picture(np.random.default_rng(0), 3, 64, 96), 90, "420", False)


def with_segment(file: bytes, marker: int, content: bytes) -> bytes:
    return file[:2] + bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content + file[2:]


@pytest.mark.parametrize(
    "changed",
    [
        lambda file: file + b"appended",
        lambda file: with_segment(file, 0xFE, b"a comment"),
        lambda file: with_segment(file, 0xE1, b"Exif\0\0" + bytes(60000)),
        lambda file: with_segment(file, 0xE0, b"JFXX\0\x10"),
    ],
)
def test_what_says_nothing_about_the_pixels_is_skipped(changed):
    assert_equal_to_libjpeg([changed(sound()), sound()])


def test_other_kinds_of_files_are_declined():
    image = picture(np.random.default_rng(0), 3, 64, 96)
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=90, progressive=True)
    file = sound()
    jfif = file.index(b"JFIF\0") + 5
    others = {
        "progressive": out.getvalue(),
        "grey": simplejpeg.encode_jpeg(np.ascontiguousarray(image[..., :1]), colorspace="GRAY"),
        "4:4:0": simplejpeg.encode_jpeg(image, colorsubsampling="440"),
        "4:1:1": simplejpeg.encode_jpeg(image, colorsubsampling="411"),
        "restart markers": encode_jpeg(image),
        "Adobe": with_segment(file, 0xEE, b"Adobe\0\x64\0\0\0\0\0"),
        "colour profile": with_segment(file, 0xE2, b"ICC_PROFILE\0\x01\x02" + bytes(100)),
        "12 bit": file.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
        "extended": file.replace(b"\xff\xc0\0\x11", b"\xff\xc1\0\x11"),
        "a later JFIF": file[:jfif] + b"\x02" + file[jfif + 1 :],
        "no end": file[:-2],
        "half an end": file[:-1],
        "surplus byte": file[:-2] + b"\0" + file[-2:],
        "another scan": file[:-2] + file[file.index(b"\xff\xda") :],
        "empty": b"",
        "only a start": b"\xff\xd8",
    }
    for name, other in others.items():
        assert other != file
        assert decode([other], 64, 96) is None, name
        assert decode([file, other], 64, 96) is None, name
    for height, width in [(65, 96), (64, 95), (0, 96), (64, -1), (2**31 - 1, 2**31 - 1)]:
        assert decode_with(file, height, width, count=1) == 1
    assert [decode_with(file, 64, 96, count=count) for count in (-1, 0, 1, 5)] == [1, 1, 0, 1]
    assert decode_with(file, 64, 96, count=1, less_scratch=1) == 1
    assert decode_with(file, 64, 96, count=1, reduced=True) == 1
    assert decode_with(file, 64, 96, count=1, level=0) == 1


def decode_with(
    file: bytes, height: int, width: int, count: int, less_scratch: int = 0, reduced: bool = False, level: int = 2
) -> int:
    """What `dermscale_decode_files` returns, called with any arguments on memory that suits 64 × 96 px."""
    library = compiled()
    assert library is not None
    scratch = fenced(np.zeros(library.dermscale_files_scratch(len(file), 96) - less_scratch, np.uint8))
    images = [np.empty(64 * 96 * 3 + ROW_SLACK, np.uint8) for _ in range(5)]
    return library.dermscale_decode_files(
        (ctypes.c_char_p * 5)(*[file] * 5),
        (ctypes.c_int64 * 5)(*[len(file)] * 5),
        *(count, height, width, reduced, scratch.ctypes.data, scratch.size),
        (ctypes.c_void_p * 5)(*(image.ctypes.data for image in images)),
        level,
    )


def damaged(rng: np.random.Generator, file: bytes) -> bytes:
    """A copy with one or two changes: a byte, a bit, a cut, an insertion, or 512 zeros."""
    out = bytearray(file)
    for _ in range(rng.integers(1, 3)):
        at = int(rng.integers(len(out)) if rng.random() < 0.7 else rng.integers(min(len(out), 640)))
        kind = rng.integers(7)
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at] = int(rng.integers(256))
        elif kind == 2:
            out[at] = int(rng.choice([0, 255]))
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            out[at:at] = rng.bytes(int(rng.integers(1, 5)))
        elif kind == 5:
            out[at : at + 512] = bytes(len(out[at : at + 512]))
        else:
            del out[at : at + int(rng.integers(1, 5))]
        if not out:
            break
    return bytes(out)


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_damaged_files_are_declined_or_decoded_as_libjpeg_does_strictly(subsampling):
    rng = np.random.default_rng(0)
    height, width, decoded = 48, 64, 0
    kinds = [(kind, quality) for kind in ("noise", "picture", "extremes") for quality in (10, 60, 100)]
    files = [encoded(some_image(rng, kind, height, width), q, subsampling, q > 50) for kind, q in kinds]
    for number in range(1000):
        file = damaged(rng, files[number % len(files)])
        beside = files[int(rng.integers(len(files)))]
        pair = [file, beside] if number % 2 else [beside, file]
        found = [decode(pair, height, width, level) for level in LEVELS]
        if found[0] is None:
            assert all(one is None for one in found)
            continue
        decoded += 1
        expected = [strictly(one) for one in pair]
        assert all(one is not None for one in expected)
        assert all(np.array_equal(a, b) for one in found for a, b in zip(one or [], expected, strict=True))
    assert decoded > 30
