"""Raw bytes → payload: damage is seen, pixels are the right ones, and the bytes follow from the arguments alone."""

import io
import struct
from itertools import product

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from shards import encode
from shards.encode import (
    BadImageError,
    area_shrink,
    channel_sums,
    decode_strictly,
    encode_image,
    encode_images,
    exif_orientation,
    shrink,
    turn_upright,
)
from shards.format import EncodeSpec
from shards.kernels import load
from shards.kernels.load import in_use
from shards.pictures import decode_picture
from tests.conftest import picture
from tests.support.rawdata import jpeg


def saved(mode: str, kind: str, **options) -> bytes:
    return saved_as(Image.fromarray(picture(np.random.default_rng(0), 2, 60, 80)).convert(mode), kind, **options)


def saved_as(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_good_file_decodes_to_what_pillow_and_opencv_see():
    data = jpeg(3)
    rgb = decode_strictly(data)
    assert np.array_equal(rgb, np.asarray(Image.open(io.BytesIO(data))))
    assert np.array_equal(rgb, cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))


@given(st.integers(1, 400) | st.integers(1, len(jpeg(1)) - 1))
@settings(max_examples=80, deadline=None)
def test_no_missing_tail_goes_unseen(lost):
    data = jpeg(1)
    with pytest.raises(BadImageError):
        decode_strictly(data[:-lost])
    with pytest.raises(BadImageError):
        decode_strictly(data[:-lost] + bytes(lost))


def test_zeroed_blocks_inside_the_scan_are_seen():
    data = jpeg(1, height=240, width=320)
    middle = len(data) // 2
    damaged = data[:middle] + bytes(8192) + data[middle + 8192 :]
    assert cv2.imdecode(np.frombuffer(damaged, np.uint8), cv2.IMREAD_COLOR) is not None
    with pytest.raises(BadImageError, match="is damaged"):
        decode_strictly(damaged)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"\0" * 500, "not a JPEG"),
        (b"<html>not found</html>", "not a JPEG"),
        (saved("RGB", "PNG"), "not a JPEG"),
        (b"\xff\xd8", "is damaged"),
        (b"\xff\xd8\xff\xd9", "is damaged"),
    ],
)
def test_what_is_no_jpeg_is_refused_by_name(data, reason):
    with pytest.raises(BadImageError, match=reason):
        decode_strictly(data)


def test_a_header_that_claims_a_monster_is_refused_before_memory_is_taken():
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\x7f\xff\x7f\xff"
    with pytest.raises(BadImageError, match="32767 × 32767 px, above the limit of 100 megapixels"):
        decode_strictly(bytes(data))


def test_greyscale_becomes_three_equal_channels_and_bytes_behind_the_end_are_ignored():
    grey = decode_strictly(saved("L", "JPEG"))
    assert grey.shape == (60, 80, 3) and np.array_equal(grey[..., 0], grey[..., 1])
    assert np.array_equal(decode_strictly(jpeg(5) + b"appended"), decode_strictly(jpeg(5)))


def cmyk_profile() -> bytes:
    """An ICC profile (version 2.4): each coloured ink takes 60 of 255 from the lightness, and black all of it."""
    lightness = [
        0 if black else 255 - 60 * (cyan + magenta + yellow)
        for cyan, magenta, yellow, black in product((0, 1), repeat=4)
    ]
    ramp = bytes(range(256))
    table = b"mft1" + bytes([0, 0, 0, 0, 4, 3, 2, 0]) + struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).flat)
    table += 4 * ramp + bytes(one for light in lightness for one in (light, 128, 128)) + 3 * ramp
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table
    head = struct.pack(">I4sI", 128 + len(tags), b"lcms", 0x02400000) + b"prtrCMYKLab " + bytes(12) + b"acsp"
    return head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061).ljust(60, b"\0") + tags


