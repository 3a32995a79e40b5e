"""A Loader as it is under ignite: an Engine's epochs, its checkpoints, and epochs of another length."""

import pytest
import torch

from tests.support.clients import EPOCH, Tiny, epochs, flat, make

pytest.importorskip("ignite", reason="needs the extra `clients`")
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver


def engine(seen):
    net = Tiny()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(_, batch):
        optimizer.zero_grad()
        net.loss(batch).backward()
        optimizer.step()
        seen.append(batch.samples.tolist())

    return Engine(step)


@pytest.mark.parametrize("length", [None, 4])
def test_an_engine_sees_each_batch_once(tiny_shards, length):
    seen = []
    engine(seen).run(make(tiny_shards), max_epochs=3, epoch_length=length)
    assert seen == flat(epochs(tiny_shards, 3))[: 3 * (length or EPOCH)]


def test_an_evaluator_sees_the_split_at_every_run(tiny_shards):
    seen, val = [], make(tiny_shards, "val")
    evaluator = engine(seen)
    for _ in range(3):
        evaluator.run(val)
    assert seen == 3 * epochs(tiny_shards, 1, "val")[0]


@pytest.mark.parametrize("stop", [1, 4, EPOCH - 1, EPOCH, EPOCH + 5])
def test_a_checkpoint_of_any_step_goes_on_with_the_next_batch(tiny_shards, tmp_path, stop):
    seen, loader = [], make(tiny_shards)
    trainer = engine(seen)
    saving = Checkpoint({"trainer": trainer, "loader": loader}, DiskSaver(tmp_path), n_saved=None)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, saving)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), trainer.terminate)
    trainer.run(loader, max_epochs=3)
    everything = flat(epochs(tiny_shards, 3))
    assert seen == everything[:stop]
    resumed, again = [], make(tiny_shards)
    trainer = engine(resumed)
    Checkpoint.load_objects({"trainer": trainer, "loader": again}, tmp_path / f"checkpoint_{stop}.pt")
    trainer.run(again, max_epochs=3)
    assert resumed == everything[stop:]
