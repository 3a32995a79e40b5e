"""Image files of any origin: each is read as it looks, or refused with the reason."""

import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.encode import BadImageError
from shards.jpeg import encode_jpeg
from shards.pictures import _NEWER, _newer_formats
from tests.conftest import picture
from train.inference.images import find_images, open_image, read_image

RGB = picture(np.random.default_rng(0), 3, 40, 60)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_lossless_files_give_their_pixels(kind, options):
    assert np.array_equal(open_image(saved(Image.fromarray(RGB), kind, **options)).pixels, RGB)


@pytest.mark.parametrize(("mode", "kind"), [*((mode, "PNG") for mode in ("RGB", "RGBA", "P", "L")), ("CMYK", "JPEG")])
def test_rows_are_converted_some_at_a_time_and_give_the_same_pixels(mode, kind, monkeypatch):
    monkeypatch.setattr("shards.encode._AT_ONCE", 7 * 60)
    data = saved(Image.fromarray(RGB).convert(mode), kind)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(open_image(data).pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_images_of_one_pixel_or_row_are_read(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("BMP", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(open_image(saved(Image.fromarray(pixels), kind, **options)).pixels, pixels)
    for kind in ("JPEG", *_newer_formats()):
        assert open_image(saved(Image.fromarray(pixels), kind)).pixels.shape == pixels.shape


def test_files_that_claim_no_pixels_are_refused():
    frame = bytearray(saved(Image.fromarray(RGB), "JPEG"))
    sides = frame.index(b"\xff\xc0") + 5
    bitmap = bytearray(saved(Image.fromarray(RGB), "BMP"))
    for height, width in ((0, 0), (0, 8), (8, 0)):
        frame[sides : sides + 4] = struct.pack(">HH", height, width)
        bitmap[18:26] = struct.pack("<ii", width, height)
        for data in (bytes(frame), bytes(bitmap), png_header(width, height)):
            with pytest.raises(BadImageError, match=r"is damaged|is not an image"):
                open_image(data)


def test_grey_files_of_8_and_16_bits_give_three_equal_channels():
    grey = RGB[:, :, 1]
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    deep = (grey.astype(np.uint16) << 8) | 77
    for data in (saved(Image.fromarray(grey), "PNG"), saved(Image.fromarray(deep), "PNG")):
        assert np.array_equal(open_image(data).pixels, expected)
    assert np.array_equal(open_image(saved(Image.fromarray(deep), "TIFF")).pixels, expected)
    assert open_image(saved(Image.fromarray(grey), "JPEG")).pixels.shape == (40, 60, 3)


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_of_16_bit_colours_the_upper_byte_is_kept(ending):
    deep = np.random.default_rng(0).integers(0, 1 << 16, (20, 30, 3), dtype=np.uint16)
    data = cv2.imencode(ending, deep[:, :, ::-1])[1].tobytes()
    assert np.array_equal(open_image(data).pixels, (deep >> 8).astype(np.uint8))


def test_palettes_and_opaque_alpha_are_read_and_transparency_is_refused():
    flat = Image.fromarray(RGB).quantize(16)
    assert np.array_equal(open_image(saved(flat, "PNG")).pixels, np.asarray(flat.convert("RGB")))
    opaque = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    assert np.array_equal(open_image(saved(Image.fromarray(opaque), "PNG")).pixels, RGB)
    opaque[3, 4, 3] = 254
    with pytest.raises(BadImageError, match="transparent"):
        open_image(saved(Image.fromarray(opaque), "PNG"))
    with pytest.raises(BadImageError, match="transparent"):
        open_image(saved(flat, "PNG", transparency=flat.getpixel((0, 0))))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientations_are_carried_out(kind, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(RGB), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(open_image(data).pixels, expected)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_has_no_sure_reading_is_refused_by_name():
    image = Image.fromarray(RGB)
    refused = {
        "Lab pixels": saved(Image.new("LAB", (9, 9)), "TIFF"),
        "floating-point": saved(Image.fromarray(RGB[:, :, 0].astype(np.float32)), "TIFF"),
        "32-bit": saved(Image.fromarray(RGB[:, :, 0].astype(np.int32)), "TIFF"),
        "holds 2 images": saved(image, "TIFF", save_all=True, append_images=[image]),
        "is not an image of a known format": saved(image, "GIF"),
        "not an image": b"image_id,dx\nISIC_1,mel\n",
        "is empty": b"",
        "is damaged": saved(image, "PNG")[:-200],
        "a size far above the limit of 100 megapixels": png_header(50_000, 50_000),
        "12000 × 9000 px, above the limit": png_header(12_000, 9_000),
    }
    for reason, data in refused.items():
        with pytest.raises(BadImageError, match=reason.replace("(", r"\(")):
            open_image(data)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_avif_and_heic_are_read_or_refused_with_what_helps(kind, monkeypatch):
    brand = {"AVIF": b"avif", "HEIF": b"heic"}[kind]
    data = b"\0\0\0\x18ftyp" + brand + bytes(200)
    with monkeypatch.context() as patch:
        patch.setattr("shards.pictures._newer_formats", tuple)
        with pytest.raises(BadImageError, match=f"format {kind}, which cannot be read here.*: pip install '.*'$"):
            open_image(data)
    if kind not in _newer_formats():
        pytest.skip(f"Pillow cannot read {kind} here ({_NEWER[kind]})")
    with pytest.raises(BadImageError, match="is damaged"):
        open_image(data)
    found = open_image(saved(Image.fromarray(RGB), kind, quality=95)).pixels
    assert found.shape == RGB.shape and np.abs(found.astype(int) - RGB).mean() < 5
    with pytest.raises(BadImageError, match="holds 2 images"):
        open_image(saved(Image.fromarray(RGB), kind, save_all=True, append_images=[Image.fromarray(RGB)]))


def test_only_files_of_a_shard_set_count_as_packed():
    assert open_image(encode_jpeg(RGB)).packed
    assert not open_image(encode_jpeg(RGB, restart=False)).packed
    assert not open_image(saved(Image.fromarray(RGB), "PNG")).packed


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what it then refuses or reads all the same
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damage_ends_in_a_picture_or_a_reason(data):
    kind = data.draw(st.sampled_from(["PNG", "TIFF", "BMP", "WEBP", "JPEG", *_newer_formats()]))
    content = bytearray(saved(Image.fromarray(RGB[:16, :16]), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert open_image(bytes(content[: data.draw(st.integers(1, len(content)))])).pixels.dtype == np.uint8
    except BadImageError as error:
        assert str(error)


def test_files_are_found_in_folders_and_named_ones_are_taken_as_they_are(tmp_path: Path):
    for name in ("b/2.PNG", "b/1.jpg", "b/.hidden/3.jpg", "b/._1.jpg", "b/notes.csv", "b/deep/4.webp", "a.dat"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found, left_out = find_images([tmp_path / "a.dat", tmp_path / "b", tmp_path / "missing.jpg"])
    assert [str(f.relative_to(tmp_path)) for f in found] == [
        "a.dat", "b/1.jpg", "b/2.PNG", "b/deep/4.webp", "missing.jpg"
    ]  # fmt: skip
    assert [f.name for f in left_out] == ["notes.csv"]


def test_linked_folders_are_followed_and_circles_are_not(tmp_path: Path):
    for name in ("a/1.jpg", "a/deep/2.jpg", "elsewhere/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a/deep/elsewhere").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/deep/up").symlink_to(tmp_path / "a")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "a")
    (tmp_path / "a/deep/top").symlink_to(tmp_path)
    (tmp_path / "a/self").symlink_to(tmp_path / "a/self")
    (tmp_path / "a/gone.jpg").symlink_to(tmp_path / "none.jpg")
    found, left_out = find_images([tmp_path / "a"])
    assert [str(f.relative_to(tmp_path)) for f in found] == [
        "a/1.jpg", "a/deep/2.jpg", "a/deep/elsewhere/3.jpg", "a/gone.jpg", "a/link/3.jpg"
    ]  # fmt: skip
    assert [f.name for f in left_out] == ["self"]


def test_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path: Path, monkeypatch):
    for name in ("a/1.jpg", "b/2.jpg", "c/3.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    listing = Path.iterdir

    def iterdir(folder: Path):  # root may read every folder, so no permissions are changed here
        if folder.name == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    found, _ = find_images([tmp_path])
    assert [str(f.relative_to(tmp_path)) for f in found] == ["a/1.jpg", "b", "c/3.jpg"]
    with pytest.raises(BadImageError, match="is a folder that cannot be read; check its permissions"):
        read_image(found[1])


def test_paths_that_are_no_file_are_refused(tmp_path: Path):
    with pytest.raises(BadImageError, match="does not exist"):
        read_image(tmp_path / "missing.jpg")
    with pytest.raises(BadImageError, match="is a folder that cannot be read"):
        read_image(tmp_path)  # find_images names only such folders
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BadImageError, match="is not a file"):
        read_image(tmp_path / "pipe.jpg")
    huge = tmp_path / "huge.tif"
    with huge.open("wb") as file:
        file.truncate(301_000_000)  # takes no room on the disk
    with pytest.raises(BadImageError, match="has 301 MB, above the limit of 300"):
        read_image(huge)