@pytest.mark.parametrize("orientation", [1, 6])
def test_cmyk_is_converted_by_its_profile_or_as_pillow_does(orientation):
    image = Image.fromarray(decode_strictly(jpeg(3))).convert("CMYK")
    plain = with_exif(saved_as(image, "JPEG"), orientation)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(plain))).convert("RGB")
    assert np.array_equal(decode_picture(plain), np.asarray(expected))
    assert np.array_equal(decode_picture(saved_as(image, "TIFF")), np.asarray(image.convert("RGB")))
    with pytest.raises(BadImageError, match="is damaged"):
        decode_strictly(plain[:-100])
    for kind in ("JPEG", "TIFF"):
        for ink, grey in (((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((255, 0, 0, 0), 189)):  # 189: L* 76.5 in sRGB
            found = decode_picture(saved_as(Image.new("CMYK", (16, 16), ink), kind, icc_profile=cmyk_profile()))
            assert np.abs(found.astype(int) - grey).max() <= 1
        for profile in (b"none", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
            with pytest.raises(BadImageError, match=r"colour profile that cannot be used .*; convert it to RGB"):
                decode_picture(saved_as(image, kind, icc_profile=profile))


def with_exif(data: bytes, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    segment = exif.tobytes()
    return data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_is_applied_once_as_pillow_does(orientation):
    data = with_exif(jpeg(7, height=40, width=64), orientation)
    assert exif_orientation(data) == orientation
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    upright = turn_upright(decode_strictly(data), orientation)
    assert np.array_equal(upright, expected)
    packed = encode_image(data, "a", EncodeSpec(write_mode="raw"))
    assert (packed.height, packed.width) == expected.shape[:2]
    assert np.array_equal(np.load(io.BytesIO(packed.payload)), expected)


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_the_payload_carries_no_exif(mode):
    packed = encode_image(with_exif(jpeg(), 6), "a", EncodeSpec(write_mode=mode))
    assert b"Exif" not in packed.payload


def test_exif_oddities():
    assert exif_orientation(jpeg()) == 1
    assert exif_orientation(with_exif(jpeg(), 0)) == 1
    assert exif_orientation(with_exif(jpeg(), 99)) == 1
    comment = b"\xff\xfe\x00\x06Exif" + b"\xff"  # "Exif" elsewhere, and a fill byte before the next marker
    assert exif_orientation(jpeg()[:2] + comment + with_exif(jpeg(), 8)[2:]) == 8
    with pytest.raises(BadImageError, match="EXIF"):
        exif_orientation(jpeg()[:2] + b"\xff\xe1\x00\x0cExif\0\0junk" + jpeg()[2:])


def with_table(order: str, *entries: tuple[int, int, int, bytes], count: int | None = None) -> bytes:
    """A JPEG whose EXIF data are one directory. entries: tag, type, count, value. count: what it says they are."""
    table = b"".join(struct.pack(f"{order}HHL4s", *entry) for entry in entries)
    head = struct.pack(f"{order}2sHLH", b"II" if order == "<" else b"MM", 42, 8, count or len(entries))
    segment = b"Exif\0\0" + head + table + bytes(4)
    return jpeg()[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + jpeg()[2:]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "letter"), [(3, "H"), (4, "L"), (8, "h"), (9, "l")])
def test_the_orientation_is_read_as_pillow_reads_it(order, kind, letter):
    for orientation in range(1, 10):
        value = struct.pack(order + letter, orientation).ljust(4, b"\0")
        data = with_table(order, (0x0100, 4, 1, bytes(4)), (0x0112, kind, 1, value), (0x0128, 3, 1, bytes(4)))
        pillow = Image.open(io.BytesIO(data)).getexif()[0x0112]
        assert exif_orientation(data) == (pillow if pillow <= 8 else 1)


@pytest.mark.parametrize("order", ["<", ">"])
def test_damaged_exif_never_passes_for_upright(order):
    beyond = (0x010F, 2, 40, struct.pack(f"{order}L", 60_000))  # the maker's name, beyond the segment
    orientation = (0x0112, 3, 1, struct.pack(f"{order}H2x", 6))
    assert exif_orientation(with_table(order, beyond, orientation)) == 6
    with pytest.raises(BadImageError, match=r"damaged EXIF data .3 entries, and room for 1"):
        exif_orientation(with_table(order, beyond, count=3))
    for kind, letter, count in ((3, "H", 3), (4, "L", 2)):  # too many for the entry, which then says where they are
        with pytest.raises(BadImageError, match=rf"damaged EXIF data .{count} orientations"):
            value = struct.pack(f"{order}{letter}", 6).ljust(4, b"\0")
            exif_orientation(with_table(order, (0x0112, kind, count, value)))


def exact_area(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area means by repeating every pixel until both grids fit: slow, and independent of the code under test."""
    fine = image.astype(np.float64).repeat(height, 0).repeat(width, 1)
    rows, columns = image.shape[:2]
    return fine.reshape(height, rows, width, columns, 3).mean((1, 3))


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 4), (7, 5), (8, 8), (2, 0)])
def test_reducing_by_small_ratios_is_the_area_mean(n, m):
    rng = np.random.default_rng(n)
    height, width = 6 * (n + 1), 5 * (m + 1) if m else 30
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    target = 6 * n, 5 * m if m else 30
    shrunk = area_shrink(image, *target)
    assert shrunk.shape == (*target, 3)
    assert np.abs(shrunk - exact_area(image, *target)).max() <= 1.0
    if m:
        opencv = cv2.resize(image, target[::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(shrunk.astype(int) - opencv).max() <= 1


@pytest.mark.skipif(in_use()["resize"] == "opencv", reason="no compiled kernel for this processor here")
def test_the_compiled_kernel_shrinks_to_the_same_values(monkeypatch):
    """Every pair of values, and pictures of several sizes, some no thirds: no packed byte may depend on a compiler."""
    rng = np.random.default_rng(0)
    pairs = np.zeros((3, 65538, 3), np.uint8)
    pairs[0, :65536], pairs[1, :65536] = np.arange(65536)[:, None] // 256, np.arange(65536)[:, None] % 256
    images = [pairs, pairs[::-1], np.ascontiguousarray(pairs.transpose(1, 0, 2)), pairs[:, ::2]]
    images += [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((450, 600), (3, 3), (33, 9), (45, 50), (60, 90))]
    targets = [(image.shape[0] * 2 // 3, image.shape[1] * 2 // 3) for image in images]
    compiled = [area_shrink(image, *target) for image, target in zip(images, targets, strict=True)]
    monkeypatch.setattr(encode, "compiled", lambda: None)
    for image, target, found in zip(images, targets, compiled, strict=True):
        assert np.array_equal(area_shrink(image, *target), found)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(16, 80))
@settings(max_examples=60, deadline=None)
def test_shrinking_keeps_the_shape_and_the_mean(height, width, limit):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    small = shrink(image, limit)
    if max(height, width) <= limit:
        assert small is image
        return
    assert max(small.shape[:2]) == limit
    factor = limit / max(height, width)
    assert np.abs(np.array(small.shape[:2]) - np.maximum(1, np.array([height, width]) * factor)).max() <= 0.5
    assert np.abs(small.mean((0, 1)) - image.mean((0, 1))).max() < 1.5


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_sums_are_exact(height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    wide = image.astype(np.int64)
    assert channel_sums(image) == (*wide.sum((0, 1)).tolist(), *(wide**2).sum((0, 1)).tolist())


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("low", [0, 250, 255])
def test_sums_are_exact_for_large_images(low, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(encode, "compiled", lambda: None)
    image = np.random.default_rng(0).integers(low, 256, (2101, 1999, 3), np.uint8)
    wide = image.astype(np.int64)
    assert channel_sums(image) == (*wide.sum((0, 1)).tolist(), *(wide**2).sum((0, 1)).tolist())
    assert channel_sums(np.full((4000, 6000, 3), 255, np.uint8)) == (24_000_000 * 255,) * 3 + (24_000_000 * 65_025,) * 3


def test_write_modes():
    data = jpeg(0, height=60, width=80)
    raw_bytes = 60 * 80 * 3
    assert encode_image(data, "a", EncodeSpec(write_mode="jpg")).encoding == "jpg"
    assert encode_image(data, "a", EncodeSpec(write_mode="smart", smart_threshold=raw_bytes)).encoding == "raw"
    assert encode_image(data, "a", EncodeSpec(write_mode="smart", smart_threshold=raw_bytes - 1)).encoding == "jpg"
    for probability in (0.0, 0.3, 1.0):
        spec = EncodeSpec(write_mode="proportion", compress_probability=probability)
        kinds = [encode_image(data, f"ISIC_{i}", spec).encoding for i in range(600)]
        assert abs(kinds.count("jpg") / 600 - probability) < 0.06
        assert kinds == [encode_image(data, f"ISIC_{i}", spec).encoding for i in range(600)]


def test_raw_is_lossless_and_jpeg_is_near():
    data = jpeg(9, height=90, width=120)
    pixels = decode_strictly(data)
    raw = encode_image(data, "a", EncodeSpec(write_mode="raw", max_resolution=120))
    assert np.array_equal(np.load(io.BytesIO(raw.payload)), pixels)
    packed = encode_image(data, "a", EncodeSpec(max_resolution=120, jpeg_quality=95, subsampling="444"))
    error = simplejpeg.decode_jpeg(packed.payload, "RGB").astype(float) - pixels
    assert 10 * np.log10(255**2 / (error**2).mean()) > 35
    assert raw.sums == packed.sums == channel_sums(pixels)


@pytest.mark.parametrize("max_resolution", [60, 40, 37])
@pytest.mark.parametrize("write_mode", ["jpg", "raw"])
def test_files_encoded_together_give_what_each_gives_alone(max_resolution, write_mode):
    spec = EncodeSpec(write_mode=write_mode, max_resolution=max_resolution)
    other_kinds = [
        *(b"", b"\xff\xd8", jpeg()[:30], jpeg()[:180], saved("RGB", "PNG"), saved("CMYK", "JPEG"), saved("L", "JPEG")),
        *(jpeg(5)[:-2], jpeg(6) + b"appended", with_exif(jpeg(7), 6), with_exif(jpeg(8), 1)),
        jpeg()[:2] + b"\xff\xe1\x00\x0cExif\0\0junk" + jpeg()[2:],
        *(jpeg(9, height=60, width=45), simplejpeg.encode_jpeg(decode_strictly(jpeg(4)), colorsubsampling="420")),
    ]
    groups = [[jpeg(seed) for seed in range(count)] for count in range(7)]
    groups += [[jpeg(0), jpeg(1), other, jpeg(2)] for other in other_kinds]
    for files in groups:
        image_ids = [f"ISIC_{number}" for number in range(len(files))]
        alone: list = []
        for data, image_id in zip(files, image_ids, strict=True):
            try:
                alone.append(encode_image(data, image_id, spec))
            except BadImageError as error:
                alone.append(str(error))
        together = encode_images(files, image_ids, spec)
        assert [str(one) if isinstance(one, BadImageError) else one for one in together] == alone


@pytest.mark.parametrize("max_resolution", [60, 40])
def test_files_of_one_kind_need_no_general_decoder(monkeypatch, max_resolution):
    library = load.compiled()
    if library is None or not library.dermscale_decode_level():
        pytest.skip("the kernels are not built, or not for this processor")
    monkeypatch.setattr(encode, "decode_strictly", lambda _: pytest.fail("not decoded together"))
    files = [jpeg(0), with_exif(jpeg(1), 1), jpeg(2)]
    packed = encode_images(files, ["a", "b", "c"], EncodeSpec(max_resolution=max_resolution))
    assert all(isinstance(one, encode.Encoded) for one in packed)


def test_real_files_decode_and_shrink(real_images):
    files = sorted((real_images / "originals").glob("*/*.jpg"))[:12]
    for file in files:
        rgb = decode_strictly(file.read_bytes())
        assert rgb.shape == (450, 600, 3)
        assert exif_orientation(file.read_bytes()) == 1
        opencv = cv2.resize(rgb, (400, 300), interpolation=cv2.INTER_AREA)
        assert np.abs(shrink(rgb, 400).astype(int) - opencv).max() <= 1
        data = file.read_bytes()
        for lost in (2, 3, len(data) // 3):
            with pytest.raises(BadImageError):
                decode_strictly(data[:-lost])
