"""The dali engine on a GPU: its pixels beside native's, and batches whose reader lags behind."""

import numpy as np
import pytest
import torch

from shards import Loader
from shards.engines import dali
from shards.engines.dali import DaliEngine
from tests.shards.engines.test_dali import KINDS, requests_of
from tests.support.parity import batches, distances


def needs_gpu() -> None:
    """Skip where there is no CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", dali.VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_equals_native_within_its_own_tolerance(shard_sets, kind, variant):
    needs_gpu()
    selection = shard_sets[kind].select("train")
    expected = batches(Loader(selection, batch_size=10, resolution=48, engine="native"))
    engine = DaliEngine(selection.data, "cuda", contents=kind if kind in ("jpg", "raw") else "mixed", variant=variant)
    loader = Loader(selection, batch_size=10, resolution=48, engine="native", device="cuda")
    loader._engine.close()
    loader._engine = engine
    apart = distances(expected, batches(loader))
    if kind == "raw":
        assert apart.max() <= 1
    else:
        assert apart.mean() < 1 and (apart <= 4).mean() >= 0.999


@pytest.mark.gpu
def test_batches_on_a_gpu_survive_a_busy_stream(shard_sets):
    """What a kernel reads late is still what was handed over, though the batch was dropped long before."""
    needs_gpu()
    data = shard_sets["jpg"]
    requests = requests_of(data, [8] * 9) * 6
    variant, sums = "whole", []
    expected = [
        int(images.long().sum()) for images in DaliEngine(data, contents="jpg", variant=variant).run(requests, 64)
    ]
    square = torch.randn(4096, 4096, device="cuda")
    for images in DaliEngine(data, "cuda", contents="jpg", variant=variant).run(requests, 64):
        for _ in range(3):
            square = square @ square / 64
        sums.append(images.long().sum())  # queued behind the products
        del images
    found = torch.stack(sums).cpu().numpy()
    again = [int(i.long().sum()) for i in DaliEngine(data, "cuda", contents="jpg", variant=variant).run(requests, 64)]
    assert found.tolist() == again
    assert np.allclose(found, expected, rtol=0.01)
