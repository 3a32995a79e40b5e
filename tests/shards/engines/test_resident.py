"""The resident engine: every box, its check of the memory, and its compiled gather."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from shards import Augment, Loader
from shards.common import machine as memory
from shards.common.errors import UsageError
from shards.engines import Request, resident
from shards.engines.choose import EnginePool
from shards.engines.native import NativeEngine
from shards.engines.resident import ResidentEngine
from shards.kernels.load import in_use
from shards.plan import INTERPOLATIONS
from tests.support.parity import assert_parity, batches, distances


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("side", [5, 33, 150])
def test_every_box_and_symmetry_equals_native(shard_sets, side, interpolation):
    """Boxes from one pixel to the whole image, at all its edges, each in all eight symmetries, reduced and enlarged."""
    data = shard_sets["sizes"]
    selection = data.select("train")
    sample = int(selection.samples[11])
    height, width = int(data.column("height")[sample]), int(data.column("width")[sample])
    boxes = [(0, 0, height, width), (height - 1, width - 1, 1, 1), (0, width - 2, height, 2), (3, 0, 1, width)]
    requests = [
        Request(np.full(8, sample), np.array([box] * 8, np.int32), np.arange(8, dtype=np.uint8)) for box in boxes
    ]
    expected = NativeEngine(data, interpolation=interpolation).run(requests, side)
    found = ResidentEngine(selection, interpolation=interpolation).run(requests, side)
    exact = interpolation == "bicubic" or in_use()["resize"] != "opencv"
    for a, b in zip(expected, found, strict=True):
        assert int((a.int() - b.int()).abs().max()) <= (0 if exact else 1)
        assert len(torch.unique(b, dim=0)) > 1 or int(b.float().var(dim=(2, 3)).max()) == 0


def test_train_and_validation_may_both_be_resident(shard_sets):
    data = shard_sets["sizes"]
    splits = [(data.select("train", fraction=0.5), True), (data.select("val"), False)]
    loaders = [Loader(s, batch_size=6, resolution=40, train=t, engine="resident") for s, t in splits]
    for loader, (selection, train) in zip(loaders, splits, strict=True):
        native = Loader(selection, batch_size=6, resolution=40, train=train, engine="native")
        assert_parity(batches(native), batches(loader))


def test_small_chunks_and_parts_change_nothing(shard_sets, monkeypatch):
    selection = shard_sets["sizes"].select("train")
    loaders = [Loader(selection, batch_size=12, resolution=40, engine="resident") for _ in range(2)]
    expected = batches(loaders[0])
    monkeypatch.setattr(resident, "_CHUNK_BYTES", 20_000)  # less than the largest image
    monkeypatch.setattr(resident, "_EAGER_PIXELS", 1)
    assert distances(expected, batches(loaders[1])).max() == 0


def test_images_decoded_without_the_library_are_the_same(shard_sets, monkeypatch):
    selection = shard_sets["sizes"].select("train")
    loaders = [Loader(selection, batch_size=12, resolution=40, engine="resident") for _ in range(2)]
    expected = batches(loaders[0])
    monkeypatch.setattr(resident, "start_workers", lambda *_: None)
    assert distances(expected, batches(loaders[1])).max() == 0


def test_a_sample_that_is_not_held_is_refused(shard_sets):
    data = shard_sets["jpg"]
    other = int(data.select("val").samples[0])
    requests = [Request(np.array([other]), np.array([[0, 0, 8, 8]], np.int32), np.zeros(1, np.uint8))]
    with pytest.raises(ValueError, match=f"sample {other} is not in the selection"):
        list(ResidentEngine(data.select("train")).run(requests, 16))


def test_too_little_memory_is_refused_in_numbers(shard_sets, monkeypatch):
    selection = shard_sets["jpg"].select("train")
    needed = 72 * 72 * 96 * 3
    monkeypatch.setattr(resident, "free_bytes", lambda device: needed)  # it fits, and leaves nothing to a model
    with pytest.raises(UsageError) as error:
        Loader(selection, batch_size=4, engine="resident")
    assert "needs 0.00149 GB on cpu for 72 images" in str(error.value) and "0.00149 GB are free" in str(error.value)
    monkeypatch.setattr(resident, "free_bytes", lambda device: 2 * needed)
    loader = Loader(selection, batch_size=4, resolution=32, engine="resident")
    monkeypatch.setattr(resident, "free_bytes", lambda device: needed // 2)  # taken by another in the meantime
    with pytest.raises(UsageError, match="a smaller --max-resolution"):
        next(iter(loader))


def test_free_memory_is_the_least_of_machine_and_container(tmp_path):
    assert memory._container_room(tmp_path) == 1 << 62  # no control group
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    assert memory._container_room(tmp_path) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_room(tmp_path) == 1 << 62
    assert 1 << 20 < memory.free_bytes("cpu") < 1 << 50


KERNEL = """
import numpy as np, torch
from shards.engines.resident import COLUMN_BITS, FRACTION, LINES, ROW_BITS, gather
from shards.kernels import gather as kernel

