"""Fuzz the compiled library under sanitizers: `make fuzz`.

`kernels.c` gives it damaged files, index rows and boxes under AddressSanitizer and UndefinedBehaviorSanitizer.
`threads.c` uses its threads from several threads under ThreadSanitizer. Both start from synthetic images that the
packer's encoder has written, and `kernels.c` also from files like those of cameras. The work is split into pieces, each
with a seed, so that a fault can be repeated.
"""

import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import cv2
import numpy as np
import simplejpeg

from shards import jpeg
from shards.common.cli import run
from shards.common.errors import DermscaleError
from shards.common.machine import available_cores
from shards.common.progress import Progress
from shards.plan import Augment, numbers_of
from tests.conftest import picture

ROOT = Path(__file__).parents[2]
KERNELS = ("kernels.c", "payloads.c", "batches.c", "files.c"), ("address", "undefined", "float-cast-overflow")
THREADS = ("threads.c",), ("thread",)
PIECE = 50_000
"""Inputs of one seed."""
ROUND = 10_000
"""Inputs for which there is one round of the threads."""
_EXPECTED = "WARNING: AddressSanitizer failed to allocate"
"""Said when a damaged index asks for too much memory."""
_WRAPPED = ("dermscale_resample_level", "dermscale_decode_level", "dermscale_decode_box", "dermscale_cut")
"""Calls that `batches.c` takes the place of."""


@dataclass(frozen=True)
class Program:
    """One of the programs, built with sanitizers."""

    path: Path
    compiler: str

    def __call__(self, seed: int, count: int, corpus: Path) -> str:
        """Run it; return the line that it prints. On a fault it prints the report and raises DermscaleError."""
        command = [str(self.path), str(seed), str(count), str(corpus)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            report = [line for line in done.stderr.splitlines() if _EXPECTED not in line]
            click.echo("\n".join(report), err=True)
            inputs = count if self.path.name == "kernels" else count * ROUND
            raise DermscaleError(
                f"{self.path.name} {seed} {count} ended with {done.returncode}, see above: "
                f"make fuzz FUZZ_SEED={seed} FUZZ_INPUTS={inputs} runs it again"
            )
        return done.stdout.strip()


class MissingSanitizerError(DermscaleError):
    """No compiler here has the sanitizers."""


def build(own: tuple[str, ...], sanitizers: tuple[str, ...], folder: Path) -> Program:
    """Build KERNELS or THREADS, whose first file names the program, with the first compiler that has the sanitizers.

    Raises MissingSanitizerError if there is none, and DermscaleError if the sources do not compile.
    """
    sources = [*(Path(__file__).with_name(name) for name in own), *sorted((ROOT / "shards/kernels").glob("*.c"))]
    options = [
        "-g",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror=implicit-function-declaration",
        "-ffp-contract=off",
        "-pthread",
    ]
    options.append(f"-fsanitize={','.join(sanitizers)}")
    wrapped = [f"-Wl,--wrap={name}" for name in _WRAPPED] if own == KERNELS[0] else []
    program, empty = folder / own[0].removesuffix(".c"), folder / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    of_python = (sysconfig.get_config_var("CC") or "cc").split()[0]
    for compiler in dict.fromkeys(("clang", of_python, "gcc")):
        check = [compiler, *options, str(empty), "-o", str(folder / "empty")]
        if (
            not sys.platform.startswith("linux")
            or shutil.which(compiler) is None
            or subprocess.run(check, capture_output=True, check=False).returncode
            or subprocess.run([str(folder / "empty")], capture_output=True, check=False).returncode
        ):
            continue
        command = [compiler, *options, "-fno-sanitize-recover=all", *wrapped, *sources, "-o", program, "-lm"]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise DermscaleError(f"{compiler} cannot build {own[0]}:\n{built.stderr}")
        return Program(program, compiler)
    raise MissingSanitizerError(f"no C compiler here has -fsanitize={','.join(sanitizers)}: install clang or gcc")


_SIZES = [(1, 1), (8, 8), (9, 17), (16, 5), (5, 40), (17, 33), (32, 32), (47, 31), (48, 64), (64, 64), (33, 130)]
_SIZES += [(2, 300), (150, 210)]
"""px: many small ones at the edges of blocks, and a few larger ones."""
_WHOLE_SIZES = [(1, 1), (3, 3), (8, 8), (16, 6), (9, 18), (17, 33), (33, 15), (32, 32), (48, 63), (3, 300), (66, 129)]
"""px, of files without restart markers. Most sides are multiples of 3, so that they can be reduced."""


def _images(rng: np.random.Generator, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[np.ndarray, int]]:
    """(image, quality): two of each size."""
    for number, (height, width) in enumerate(sizes):
        kinds = (
            picture(rng, number, height, width),
            rng.integers(0, 256, (height, width, 3), np.uint8),
            (rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8),
            np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8),
        )
        yield kinds[0], int(rng.integers(60, 101))
        yield kinds[1 + number % 3], int(rng.integers(1, 101))


