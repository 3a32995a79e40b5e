"""Training with PyTorch Lightning: python examples/with_lightning.py data/shards

A run that was stopped goes on with the next batch when it is started again. With `torchrun`, or on several GPUs, each
process loads its part of every batch.
"""

import sys

import lightning
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from shards import Batch, Loader, ShardSet
from train.head import InputHead
from train.models import Classifier


class Lesions(lightning.LightningModule):
    """A ResNet-18, and the loaders it is trained and validated with."""

    def __init__(self, shards: str, batch_size: int, resolution: int) -> None:
        super().__init__()
        self.data, self.options = ShardSet(shards), {"batch_size": batch_size, "resolution": resolution}
        mean, std, classes = self.data.manifest.mean, self.data.manifest.std, len(self.data.manifest.classes)
        self.net = Classifier(InputHead(mean, std), timm.create_model("resnet18", num_classes=classes))
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def train_dataloader(self) -> Loader:
        """Lightning keeps its position in checkpoints."""
        return Loader(self.data.select("train"), device=self.device, **self.options)

    def val_dataloader(self) -> Loader:
        """Pads the last batch: `mask` says which samples count."""
        return Loader(self.data.select("val"), device=self.device, train=False, **self.options)

    def on_train_epoch_start(self) -> None:
        """Tell the epoch: Lightning restores no loader from a checkpoint that it wrote at the end of an epoch."""
        self.trainer.train_dataloader.set_epoch(self.current_epoch)

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        """The loss of a batch."""
        return cross_entropy(self.net(batch.images, batch.colour), batch.labels)

    def validation_step(self, batch: Batch, _: int) -> None:
        """Count what is right among the samples that count."""
        images, labels, _, colour, mask = batch
        self.accuracy.update(self.net(images, colour)[mask], labels[mask])
        self.log("val_accuracy", self.accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(
    shards: str, out: str = "runs/lightning", *, batch_size: int = 64, resolution: int = 224, epochs: int = 10
) -> lightning.Trainer:
    """Train, or go on from the last checkpoint in `out`."""
    saving = ModelCheckpoint(out, save_last=True, every_n_train_steps=100, save_on_train_epoch_end=True)
    trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=out, callbacks=[saving])
    trainer.fit(Lesions(shards, batch_size, resolution), ckpt_path="last")
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