rng, rows, start = np.random.default_rng(4), [], 0
for symmetry in [*range(8)] * 3:
    height, width = rng.integers(1, 60, 2)
    y, x = rng.integers(0, (height, width))
    h, w = rng.integers(1, (height - y + 1, width - x + 1))
    rows.append([start, width, y, x, h, w, symmetry])
    start += height * width
pixels, table = torch.from_numpy(rng.integers(0, 256, (start, 3), dtype=np.uint8)), torch.tensor(rows)
for kind, sides, count in (("bilinear", (1, 7, 17), 24), ("bicubic", (1, 17), 8)):  # the interpreter is slow
    some = table[:count]
    for side in sides:
        found = kernel.gather(pixels, some, side, LINES[kind], ROW_BITS[kind], COLUMN_BITS, FRACTION)
        assert torch.equal(found, gather(pixels, some, side, kind)), (side, kind)
"""


def test_the_triton_kernel_equals_the_gather_to_the_bit():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when the kernel is made
    done = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_triton_kernel_can_be_compiled_for_a_gpu(interpolation):
    """The compiler needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from shards.kernels import gather

    signature = dict.fromkeys(("pixels", "out"), "*u8") | {"table": "*i64", "side": "i32"}
    constants = {"lines": resident.LINES[interpolation], "row_bits": resident.ROW_BITS[interpolation]}
    constants |= {"column_bits": 14, "fraction": 6, "count": 256}
    source = triton.compiler.ASTSource(gather._gather, signature | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "ld.global" in compiled.asm["ptx"]


def test_loaders_with_one_pool_share_the_decoded_images(shard_sets):
    data, pool = shard_sets["sizes"], EnginePool()
    options = {"batch_size": 6, "resolution": 40, "engine": "resident"}
    plain, cubic = Augment(), Augment(interpolation="bicubic")
    passes = [
        (data.select("train", fraction=0.5), {"train": True, "augment": plain}),
        (data.select("val"), {"train": False, "augment": cubic}),
        (data.select("train"), {"train": True, "augment": cubic}),
        (data.select("val"), {"train": False, "augment": plain}),
    ]
    loaders = [Loader(selection, **own, **options, pool=pool) for selection, own in passes]
    for loader, (selection, own) in zip(loaders, passes, strict=True):
        assert distances(batches(Loader(selection, **own, **options)), batches(loader)).max() == 0
        loader.close()
    held = [loader._engine._engine._pixels for loader in loaders]
    assert len({id(pixels) for (pixels,) in held}) == 1
    pool.close(data)
    assert not any(held)


def test_evaluation_crops_are_exact_at_their_own_size(shard_sets):
    """No resizing at all: the pixels of the centre square themselves."""
    data = shard_sets["jpg"]
    selection = data.select("val")
    loader = Loader(
        selection, batch_size=4, resolution=63, train=False, engine="resident", augment=Augment(eval_crop=0.875)
    )
    batch = next(iter(loader))
    for image, sample in zip(batch.images, batch.samples.tolist(), strict=True):
        crop = data.pixels(sample)[(72 - 63) // 2 :][:63, (96 - 63) // 2 :][:, :63]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), crop)