def _encode(image: np.ndarray, factor: int, quality: int, optimise: bool, interval: int = 0) -> np.ndarray:
    """A file, with Huffman tables of its own where it is optimised."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor]
    options += [cv2.IMWRITE_JPEG_OPTIMIZE, int(optimise), cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    return cv2.imencode(".jpg", image, options)[1]


def _packed_files(rng: np.random.Generator) -> list[bytes]:
    """Files as the packer writes them, and some with Huffman tables of their own or without a restart table."""
    files: list[bytes] = []
    for number, (image, quality) in enumerate(_images(rng, _SIZES)):
        for subsampling, (factor, block_height, block_width) in jpeg._SAMPLING.items():
            files.append(jpeg.encode_jpeg(image, quality, subsampling))
            if number % 6 == 4:
                interval = jpeg.restart_interval(image.shape[1], block_width)
                optimised = _encode(image, factor, quality, True, interval)
                files.append(jpeg._with_table(optimised, block_height, block_width, interval))
        if number % 8 == 0:
            files.append(jpeg.encode_jpeg(image, quality, restart=False))
    return files


def _whole_files(rng: np.random.Generator) -> list[bytes]:
    """Files without restart markers, as cameras write them. Four in a row have the same size and sampling."""
    images = list(_images(rng, _WHOLE_SIZES))
    return [
        _encode(image, factor, quality, optimise).tobytes()
        for pair in zip(images[::2], images[1::2], strict=True)
        for factor, _, _ in jpeg._SAMPLING.values()
        for image, quality in pair
        for optimise in (False, True)
    ]


def write_corpus(path: Path) -> None:
    """Write the images that both programs start from, with their right pixels, as fuzz.h reads them."""
    rng = np.random.default_rng(0)
    packed, whole = _packed_files(rng), _whole_files(rng)
    parts = [numbers_of(Augment()).tobytes(), struct.pack("=2i", len(packed), len(whole))]
    for file in [*packed, *whole]:
        pixels = simplejpeg.decode_jpeg(file)
        height, width = pixels.shape[:2]
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        box = (int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
        has_table = jpeg.has_restart_table(file)
        cut = jpeg._cut(memoryview(file), height, width, *box) if has_table else None
        region, top, left = cut or (np.empty(0, np.uint8), 0, 0)
        table = 22 + int.from_bytes(file[22:24], "big") if has_table else 0
        head = (height, width, len(file), table, *box, top, left, len(region))
        parts += [struct.pack("=11i", *head), file, pixels.tobytes(), region.tobytes()]
    path.write_bytes(b"".join(parts))


def _fuzz(inputs: int, seed: int, folder: Path) -> str:
    corpus, start = folder / "corpus", time.monotonic()
    write_corpus(corpus)
    kernels = build(*KERNELS, folder)
    try:
        threads = build(*THREADS, folder)
    except MissingSanitizerError as error:
        threads, beside = None, str(error)
    pieces = [min(PIECE, inputs - first) for first in range(0, inputs, PIECE)]
    said: list[str] = []
    pool = ThreadPoolExecutor(available_cores())
    try:
        with Progress("fuzzing", inputs, "inputs") as progress:
            for line in pool.map(lambda number: kernels(seed + number, pieces[number], corpus), range(len(pieces))):
                progress.advance(pieces[len(said)])
                said.append(line)
    finally:
        pool.shutdown(cancel_futures=True)
    if threads is not None:
        batches = threads(seed, -(-inputs // ROUND), corpus)
        beside = f"{batches} of threads under {', '.join(THREADS[1])} ({threads.compiler})"
    done, decoded = (sum(int(line.split()[place]) for line in said) for place in (0, 2))
    return (
        f"no fault: {done:,} inputs, {decoded:,} of them decoded, under {', '.join(KERNELS[1])} "
        f"({kernels.compiler}); {beside}; seeds from {seed}; {time.monotonic() - start:.0f} s"
    )


@click.command()
@click.option("--inputs", type=click.IntRange(1), default=10_000_000, show_default=True, help="How many, in total.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="The first seed.")
def main(inputs: int, seed: int) -> None:
    """Fuzz the compiled library under sanitizers, on all cores.

    Prints one line. A fault exits with 1 and names the seed that repeats it.
    """
    with tempfile.TemporaryDirectory() as folder:
        click.echo(_fuzz(inputs, seed, Path(folder)))


if __name__ == "__main__":
    run(main)
