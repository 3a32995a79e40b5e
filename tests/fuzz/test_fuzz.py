"""Short runs of `make fuzz`."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from shards.common.errors import DermscaleError
from tests.fuzz.run import KERNELS, THREADS, MissingSanitizerError, Program, build, write_corpus


def built(program: tuple[tuple[str, ...], tuple[str, ...]], folder: Path) -> Program:
    try:
        return build(*program, folder)
    except MissingSanitizerError as error:
        pytest.skip(str(error))


def test_damaged_input_under_sanitizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    kernels, corpus = built(KERNELS, tmp_path), tmp_path / "corpus"
    write_corpus(corpus)
    inputs, decoded = (int(kernels(0, 6000, corpus).split()[place]) for place in (0, 2))
    assert inputs >= 6000
    assert 0.1 * inputs < decoded < 0.5 * inputs

    # A wrong result is found, and the message says how to repeat it.
    right = simplejpeg.decode_jpeg

    def wrong(file: bytes) -> np.ndarray:
        return right(file) ^ np.uint8(1)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", wrong)
    write_corpus(corpus)
    with pytest.raises(DermscaleError, match="FUZZ_SEED=3 FUZZ_INPUTS=1000 "):
        kernels(3, 1000, corpus)
    assert "other pixels" in capfd.readouterr().err


def test_threads_of_many_submitters_under_the_thread_sanitizer(tmp_path: Path) -> None:
    threads = built(THREADS, tmp_path)
    write_corpus(tmp_path / "corpus")
    assert threads(0, 20, tmp_path / "corpus").endswith(" batches")
