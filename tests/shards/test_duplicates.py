"""Copies: the search of near hashes against all pairs, and what counts as a copy of a picture and what does not."""

from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest

from shards.__main__ import main
from shards.duplicates import MOST_BITS, find_copies, image_detail, image_hash, near
from shards.encode import decode_upright
from shards.format import HAM10000, EncodeSpec
from shards.jpeg import encode_jpeg
from shards.writer import ShardSetWriter
from tests.conftest import finish_set, picture, write_sample


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [picture(rng, number % 7, 120, 160) for number in range(count)]


CHANGES = {
    "lower quality": lambda rgb: decode_upright(encode_jpeg(rgb, 50)),
    "half the size": lambda rgb: cv2.resize(rgb, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "twice the size": lambda rgb: cv2.resize(rgb, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC),
    "brighter": lambda rgb: np.clip(rgb * 1.1, 0, 255).astype(np.uint8),
    "other colours": lambda rgb: np.clip(rgb * np.array([1.05, 0.95, 0.9]), 0, 255).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_no_other_picture_is(change):
    originals = pictures(30)
    every = [*originals, *(CHANGES[change](rgb) for rgb in originals)]
    hashes = np.array([image_hash(rgb) for rgb in every], np.uint64)
    found = find_copies(hashes, every.__getitem__)
    assert [(copy.first, copy.second) for copy in found] == [(number, 30 + number) for number in range(30)]
    assert all(0.92 <= copy.correlation <= 1.0001 for copy in found)


def test_near_is_the_comparison_of_all_pairs():
    rng = np.random.default_rng(3)
    centres = rng.integers(1, 2**63, 40).astype(np.uint64)
    hashes = rng.choice(centres, 400)
    for _ in range(5):
        hashes ^= np.uint64(1) << rng.integers(0, 64, 400).astype(np.uint64)
    hashes[:7] = 0  # pictures without detail
    found = [(int(i), int(j)) for firsts, seconds in near(hashes) for i, j in zip(firsts, seconds, strict=True)]
    words = [int(word) for word in hashes]
    expected = {
        (i, j)
        for i, j in combinations(range(400), 2)
        if words[i] and words[j] and (words[i] ^ words[j]).bit_count() <= MOST_BITS
    }
    assert len(found) == len(set(found)) and set(found) == expected and len(expected) > 200


def test_every_copy_of_a_group_is_connected_and_pictures_that_belong_together_are_not_compared():
    one, other = pictures(2)
    every = [one, other, one, other, one, one]
    hashes = np.array([image_hash(rgb) for rgb in every], np.uint64)
    found = find_copies(hashes, every.__getitem__)
    assert len(found) == 4  # three links for four copies of the one, one link for two copies of the other
    assert {frozenset(copy[:2]) for copy in found} >= {frozenset((1, 3))}
    assert find_copies(hashes, every.__getitem__, groups=np.array([0, 1, 0, 1, 0, 0])) == []
    assert find_copies(hashes, every.__getitem__, sets=np.array([0, 1, 0, 1, 0, 0])) == []
    two = find_copies(hashes, every.__getitem__, sets=np.array([0, 0, 0, 1, 1, 1]))
    assert {one for copy in two for one in copy[:2]} == {0, 1, 2, 3, 4, 5}
    assert len(find_copies(hashes, every.__getitem__, groups=np.array([0, 1, 0, 2, 3, 3]))) == 2


def test_flat_pictures_have_no_copies():
    flat = [np.full((50, 60, 3), value, np.uint8) for value in (0, 0, 128, 255)]
    assert [image_hash(rgb) for rgb in flat] == [0] * 4 and not any(image_detail(rgb).any() for rgb in flat)
    assert find_copies(np.zeros(4, np.uint64), flat.__getitem__) == []


def write(out: Path, images: list[np.ndarray]) -> Path:
    with ShardSetWriter(out, EncodeSpec(), 1 << 20, classes=HAM10000) as writer:
        for number, rgb in enumerate(images):
            split = ("train", "val", "test")[3 * number // len(images)]
            write_sample(writer, number, f"LES_{number}", number % 7, split, rgb)
        finish_set(writer)
    return out


def test_overlap_lists_the_images_that_two_sets_share(tmp_path, command):
    images, others = pictures(21), pictures(14, seed=1)
    first = write(tmp_path / "first", images)
    second = write(tmp_path / "second", [*others, CHANGES["half the size"](images[9]), images[4]])
    code, out, errors = command(main, "overlap", first, second)
    head, *rows = out.splitlines()
    assert code == 0 and head == "first,second,correlation"
    assert {tuple(row.split(",")[:2]) for row in rows} == {("IMG_00004", "IMG_00015"), ("IMG_00009", "IMG_00014")}
    assert f"2 of 21 images of {first} are in {second}, as 2 of 16" in errors
    code, out, _ = command(main, "overlap", first, second, "--out", tmp_path / "pairs.csv")
    assert (code, out) == (0, "") and (tmp_path / "pairs.csv").read_text().splitlines() == [head, *rows]
    code, out, errors = command(main, "overlap", first, tmp_path / "missing")
    assert code == 1 and "missing: no such folder" in errors
