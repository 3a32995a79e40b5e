"""The compiled library of the C files in this folder, built at installation if there is a compiler.

It is optional: without it everything works, more slowly.
"""

import ctypes
import functools
import logging
from importlib.util import find_spec
from pathlib import Path

_log = logging.getLogger(__name__)

LEVELS = ("opencv", "avx2", "avx512")
"""What resizes images, by the level that the library reports for this processor."""
_NAME = "shards.kernels._kernels"
_FUNCTIONS = (
    "dermscale_cut",
    "dermscale_run_lengths",
    "dermscale_resample_level",
    "dermscale_plan",
    "dermscale_order",
    "dermscale_engine_open",
    "dermscale_batch_draw",
    "dermscale_decode_level",
    "dermscale_decode_files",
)
"""What a library of these sources has on every processor."""


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """The library of kernels; None if it was not built or, with a warning, if it was built from older sources."""
    found = find_spec(_NAME)
    if found is None or found.origin is None:
        return None
    built = Path(found.origin)
    library = ctypes.CDLL(found.origin)
    newer = any(source.stat().st_mtime > built.stat().st_mtime for source in built.parent.glob("*.[ch]"))
    if newer or not all(hasattr(library, name) for name in _FUNCTIONS):
        _log.warning(
            "%s was built from older sources, so images are loaded without it, more slowly: "
            "install dermscale again (make install)",
            found.origin,
        )
        return None
    _declare(library)
    return library


@functools.cache
def holding_the_lock() -> ctypes.CDLL | None:
    """The same library for calls of some microseconds that keep the GIL.

    A call that releases it may wait 5 ms to get it back if another thread runs Python code.
    """
    if compiled() is None:
        return None
    library = ctypes.PyDLL(str(find_spec(_NAME).origin))  # type: ignore[union-attr]
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Name the types of the functions' arguments and results."""
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.dermscale_resample_level.argtypes = []
    library.dermscale_cut.restype = count
    library.dermscale_cut.argtypes = [pointer, count, *[number] * 6, ctypes.c_double, pointer, pointer]
    library.dermscale_run_lengths.restype = count
    library.dermscale_run_lengths.argtypes = [pointer, count, pointer, count]
    if library.dermscale_resample_level():
        library.dermscale_two_thirds.restype = library.dermscale_channel_sums.restype = None
        library.dermscale_channel_sums.argtypes = [pointer, count, pointer]
        library.dermscale_two_thirds.argtypes = [pointer, number, number, pointer, pointer]
        library.dermscale_scratch_bytes.restype = count
        library.dermscale_scratch_bytes.argtypes = [number, number]
        library.dermscale_resample.restype = None
        library.dermscale_resample.argtypes = [pointer, count, *[number] * 6, pointer, pointer, number]
    library.dermscale_files_scratch.restype = count
    library.dermscale_files_scratch.argtypes = [count, number]
    library.dermscale_decode_files.argtypes = [pointer, pointer, *[number] * 4, pointer, count, pointer, number]
    unsigned = ctypes.c_uint64
    library.dermscale_plan.restype = None
    library.dermscale_plan.argtypes = [unsigned, unsigned, pointer, count, *[pointer] * 6]
    library.dermscale_order.argtypes = [unsigned, unsigned, count, pointer]
    library.dermscale_xxh3.restype = unsigned
    library.dermscale_xxh3.argtypes = [pointer, count, number]
    library.dermscale_check.argtypes = [pointer, count, unsigned]
    library.dermscale_engine_open.restype = library.dermscale_batch_submit.restype = pointer
    library.dermscale_engine_open.argtypes = [pointer, count, pointer, pointer, *[number] * 3]
    library.dermscale_engine_close.argtypes = [pointer]
    library.dermscale_batch_submit.argtypes = [pointer, number, pointer, pointer, pointer, count, number]
    library.dermscale_batch_submit.argtypes += [ctypes.c_double, pointer, pointer, pointer, pointer]
    library.dermscale_batch_draw.restype = pointer
    library.dermscale_batch_draw.argtypes = [pointer, pointer, unsigned, pointer, count, number, pointer]
    library.dermscale_batch_done.argtypes = [pointer, pointer]
    library.dermscale_batch_wait.argtypes = library.dermscale_batch_cancel.argtypes = [pointer, pointer]
    library.dermscale_batch_free.argtypes = [pointer]


def outdated() -> bool:
    """Whether there is a library that `compiled` does not use, because its sources are older."""
    return compiled() is None and find_spec(_NAME) is not None


def in_use() -> dict[str, str]:
    """What cuts JPEGs and what resizes here: {"cut": "compiled" or "numpy", "resize": one of LEVELS}."""
    library = compiled()
    if library is None:
        return {"cut": "numpy", "resize": "opencv"}
    return {"cut": "compiled", "resize": LEVELS[library.dermscale_resample_level()]}
