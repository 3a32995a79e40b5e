"""Training with Hugging Face's Trainer: python examples/with_transformers.py data/shards

Its models take a dictionary, so a DataLoader without workers passes the loader's batches on as dictionaries. A run that
was stopped goes on when it is started again: the Trainer loads the batches of the epoch that it had seen, and drops
them.
"""

import sys
from typing import Any

import timm
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from shards import Batch, Loader, ShardSet
from train.head import InputHead
from train.models import Classifier


class Lesions(Classifier):
    """A network that computes its loss, as the Trainer wants it."""

    def forward(self, images: Tensor, colour: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Labels of -100 do not count."""
        logits = super().forward(images, colour)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def inputs(batch: Batch) -> dict[str, Tensor]:
    """What the network takes. Samples that only pad a batch get the label -100."""
    labels = batch.labels.masked_fill(~batch.mask, -100)
    return {"images": batch.images, "colour": batch.colour, "labels": labels}


class LesionTrainer(Trainer):
    """A Trainer whose data sets are Loaders: they make batches and share them among the processes."""

    def get_train_dataloader(self) -> DataLoader:
        """The batches of the current epoch."""
        return DataLoader(self.train_dataset, batch_size=None, collate_fn=inputs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The batches of the validation split."""
        return DataLoader(eval_dataset or self.eval_dataset, batch_size=None, collate_fn=inputs)


class SetEpoch(TrainerCallback):
    """Tells the loader its epoch, also when a run goes on."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """state.epoch: 1.5 in the middle of the second epoch."""
        given["train_dataloader"].dataset.set_epoch(int(state.epoch))


def accuracy(answers: EvalPrediction) -> dict[str, float]:
    """Of the samples that count."""
    counts = answers.label_ids != -100
    return {"accuracy": float((answers.predictions.argmax(1) == answers.label_ids)[counts].mean())}


def main(
    shards: str, out: str = "runs/transformers", *, batch_size: int = 64, resolution: int = 224, epochs: int = 10
) -> Trainer:
    """Train, or go on from the last checkpoint in `out`."""
    args = TrainingArguments(
        out, num_train_epochs=epochs, learning_rate=1e-3, save_steps=100, eval_strategy="epoch", report_to="none"
    )
    data, options = ShardSet(shards), {"batch_size": batch_size, "resolution": resolution, "device": args.device}
    head = InputHead(data.manifest.mean, data.manifest.std)
    trainer = LesionTrainer(
        Lesions(head, timm.create_model("resnet18", num_classes=len(data.manifest.classes))),
        args,
        train_dataset=Loader(data.select("train"), **options),
        eval_dataset=Loader(data.select("val"), train=False, **options),
        compute_metrics=accuracy,
        callbacks=[SetEpoch()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out))
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
