"""A Loader as it is under Hugging Face Accelerate: prepare, save_state, two processes; and the example."""

import itertools
import runpy
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from tests.support.clients import EPOCH, ROOT, Tiny, epochs, flat, joined, make, samples, two_processes

accelerate = pytest.importorskip("accelerate", reason="needs the extra `clients`")


def prepared(loader):
    accelerator, net = accelerate.Accelerator(cpu=True), Tiny()
    net, optimizer, same = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), loader)
    assert same is loader
    accelerator.register_for_checkpointing(loader)
    return accelerator, net, optimizer


def train(loader, accelerator, net, optimizer, until):
    """The samples of the batches up to the epoch `until`."""
    while loader.epoch < until:
        for batch in loader:
            accelerator.backward(accelerator.unwrap_model(net).loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            yield batch.samples.tolist()


@pytest.mark.parametrize("stop", [1, 4, EPOCH - 1, EPOCH, EPOCH + 5])
def test_a_saved_state_goes_on_with_the_next_batch(tiny_shards, tmp_path, stop):
    everything = flat(epochs(tiny_shards, 3))
    loader = make(tiny_shards)
    accelerator, *rest = prepared(loader)
    running = train(loader, accelerator, *rest, 3)
    assert list(itertools.islice(running, stop)) == everything[:stop]
    accelerator.save_state(str(tmp_path / "state"))
    running.close()
    resumed = make(tiny_shards)
    accelerator, *rest = prepared(resumed)
    accelerator.load_state(str(tmp_path / "state"))
    assert list(train(resumed, accelerator, *rest, 3)) == everything[stop:]


def test_a_dataloader_around_it_is_prepared_in_one_process(tiny_shards):
    torchs = accelerate.Accelerator(cpu=True).prepare(DataLoader(make(tiny_shards), batch_size=None))
    assert [samples(torchs) for _ in range(3)] == epochs(tiny_shards, 3)


@pytest.mark.slow
def test_two_processes_share_each_batch(tiny_shards, tmp_path):
    two_processes(__file__, tiny_shards, tmp_path)
    assert joined(tmp_path) == flat(epochs(tiny_shards, 2))


@pytest.mark.slow
def test_the_example_trains_and_goes_on(tiny_shards, tmp_path):
    main = runpy.run_path(str(ROOT / "examples" / "with_accelerate.py"))["main"]
    options = {"batch_size": 8, "resolution": 32, "save_steps": 4}
    for epochs_ in (1, 2):
        right = main(str(tiny_shards), str(tmp_path), epochs=epochs_, **options) * 24
        assert abs(right - round(right)) < 1e-4
        (state,) = tmp_path.glob("state/custom_checkpoint_*.pkl")
        assert torch.load(state)["epoch"] == epochs_


if __name__ == "__main__":
    shards, folder = sys.argv[1:]
    loader = make(shards)
    accelerator, *rest = prepared(loader)
    seen = list(itertools.islice(train(loader, accelerator, *rest, 2), EPOCH - 2))
    accelerator.save_state(f"{folder}/state")
    loader = make(shards)  # and goes on from the state that the first process wrote
    accelerator, *rest = prepared(loader)
    accelerator.load_state(f"{folder}/state")
    seen += train(loader, accelerator, *rest, 2)
    torch.save(seen, f"{folder}/{accelerator.process_index}.pt")
    accelerator.end_training()
