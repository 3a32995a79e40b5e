"""The C files, built with checks: no undefined arithmetic at the largest sizes, nothing read or written outside."""

import ctypes
import importlib.machinery
import logging
import mmap
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import xxhash

from shards import ShardSet, jpeg
from shards.encode import _shrink_rows
from shards.engines import resample
from shards.engines.resample import Resampler
from shards.jpeg import RegionCutter, encode_jpeg
from shards.kernels import load as kernels
from shards.plan import INTERPOLATIONS
from tests.conftest import picture

ROOT = Path(__file__).parents[2]


def fenced(content: np.ndarray) -> np.ndarray:
    """A copy of some bytes that ends where memory does which must not be touched."""
    page = mmap.PAGESIZE
    size = -(-max(content.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + page)
    whole = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(whole.ctypes.data + size), ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()
    out = whole[size - content.nbytes : size]
    out[:] = content.reshape(-1)
    return out.reshape(content.shape)


LARGEST = ((2, 65535, 4096, 0), (65535, 2, 4096, 7), (65535, 1, 1, 3))


def resize_at_the_edges() -> None:
    """Every symmetry, level and interpolation: images of all remainders of a vector, and the largest ones."""
    rng = np.random.default_rng(0)
    best = Resampler(1).level
    cases = [(int(h), int(w), int(s), k) for k in range(64) for h, w, s in [rng.integers(1, 70, 3)]]
    cases += [(h, w, s, k + more) for more in (0, 16) for h, w, s, k in LARGEST]
    for height, width, side, k in cases:
        image = fenced(rng.integers(0, 256, (height, width, 3 + k // 8 % 2), np.uint8))
        found = []
        for level in range(1, best + 1):
            out = fenced(np.zeros((side, side, 3), np.uint8))
            Resampler(side, level, INTERPOLATIONS[k // 16 % 2])(image, k % 8, out)
            found.append(out)
        assert all(np.array_equal(found[0], other) for other in found)


def cut_damaged_tables() -> None:
    """Cuts of files whose table, length or image size is wrong."""
    rng = np.random.default_rng(0)
    whole = np.frombuffer(encode_jpeg(picture(rng, 1, 120, 160)), np.uint8)
    runs = 39 + 2 * 8 * 5
    cut = RegionCutter()
    blocks_of_1 = np.concatenate([whole[:31], np.array([1, 1, 0, 1, 0, 0, 0, 9], np.uint8), whole[39:]])
    assert cut(blocks_of_1.data, 65535, 65535, 0, 0, 65000, 65000) is None
    for _ in range(3000):
        damaged = whole[: rng.integers(31, len(whole))] if rng.random() < 0.2 else whole
        raw = fenced(damaged)
        places = rng.integers(31, min(runs, len(raw)), 3) if len(raw) > 31 else []
        raw[places] = rng.integers(0, 256, len(places)) >> rng.integers(0, 8)
        height, width = (120, 160) if rng.random() < 0.7 else rng.integers(1, 400, 2).tolist()
        y, x = int(rng.integers(height)), int(rng.integers(width))
        cut(raw.data, height, width, y, x, int(rng.integers(1, height - y + 1)), 1)


def shrink_at_the_edges() -> None:
    """Images of all remainders of a vector, and a wide one: what the kernel writes, and only where it may."""
    rng = np.random.default_rng(0)
    library = jpeg.compiled()
    assert library is not None
    for height, width in [*((3 * int(h), 3 * w) for w in range(1, 40) for h in rng.integers(1, 6, 1)), (3, 65535)]:
        image = fenced(rng.integers(0, 256, (height, width, 3), np.uint8))
        out = fenced(np.zeros((height // 3 * 2, width // 3 * 2, 3), np.uint8))
        scratch = fenced(np.zeros(width * 3 + 16, np.uint8))
        library.dermscale_two_thirds(image.ctypes.data, height, width, out.ctypes.data, scratch.ctypes.data)
        rows = _shrink_rows(image, len(out))
        assert np.array_equal(out, _shrink_rows(rows.transpose(1, 0, 2), out.shape[1]).transpose(1, 0, 2))


def sums_at_the_edges() -> None:
    """Images of all remainders of a vector, and one that no 16 bits hold."""
    rng = np.random.default_rng(0)
    library = jpeg.compiled()
    assert library is not None
    images = [rng.integers(0, 256, (n, 3), np.uint8) for n in (*range(1, 40), 16 * 256, 16 * 256 + 1, 9999)]
    for pixels in [*images, np.full((100_000, 3), 255, np.uint8)]:
        fenced_pixels, sums = fenced(pixels), fenced(np.zeros(6, np.int64).view(np.uint8)).view(np.int64)
        library.dermscale_channel_sums(fenced_pixels.ctypes.data, len(pixels), sums.ctypes.data)
        wide = pixels.astype(np.int64)
        assert sums.tolist() == [*wide.sum(0), *(wide**2).sum(0)]


def runs_at_the_edges() -> None:
    """Scans of few and of random bytes."""
    rng = np.random.default_rng(0)
    for size in [*range(2, 40), 65535, 65536, 200_000]:
        scan = fenced(rng.choice(np.array([0, 0xD0, 0xD7, 0xD8, 0xFF], np.uint8), size))
        scan[-2:] = 0xFF, 0xD9
        found, library = jpeg._lengths(scan), jpeg.compiled
        jpeg.compiled = lambda: None
        assert np.array_equal(found, jpeg._lengths(scan))
        jpeg.compiled = library
    for size, most in ((65535, 1), (65536, 0)):
        scan = fenced(np.zeros(size, np.uint8))
        scan[-2:] = 0xFF, 0xD9
        assert len(jpeg._lengths(scan)) == most


def with_library(path: str) -> None:
    """All of it with a library built here instead of the installed one."""
    library = ctypes.CDLL(path)
    kernels._declare(library)
    jpeg.compiled = resample.compiled = lambda: library
    cut_damaged_tables()
    runs_at_the_edges()
    if library.dermscale_resample_level():
        resize_at_the_edges()
        shrink_at_the_edges()
        sums_at_the_edges()


def compiler() -> str:
    """The command of a C compiler; skips where there is none."""
    command = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(command) is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler here")
    return command


def test_nothing_undefined_and_nothing_outside(tmp_path):
    library = tmp_path / "checked.so"
    options = ["-O1", "-fPIC", "-shared", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    sources = sorted((ROOT / "shards/kernels").glob("*.c"))
    subprocess.run([compiler(), *options, *sources, "-o", library, "-lm"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.shards.test_kernels import with_library; with_library({str(library)!r})"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.returncode} (negative: the signal)\n{done.stderr}"


def said_by_a_loader(shards: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What opening a loader warns of, with the library searched anew."""
    from shards import Loader  # and torch, which `with_library` does without

    kernels.compiled.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="shards"), ShardSet(shards) as data:
            Loader(data.select("train"), batch_size=8, engine="native").close()
            assert kernels.in_use() == {"cut": "numpy", "resize": "opencv"}
    finally:
        kernels.compiled.cache_clear()
    return caplog.messages


def test_a_library_of_older_sources_is_left_alone(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After an update without a new installation: one warning that says what to do, and everything works without."""
    source = tmp_path / "older.c"
    source.write_text("long dermscale_cut(void) { return 0; }")
    library = tmp_path / "older.so"
    subprocess.run([compiler(), "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    spec = importlib.machinery.ModuleSpec("shards.kernels._kernels", None, origin=str(library))
    monkeypatch.setattr(kernels, "find_spec", lambda name: spec)
    [said] = said_by_a_loader(tiny_shards, caplog)
    assert re.search("older sources.*make install", said)


def test_a_library_older_than_its_sources_is_left_alone(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = shutil.copy2(str(kernels.find_spec(kernels._NAME).origin), tmp_path)
    spec = importlib.machinery.ModuleSpec(kernels._NAME, None, origin=library)
    monkeypatch.setattr(kernels, "find_spec", lambda name: spec)
    (tmp_path / "changed.c").write_text("")  # later than the library
    [said] = said_by_a_loader(tiny_shards, caplog)
    assert re.search("older sources.*make install", said)


def test_a_library_that_was_not_built_is_warned_of(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    said = said_by_a_loader(tiny_shards, caplog)
    assert said == ["no compiled kernel for cut and resize here: images load much more slowly"]


@pytest.mark.skipif(kernels.compiled() is None, reason="the compiled library was not built")
@pytest.mark.parametrize("level", [0, 1])
def test_the_checksum_is_xxh3(level):
    library, rng = kernels.compiled(), np.random.default_rng(level)
    for length in [*range(241, 1400), 2048, 2049, 30_000, 65_537]:
        data = rng.integers(0, 256, length, np.uint8)
        assert library.dermscale_xxh3(data.ctypes.data, length, level) == xxhash.xxh3_64_intdigest(data)
