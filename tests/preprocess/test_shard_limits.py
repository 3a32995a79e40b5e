"""Packing under pressure: a signal leaves nothing behind, and memory does not grow with the images."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.rawdata import jpeg, rows, write_table

ROOT = Path(__file__).parents[2]
METADATA = "HAM10000_metadata.csv"


def many(folder: Path, images: int, size: tuple[int, int]) -> Path:
    """A raw folder of many images that are all the same file, one link each."""
    (folder / "HAM10000_images_part_1").mkdir(parents=True)
    seed = folder / "HAM10000_images_part_1" / "ISIC_0000000.jpg"
    seed.write_bytes(jpeg(0, 0, *size))
    table = rows(images)
    for row in table[1:]:
        seed.with_name(f"{row['image_id']}.jpg").hardlink_to(seed)
    write_table(folder / METADATA, table)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_leaves_nothing(tmp_path, number, code, word):
    source = many(tmp_path / "raw", 2000, (450, 600))
    out = tmp_path / "out" / "set"
    process = subprocess.Popen(
        [sys.executable, "-m", "preprocess.shard", "--source", source, "--out", out, "--workers", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        # a shell's background job ignores Ctrl-C, and hands that on to what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    partial = out.with_name(".set.partial")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (partial / "shard-00000.tar").exists():
        time.sleep(0.02)
    assert (partial / "shard-00000.tar").exists()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (code, "")
    assert stderr.strip().startswith("error: ") and word in stderr and "\n" not in stderr.strip()
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path):
    """A larger source may cost what its records and its index do, 1,750 bytes an image; the images have 3,600 more.

    Not with `ru_maxrss`, which a process takes over from the one that started it.
    """
    script = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from preprocess.ham10000 import read_source\n"
        "from preprocess.packing import Settings, pack\n"
        "from shards.format import EncodeSpec\n"
        "pack(read_source(Path(sys.argv[1])), Path(sys.argv[2]), Settings(EncodeSpec('raw'), workers=2))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
    )
    peaks = []
    for images in (1000, 20_000):
        source = many(tmp_path / f"raw{images}", images, (30, 40))
        command = [sys.executable, "-c", script, source, tmp_path / f"set{images}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        peaks.append(int(done.stdout) * 1024)
    grown = (peaks[1] - peaks[0]) / 19_000
    assert grown < 3500, f"{grown:.0f} bytes an image"
