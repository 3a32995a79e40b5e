"""A Loader as it is under PyTorch Lightning: fit, validate, resume in mid-epoch, two processes; and the example."""

import os
import runpy
import sys

import pytest
import torch

from tests.support.clients import EPOCH, ROOT, Tiny, epochs, flat, joined, make, two_processes

lightning = pytest.importorskip("lightning", reason="needs the extra `clients`")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


class Module(lightning.LightningModule):
    """Writes down the samples that it sees."""

    def __init__(self, loader):
        super().__init__()
        self.net, self.loader, self.seen, self.validated = Tiny(), loader, [], []

    def train_dataloader(self):
        return self.loader

    def training_step(self, batch, _):
        self.seen.append(batch.samples.tolist())
        return self.net.loss(batch)

    def validation_step(self, batch, _):
        self.validated.append(batch.samples[batch.mask].tolist())
        self.log("loss", self.net.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Told(Module):
    """Tells the loader its epoch, as the example does."""

    def on_train_epoch_start(self):
        self.trainer.train_dataloader.set_epoch(self.current_epoch)


def trainer(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(**({"default_root_dir": folder, "enable_checkpointing": False} | quiet | options))


def test_fit_and_validate_see_each_batch_once(tiny_shards, tmp_path):
    module = Module(make(tiny_shards))
    val = make(tiny_shards, "val")
    trainer(tmp_path, max_epochs=3).fit(module, val_dataloaders=val)
    assert module.seen == flat(epochs(tiny_shards, 3))
    whole = val.selection.samples.tolist()
    sanity = module.validated[:2]  # two batches before training; then the whole split, three times
    assert flat(sanity) == whole[:16] and flat(module.validated[2:]) == 3 * whole
    module.validated.clear()
    trainer(tmp_path).validate(module, val, verbose=False)
    assert flat(module.validated) == whole


@pytest.mark.parametrize("kind", [Module, Told])
@pytest.mark.parametrize("stop", [1, 4, EPOCH - 1, EPOCH, EPOCH + 5])
def test_a_checkpoint_of_any_step_goes_on_with_the_next_batch(tiny_shards, tmp_path, stop, kind):
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    everything = flat(epochs(tiny_shards, 3))
    module = kind(make(tiny_shards))
    trainer(tmp_path, max_steps=stop, enable_checkpointing=True, callbacks=[saving]).fit(module)
    assert module.seen == everything[:stop]
    resumed = kind(make(tiny_shards))
    trainer(tmp_path, max_epochs=3).fit(resumed, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert resumed.seen == everything[stop:]


def test_the_checkpoint_at_the_end_of_an_epoch_goes_on_with_the_next_one(tiny_shards, tmp_path):
    """Lightning restores no loader from it, so the epoch must be told."""
    module = Told(make(tiny_shards))
    trainer(tmp_path, max_epochs=1, enable_checkpointing=True).fit(module)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    resumed = Told(make(tiny_shards))
    trainer(tmp_path, max_epochs=3).fit(resumed, ckpt_path=checkpoint)
    assert resumed.seen == flat(epochs(tiny_shards, 3))[EPOCH:]


def test_shortened_epochs_are_different_ones_if_told(tiny_shards, tmp_path):
    module = Told(make(tiny_shards))
    trainer(tmp_path, max_epochs=3, limit_train_batches=2).fit(module)
    assert module.seen == flat(epoch[:2] for epoch in epochs(tiny_shards, 3))


@pytest.mark.slow
def test_two_processes_share_each_batch(tiny_shards, tmp_path):
    two_processes(__file__, tiny_shards, tmp_path)
    assert joined(tmp_path) == flat(epochs(tiny_shards, 2))


@pytest.mark.slow
def test_the_example_trains_and_goes_on(tiny_shards, tmp_path):
    main = runpy.run_path(str(ROOT / "examples" / "with_lightning.py"))["main"]
    options = {"batch_size": 8, "resolution": 32}
    first = main(str(tiny_shards), str(tmp_path), epochs=1, **options)
    assert first.global_step == EPOCH
    second = main(str(tiny_shards), str(tmp_path), epochs=2, **options)
    assert second.global_step == 2 * EPOCH and second.train_dataloader.epoch == 2
    right = float(second.callback_metrics["val_accuracy"]) * 24
    assert abs(right - round(right)) < 1e-4  # of the 24 images, without those that pad


if __name__ == "__main__":
    shards, folder = sys.argv[1:]
    module = Module(make(shards))
    trainer(folder, max_epochs=2, strategy="ddp", devices=2).fit(module)
    torch.save(module.seen, f"{folder}/{os.environ['RANK']}.pt")
